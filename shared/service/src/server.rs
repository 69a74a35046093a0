//! The gRPC server of a service, on a Unix socket and, where the site says so, on a TCP port with mutual TLS; and its
//! metrics page.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kiln_model::event::Service;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::access::{Access, AccessLayer, Places, Rates};
use crate::audit::Refusals;
use crate::config::Site;
use crate::observe::ObserveLayer;
use crate::shutdown::requested;
use crate::tls::{self, ServerTls, TlsFiles};

mod accept;
mod connection;
mod limits;
mod page;
mod seats;

pub use limits::{APPLY_LIMIT, Limits};

/// Whoever runs this process, by the name that a call of theirs at a Unix socket would have.
pub fn who() -> String {
    accept::person_of("self", rustix::process::getuid().as_raw())
}

/// Calls under way get this long to end once the service is told to stop.
const DRAIN: Duration = Duration::from_secs(2);
/// The kernel's bound on a socket's path, with its end.
const SOCKET_PATH: usize = 107;
/// Connections that shook hands and wait for the server to take them, which it does at once.
const WAITING: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can't listen on {place}: {reason}")]
    Bind { place: String, reason: String },
    #[error(
        "can't listen on {place} without TLS: {reason}; `kiln up` makes a site's authority and certificates, `kiln pki issue` those of a service on another machine"
    )]
    Tls { place: String, reason: String },
    #[error("the server on {place} failed: {reason}")]
    Failed { place: String, reason: String },
}

#[derive(Debug, Clone)]
pub struct ServerOptions {
    pub service: Service,
    pub socket: PathBuf,
    /// A TCP port for calls from other machines.
    pub listen: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    /// Needed for either of them.
    pub tls: TlsFiles,
    /// Of the tokens that people have.
    pub tokens: PathBuf,
    pub limits: Limits,
    /// False while the service can't do its work: its health says NOT_SERVING then.
    pub ready: Option<watch::Receiver<bool>>,
    /// Told of the calls that a role does not take. None where nobody records them.
    pub refusals: Option<Refusals>,
}

impl ServerOptions {
    pub fn new(service: Service, site: &Site) -> Self {
        Self {
            service,
            socket: site.paths().socket(service),
            listen: site.listen.get(&service).copied(),
            metrics: site.metrics.get(&service).copied(),
            tls: site.tls(service),
            tokens: site.paths().tokens(),
            limits: Limits::default(),
            ready: None,
            refusals: None,
        }
    }
}

/// The gRPC name of a service, as its health is asked for.
const fn grpc_name(service: Service) -> &'static str {
    match service {
        Service::Builder => "kiln.builder.v1.BuilderService",
        Service::Deployer => "kiln.deployer.v1.DeployerService",
        Service::Monitor => "kiln.monitor.v1.MonitorService",
        Service::Node => "kiln.engine.v1.EngineService",
    }
}

/// Serves the routes, health and reflection until told to stop; calls under way may end, within a bound. The caller
/// holds the service's [`crate::guard::Guard`]: a socket that lies there already is a dead one's.
///
/// # Errors
/// Where the socket or a port can't be had, or the certificate of a port can't be read.
pub async fn serve(options: ServerOptions, routes: Routes, stop: watch::Receiver<bool>) -> Result<(), Error> {
    let ServerOptions { service, socket, listen, metrics, tls, tokens, limits, ready, refusals } = options;
    let place = socket.display().to_string();
    let rates = Rates::new(limits.people, limits.others);
    let access = Arc::new(Access::new(tls.site.clone(), tokens.clone(), rates, refusals));
    let places = Places::new(limits.large, limits.large_wait);
    let (hall, connections) = mpsc::channel(WAITING);
    let (page_hall, page_connections) = mpsc::channel(WAITING);
    // They end with whoever takes their connections.
    let mut doors = JoinSet::new();
    if let Some(address) = listen {
        let port = open(address, &tls, &tokens, &[b"h2"]).await?;
        doors.spawn(accept::tcp(port, limits.clone(), hall.clone()));
    }
    if let Some(address) = metrics {
        match open(address, &tls, &tokens, &[b"http/1.1"]).await {
            Ok(port) => drop(doors.spawn(accept::tcp(port, limits.clone(), page_hall))),
            // A site of before certificates has none until the next `kiln up`; its services work all the same.
            Err(error @ Error::Tls { .. }) => tracing::error!(%error, "there are no metrics"),
            Err(error) => return Err(error),
        }
    }
    doors.spawn(accept::unix(bind(&socket)?, place.clone(), limits.clone(), hall));
    let health = HealthReporter::new();
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(kiln_api::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| Error::Failed { place: place.clone(), reason: error.to_string() })?;
    let health_service = tonic_health::server::HealthService::from_health_reporter(health.clone());
    let routes = routes
        .add_service(tonic_health::pb::health_server::HealthServer::new(health_service))
        .add_service(reflection);
    let mut stopping = stop.clone();
    let server = Server::builder()
        .max_concurrent_streams(limits.streams)
        .concurrency_limit_per_connection(limits.streams as usize)
        .timeout(limits.call)
        .http2_max_header_list_size(limits.headers)
        .http2_max_pending_accept_reset_streams(Some(limits.resets))
        .http2_keepalive_interval(Some(limits.alive))
        .http2_keepalive_timeout(Some(limits.alive))
        .max_connection_age(limits.age)
        .layer(ObserveLayer)
        .layer(AccessLayer { access: Arc::clone(&access), places })
        .add_routes(routes)
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), async move {
            requested(&mut stopping).await;
        });
    tracing::info!(socket = %place, ?listen, ?metrics, "serving");
    let beside = async {
        let mut stop = stop;
        tokio::select! {
            () = requested(&mut stop) => {}
            () = report(&health, service, ready) => {}
            () = page::serve(page_connections, access, limits) => {}
        }
        set_health(&health, service, ServingStatus::NotServing).await;
        tokio::time::sleep(DRAIN).await;
    };
    let ended = tokio::select! {
        ended = server => ended.map_err(|error| Error::Failed { place, reason: crate::error::chain(&error) }),
        () = beside => {
            tracing::info!("calls under way are cut off");
            Ok(())
        }
    };
    if let Err(error) = std::fs::remove_file(&socket) {
        tracing::debug!(%error, "could not remove the socket");
    }
    ended
}

/// A TCP port. There is none without a certificate to show.
async fn open(
    address: SocketAddr,
    files: &TlsFiles,
    tokens: &Path,
    protocols: &'static [&'static [u8]],
) -> Result<accept::Port, Error> {
    let tls: ServerTls = tls::server(files, tokens, protocols)
        .map_err(|reason| Error::Tls { place: address.to_string(), reason })?;
    let listener = TcpListener::bind(address).await.map_err(|error| bind_error(&address, &error))?;
    Ok(accept::Port { address, listener, tls: Arc::new(tls), site: files.site.clone() })
}

fn bind_error(place: &dyn std::fmt::Display, error: &std::io::Error) -> Error {
    Error::Bind { place: place.to_string(), reason: error.to_string() }
}

/// Bound aside and moved, so that a client finds either the old socket or one that answers.
fn bind(socket: &Path) -> Result<UnixListener, Error> {
    let aside = socket.with_extension("new");
    if aside.as_os_str().len() > SOCKET_PATH {
        return Err(Error::Bind {
            place: socket.display().to_string(),
            reason: format!("the path is longer than {SOCKET_PATH} bytes: give the site a shorter home"),
        });
    }
    let failed = |error: std::io::Error| bind_error(&socket.display(), &error);
    match std::fs::remove_file(&aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&aside).map_err(failed)?;
    std::fs::set_permissions(&aside, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&aside, socket).map_err(failed)?;
    Ok(listener)
}

/// Keeps the health as the service says. Never returns.
async fn report(health: &HealthReporter, service: Service, ready: Option<watch::Receiver<bool>>) {
    let Some(mut ready) = ready else {
        set_health(health, service, ServingStatus::Serving).await;
        return std::future::pending().await;
    };
    loop {
        let serving = *ready.borrow_and_update();
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        set_health(health, service, status).await;
        if ready.changed().await.is_err() {
            // Whoever knows is gone: the last word stands.
            return std::future::pending().await;
        }
    }
}

async fn set_health(health: &HealthReporter, service: Service, status: ServingStatus) {
    for name in ["", grpc_name(service)] {
        health.set_service_status(name, status).await;
    }
}
