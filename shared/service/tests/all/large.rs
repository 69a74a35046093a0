//! Messages that are larger than others may be: how large, and how many at once.

use std::convert::Infallible;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use kiln_api::builder::apply_request::Source;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::builder::builder_service_server::SERVICE_NAME;
use kiln_api::builder::{ApplyRequest, ApplyResponse, FolderSource};
use kiln_api::monitor::WatchHealthRequest;
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_service::access::Role;
use kiln_service::client;
use kiln_service::error::describe;
use kiln_service::server::{APPLY_LIMIT, Limits};
use tokio::task::JoinHandle;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService};
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::{Service, service_fn};

use crate::limits::{ELSEWHERE, LONG, by_hand, call_to, serves, until};
use crate::site::Site;

type Builder = BuilderServiceClient<client::Channel>;

/// Of a call that is never answered.
const NEVER: &str = "never";
/// More than what needs no place.
const OVER: usize = 6 << 20;

/// A builder that takes what is applied, and does nothing with it.
#[derive(Clone)]
pub(crate) struct Applies;

impl NamedService for Applies {
    const NAME: &'static str = SERVICE_NAME;
}

impl Service<http::Request<Body>> for Applies {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async {
            let codec = ProstCodec::<ApplyResponse, ApplyRequest>::default();
            let answer = service_fn(|request: Request<ApplyRequest>| async move {
                if request.get_ref().request_id == NEVER {
                    std::future::pending::<()>().await;
                }
                Ok::<_, Status>(Response::new(ApplyResponse::default()))
            });
            Ok(Grpc::new(codec).max_decoding_message_size(APPLY_LIMIT).unary(answer, request).await)
        })
    }
}

fn builder(site: &Site) -> Builder {
    BuilderServiceClient::new(site.channel(Some(&site.certificate(Role::Operator)), None))
}

async fn apply(client: &Builder, request_id: &str, bytes: usize) -> Result<(), Status> {
    let folder = FolderSource { archive: vec![0; bytes], origin: String::new() };
    let source = Some(Source::Folder(folder));
    let request = ApplyRequest { request_id: request_id.to_owned(), source };
    client.clone().apply(request).await.map(drop)
}

/// Waits until there is no place left, and says how that is told.
async fn full(client: &Builder) -> Status {
    let mut refused = None;
    until("a large message is refused", async || {
        refused = apply(client, "full", OVER).await.err();
        refused.is_some()
    })
    .await;
    refused.unwrap()
}

async fn has_a_place(client: &Builder) {
    until("a place is given back", async || apply(client, "place", OVER).await.is_ok()).await;
}

/// A call of which eight mebibytes are announced and five are sent.
struct Stuck {
    answer: ResponseFuture,
    _body: SendStream<Bytes>,
    _raw: SendRequest<Bytes>,
    _connection: JoinHandle<Result<(), h2::Error>>,
}

async fn stuck(site: &Site) -> Stuck {
    let operator = site.certificate(Role::Operator);
    let stream = site.tls(site.address, Some(&operator), b"h2", ELSEWHERE).await.unwrap();
    let (mut raw, connection) = by_hand(stream).await;
    let request = call_to("/kiln.builder.v1.BuilderService/Apply").body(()).unwrap();
    let (answer, mut body) = raw.send_request(request, false).unwrap();
    let mut bytes = vec![0, 0, 0x80, 0, 0];
    bytes.resize(5 << 20, 0);
    body.send_data(bytes.into(), false).unwrap();
    Stuck { answer, _body: body, _raw: raw, _connection: connection }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_large_messages_are_read_at_once_and_a_further_one_waits_a_little() {
    let limits = Limits { large: 2, large_wait: Duration::from_secs(1), ..Limits::default() };
    let site = Site::start_with(limits).await;
    let client = builder(&site);
    let (first, _second) = (stuck(&site).await, stuck(&site).await);
    let refused = full(&client).await;
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let text = describe(&refused);
    assert!(text.contains("2 messages of more than 4194304 bytes are worked on already"), "{text}");
    assert!(text.contains("none was done within 1s") && text.ends_with("; try again"), "{text}");
    // What others may send too needs no place.
    apply(&client, "small", 1 << 20).await.unwrap();
    serves(&site.as_role(Role::Viewer)).await;
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { apply(&client, "waits", OVER).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(first);
    waiting.await.unwrap().unwrap();
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_message_that_is_sent_slowly_gives_its_place_up_at_the_bound_of_its_call() {
    let (large_wait, call) = (Duration::from_millis(500), Duration::from_secs(4));
    let site = Site::start_with(Limits { large: 1, large_wait, call, ..Limits::default() }).await;
    let client = builder(&site);
    let slow = stuck(&site).await;
    full(&client).await;
    has_a_place(&client).await;
    let answer = tokio::time::timeout(LONG, slow.answer).await.expect("it goes on").unwrap();
    assert_eq!(answer.headers()["grpc-status"], "1", "{answer:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_message_has_its_place_until_its_call_is_answered_or_taken_back() {
    let large_wait = Duration::from_millis(500);
    let site = Site::start_with(Limits { large: 1, large_wait, ..Limits::default() }).await;
    let client = builder(&site);
    let unanswered = tokio::spawn({
        let client = builder(&site);
        async move { apply(&client, NEVER, OVER).await }
    });
    assert_eq!(full(&client).await.code(), Code::ResourceExhausted);
    assert!(!unanswered.is_finished(), "{:?}", unanswered.await);
    unanswered.abort();
    has_a_place(&client).await;
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_over_the_limit_is_refused_and_its_connection_goes_on() {
    let site = Site::start().await;
    let channel = site.channel(Some(&site.certificate(Role::Operator)), None);
    let mut monitor = MonitorServiceClient::new(channel.clone());
    let client = BuilderServiceClient::new(channel);
    let mut stream = monitor.watch_health(WatchHealthRequest::default()).await.unwrap().into_inner();
    stream.message().await.unwrap().expect("its first answer");
    apply(&client, "fits", APPLY_LIMIT - 1024).await.unwrap();
    let refused = apply(&client, "large", APPLY_LIMIT).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    assert!(refused.message().contains(&format!("the limit is: {APPLY_LIMIT} bytes")), "{refused}");
    serves(&monitor).await;
    let next = tokio::time::timeout(Duration::from_millis(300), stream.message()).await;
    assert!(next.is_err(), "the stream has ended: {next:?}");
    site.stop().await;
}
