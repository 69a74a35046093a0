//! TLS from files that are renewed while it runs: of a server that wants to know its callers, and of a client that
//! wants the service it asked for.

mod expect;
mod latest;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_model::name::SiteName;
use tokio_rustls::rustls::client::danger::ServerCertVerifier;
use tokio_rustls::rustls::client::{Resumption, WantsClientCert};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, ConfigBuilder, RootCertStore, ServerConfig};

use crate::access::{Role, Tokens};
use crate::reloaded::{Reloaded, text, unreadable};

/// Where the files of one end lie.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub site: SiteName,
    /// The certificates of the authorities that are trusted; two while one takes the other's place.
    pub authority: PathBuf,
    /// The certificate of this end and its key, in one file. A client with a token has none.
    pub identity: Option<PathBuf>,
}

impl TlsFiles {
    fn paths(&self) -> Vec<PathBuf> {
        std::iter::once(&self.authority).chain(&self.identity).cloned().collect()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn authorities(path: &Path) -> Result<RootCertStore, String> {
    let pem = text(path)?;
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        let added = certificate
            .map_err(|error| error.to_string())
            .and_then(|certificate| roots.add(certificate).map_err(|error| error.to_string()));
        added.map_err(|error| format!("an authority in {} can't be used: {error}", path.display()))?;
    }
    if roots.is_empty() {
        return Err(format!("there is no authority in {}", path.display()));
    }
    Ok(roots)
}

type Own = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn own(path: &Path) -> Result<Own, String> {
    let pem = kiln_secret::read(path).map_err(|error| unreadable(path, &error))?;
    let failed =
        |what: &str, error: String| format!("the {what} in {} can't be used: {error}", path.display());
    let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| failed("certificate", error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(pem.as_bytes());
    Ok((chain, key.map_err(|error| failed("key", error.to_string()))?))
}

/// What a server shows, and whom it believes.
pub(crate) type ServerTls = Reloaded<ServerConfig>;

/// # Errors
/// Names the file that can't be read or used.
pub(crate) fn server(
    files: &TlsFiles,
    tokens: &Path,
    protocols: &'static [&'static [u8]],
) -> Result<ServerTls, String> {
    let mut paths = files.paths();
    paths.push(tokens.to_owned());
    let site = files.site.clone();
    Reloaded::new(paths, move |paths| {
        let [authority, identity, tokens] = paths else {
            return Err("a server needs a certificate of its own".to_owned());
        };
        let (chain, key) = own(identity)?;
        let mut callers =
            WebPkiClientVerifier::builder_with_provider(Arc::new(authorities(authority)?), provider());
        // A caller without a certificate may have one of them: the layer of the calls decides.
        if !Tokens::read(&site, std::slice::from_ref(tokens)).is_empty() {
            callers = callers.allow_unauthenticated();
        }
        let callers = callers.build().map_err(|error| error.to_string())?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| error.to_string())?
            .with_client_cert_verifier(callers)
            .with_single_cert(chain, key)
            .map_err(|error| format!("{} can't be used: {error}", identity.display()))?;
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        // A session that is resumed would not look at the caller's certificate again.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    })
}

/// What a client shows, and whom it believes.
pub(crate) type ClientTls = Reloaded<ClientConfig>;

/// For calls to the service of a role. A server that shows another service's certificate is refused.
///
/// # Errors
/// Names the file that can't be read or used.
pub(crate) fn client(files: &TlsFiles, service: Role) -> Result<ClientTls, String> {
    let site = files.site.clone();
    Reloaded::new(files.paths(), move |paths| {
        let [authority, identity @ ..] = paths else { return Err("there is no authority".to_owned()) };
        let expected = expect::Expect::new(authorities(authority)?, provider(), site.clone(), service)?;
        let builder = believing(Arc::new(expected))?;
        let mut config = match identity {
            [identity, ..] => {
                let (chain, key) = own(identity)?;
                let config = builder.with_client_auth_cert(chain, key);
                config.map_err(|error| format!("{} can't be used: {error}", identity.display()))?
            }
            [] => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    })
}

/// For connections to the site's broker, which are made anew by a client that is given this once: what the files hold is
/// looked up at each handshake.
///
/// # Errors
/// Names the file that can't be read or used.
pub fn to_broker(files: &TlsFiles) -> Result<ClientConfig, String> {
    let latest = Arc::new(latest::Latest::new(files)?);
    let mut config = believing(latest.clone())?.with_client_cert_resolver(latest);
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn believing(
    verifier: Arc<dyn ServerCertVerifier>,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
    let builder = ClientConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]);
    let builder = builder.map_err(|error| error.to_string())?;
    Ok(builder.dangerous().with_custom_certificate_verifier(verifier))
}
