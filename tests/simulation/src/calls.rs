//! Calls from one process to another: the real client and the real server, with nothing between them that keeps a promise.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use kiln_model::event::Service;
use kiln_service::access::{self, Caller};
use kiln_service::client::Channel;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::util::BoxCloneSyncService;
use tower::{Service as _, ServiceExt as _};

use crate::life::Life;
use crate::world::World;

pub(crate) type Server = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// A peer that stands still is found out by then.
const ALIVE: Duration = Duration::from_secs(20);

/// Of a replica of a service.
type Address = (Service, u64);

/// Who answers at the address of each replica of each service now.
#[derive(Clone, Default)]
pub(crate) struct Directory {
    servers: Arc<Mutex<BTreeMap<Address, (Life, Server)>>>,
}

#[derive(Clone)]
pub(crate) enum To {
    /// Any replica.
    Service(Service),
    /// The process of this name.
    Process(String),
}

impl Directory {
    pub(crate) fn serve(&self, life: &Life, server: Server) {
        self.servers.lock().unwrap().insert((life.service, life.replica), (life.clone(), server));
    }

    /// Nobody answers any more. Servers hold channels, and those this directory: it would never be freed.
    pub(crate) fn close(&self) {
        self.servers.lock().unwrap().clear();
    }

    fn find(&self, to: &To, world: &World) -> Option<(Life, Server)> {
        let is_meant = |life: &Life| match to {
            To::Service(service) => life.service == *service,
            To::Process(name) => life.name() == name,
        };
        let servers = self.servers.lock().unwrap();
        let found: Vec<_> =
            servers.values().filter(|(life, _)| is_meant(life) && !life.is_dead()).cloned().collect();
        // One has no choice, and takes nothing from the random numbers.
        if found.len() > 1 { world.pick(&found).cloned() } else { found.into_iter().next() }
    }

    /// The way of a process to a service; of a person where there is none.
    pub(crate) fn channel(&self, caller: Option<&Life>, to: To, world: &World) -> Channel {
        let (directory, caller, world) = (self.clone(), caller.cloned(), world.clone());
        Channel::over(Wire { directory, caller, to, world })
    }
}

#[derive(Clone)]
struct Wire {
    directory: Directory,
    caller: Option<Life>,
    to: To,
    world: World,
}

impl tower::Service<Request<Body>> for Wire {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let wire = self.clone();
        Box::pin(async move {
            wire.here().await;
            let limit = deadline(&request);
            let answered = tokio::time::timeout(limit, wire.carry(request)).await;
            wire.told();
            wire.here().await;
            Ok(answered.unwrap_or_else(|_| failed(Code::DeadlineExceeded, "it takes too long")))
        })
    }
}

fn failed(code: Code, why: &str) -> Response<Body> {
    Status::new(code, why).into_http()
}

/// As `grpc-timeout` says it.
fn deadline(request: &Request<Body>) -> Duration {
    let given = || {
        let text = request.headers().get("grpc-timeout")?.to_str().ok()?;
        let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let number: u64 = number.parse().ok()?;
        Some(match unit {
            "n" => Duration::from_nanos(number),
            "u" => Duration::from_micros(number),
            "m" => Duration::from_millis(number),
            _ => Duration::from_secs(number),
        })
    };
    given().unwrap_or(Duration::from_secs(600))
}

impl Wire {
    async fn here(&self) {
        if let Some(caller) = &self.caller {
            caller.here().await;
        }
    }

    /// What it asked for is done, and it may die before it does anything about it.
    fn told(&self) {
        let Some(caller) = &self.caller else { return };
        if self.world.extras().dies_answered && self.world.more().chance(self.world.faults().crash) {
            caller.kill("when an answer comes");
        }
    }

    async fn carry(&self, mut request: Request<Body>) -> Response<Body> {
        // As the layer of a real server does it.
        let name = self.caller.as_ref().map_or("somebody", |caller| caller.service.as_str());
        if let Some(caller) = &self.caller {
            caller.does(request.uri().path());
            let row = access::row(request.uri().path());
            assert!(
                row.is_some_and(|row| row.takes(caller.service.into())),
                "{name} may not call {}: the table of roles has it otherwise",
                request.uri().path()
            );
        }
        request.extensions_mut().insert(Caller::local(name, 0));
        let faults = self.world.faults();
        self.world.slowly().await;
        let Some((life, mut server)) = self.directory.find(&self.to, &self.world) else {
            return failed(Code::Unavailable, "nobody is there");
        };
        if self.world.chance(faults.call_lost) {
            return failed(Code::Unavailable, "the connection broke");
        }
        let answer = async {
            life.here().await;
            let answer = match server.ready().await {
                Ok(server) => server.call(request).await.unwrap_or_else(|never| match never {}),
                Err(never) => match never {},
            };
            // It answers only where it still is.
            life.here().await;
            answer
        };
        let answer = tokio::select! {
            biased;
            () = life.died() => failed(Code::Unavailable, "it died"),
            answer = answer => answer,
        };
        if self.world.chance(faults.answer_lost) {
            return failed(Code::Unavailable, "the answer is lost");
        }
        answer.map(|body| self.relay(body, life))
    }

    /// Frame by frame, for as long as both ends are there.
    fn relay(&self, mut body: Body, life: Life) -> Body {
        if http_body_end(&body) {
            return body;
        }
        let (sender, receiver) = mpsc::channel(16);
        let wire = self.clone();
        tokio::spawn(async move {
            loop {
                let frame = tokio::select! {
                    biased;
                    () = sender.closed() => return,
                    () = life.died() => Some(Err(Status::unavailable("it died"))),
                    frame = body.frame() => frame,
                };
                let Some(frame) = frame else { return };
                let ended = frame.is_err();
                let both = async {
                    life.here().await;
                    wire.here().await;
                    // What a process is told of while it stands still comes after it went on, and after answers maybe.
                    wire.world.slowly().await;
                    wire.here().await;
                };
                let frame = tokio::select! {
                    biased;
                    () = both => frame,
                    () = life.died() => Err(Status::unavailable("it died")),
                    () = tokio::time::sleep(ALIVE) => Err(Status::unavailable("it does not answer")),
                };
                let ended = ended || frame.is_err();
                if sender.send(frame).await.is_err() || ended {
                    return;
                }
            }
        });
        Body::new(StreamBody::new(ReceiverStream::new(receiver)))
    }
}

fn http_body_end(body: &Body) -> bool {
    use tonic::codegen::Body as _;
    body.is_end_stream()
}
