//! A site's authority, and its monitor at a TCP port of 127.0.0.1.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_model::event::Service;
use kiln_model::name::SiteName;
use kiln_service::access::{Identity, Role, Secret, Token, TokenFile};
use kiln_service::audit::Refusals;
use kiln_service::client;
use kiln_service::pki::Authority;
use kiln_service::server::{Limits, ServerOptions};
use kiln_service::tls::TlsFiles;
use tokio::net::{TcpSocket, TcpStream};
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::monitor::{Client, Running, options};

pub(crate) const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
const LIFE: Duration = Duration::from_secs(3600);

pub(crate) struct Site {
    pub(crate) running: Running,
    pub(crate) authority: Authority,
    pub(crate) address: SocketAddr,
    pub(crate) metrics: SocketAddr,
}

pub(crate) fn site_name() -> SiteName {
    "home".parse().unwrap()
}

pub(crate) fn identity(role: Role) -> Identity {
    if role.is_person() {
        Identity::person("ada".parse().unwrap(), role).unwrap()
    } else {
        Identity::service(role).unwrap()
    }
}

/// Of a person whose name says which it is.
pub(crate) fn token(random: u8, role: Role, expires: &str) -> (Secret, Token) {
    let secret = Secret::of(&[random; 32]);
    let name = format!("bot{random}").parse().unwrap();
    let created = "2026-01-01T00:00:00Z".parse().unwrap();
    let token = Token::new(&secret, name, role, created, expires.parse().unwrap()).unwrap();
    (secret, token)
}

pub(crate) fn in_an_hour() -> String {
    Timestamp::now().checked_add(LIFE).unwrap().to_string()
}

/// Replaced as `kiln up` does it: by a rename.
pub(crate) fn replace(path: &Path, text: &str) {
    let aside = path.with_extension("new");
    std::fs::write(&aside, text).unwrap();
    std::fs::rename(aside, path).unwrap();
}

pub(crate) fn free_port() -> SocketAddr {
    std::net::TcpListener::bind((LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

impl Site {
    pub(crate) async fn start() -> Self {
        Self::start_with(Limits::default()).await
    }

    pub(crate) async fn start_with(limits: Limits) -> Self {
        Self::start_as(limits, &identity(Role::Monitor), &["127.0.0.1".to_owned()], SystemTime::now()).await
    }

    /// With a server that shows the certificate of an identity, for hosts, from a time on for an hour.
    pub(crate) async fn start_as(limits: Limits, own: &Identity, hosts: &[String], from: SystemTime) -> Self {
        Self::start_that_tells(limits, own, hosts, from, None).await
    }

    /// With a server that tells what it refuses.
    pub(crate) async fn start_and_tell(refusals: Refusals) -> Self {
        let (own, hosts) = (identity(Role::Monitor), ["127.0.0.1".to_owned()]);
        let now = SystemTime::now();
        Self::start_that_tells(Limits::default(), &own, &hosts, now, Some(refusals)).await
    }

    async fn start_that_tells(
        limits: Limits,
        own: &Identity,
        hosts: &[String],
        from: SystemTime,
        refusals: Option<Refusals>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new(site_name()).unwrap();
        let certificate = authority.certificate(SystemTime::now()).unwrap();
        std::fs::write(folder.path().join("authority.pem"), certificate).unwrap();
        let issued = authority.issue(own, hosts, LIFE, from).unwrap();
        std::fs::write(folder.path().join("monitor.pem"), issued.reveal()).unwrap();
        let (address, metrics) = (free_port(), free_port());
        let options = ServerOptions {
            listen: Some(address),
            metrics: Some(metrics),
            limits,
            refusals,
            ..options(folder.path())
        };
        let running = Running::start_with(folder, options).await;
        Self { running, authority, address, metrics }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.running.folder.path().join(name)
    }

    /// The tokens that there are from now on.
    pub(crate) fn keep(&self, tokens: &[&Token]) {
        let file = TokenFile { token: tokens.iter().map(|token| (*token).clone()).collect() };
        replace(&self.path("tokens.toml"), &file.to_text().unwrap());
    }

    /// A file with the certificate of an identity and its key.
    pub(crate) fn issue(&self, identity: &Identity, from: SystemTime, life: Duration) -> PathBuf {
        let path = self.path(&format!("{}-{}.pem", identity.name(), identity.role()));
        replace(&path, &self.authority.issue(identity, &[], life, from).unwrap().reveal());
        path
    }

    pub(crate) fn certificate(&self, role: Role) -> PathBuf {
        self.issue(&identity(role), SystemTime::now(), LIFE)
    }

    pub(crate) fn channel(&self, identity: Option<&Path>, token: Option<&str>) -> client::Channel {
        self.channel_to(&format!("https://{}", self.address), identity, token)
    }

    /// A channel to a monitor of the site at one of these addresses.
    pub(crate) fn channel_to(
        &self,
        addresses: &str,
        identity: Option<&Path>,
        token: Option<&str>,
    ) -> client::Channel {
        let files = TlsFiles {
            site: site_name(),
            authority: self.path("authority.pem"),
            identity: identity.map(Path::to_owned),
        };
        client::remote(addresses.parse().unwrap(), &files, Service::Monitor, token).unwrap()
    }

    pub(crate) fn client(&self, identity: Option<&Path>, token: Option<&str>) -> Client {
        MonitorServiceClient::new(self.channel(identity, token))
    }

    pub(crate) fn as_role(&self, role: Role) -> Client {
        self.client(Some(&self.certificate(role)), None)
    }

    /// A connection by hand, from one of the machine's own addresses.
    pub(crate) async fn tls(
        &self,
        to: SocketAddr,
        identity: Option<&Path>,
        protocol: &[u8],
        from: Ipv4Addr,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.path("authority.pem")).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match identity {
            Some(path) => {
                let chain = vec![CertificateDer::from_pem_file(path).unwrap()];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(path).unwrap()).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![protocol.to_vec()];
        let stream = connect(from, to).await?;
        let name = ServerName::from(std::net::IpAddr::from(LOCALHOST));
        tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await
    }

    pub(crate) async fn stop(self) {
        self.running.stop().await;
    }
}

pub(crate) async fn connect(from: Ipv4Addr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((from, 0)))?;
    socket.connect(to).await
}
