use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use kiln_api::monitor::{ApproveSignalRequest, ListHealthRequest, ListSignalsRequest, WatchHealthRequest};
use kiln_service::server::ServerOptions;
use kiln_service::{client, error};
use kiln_store::Store as _;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_types::StatusExt as _;

use crate::monitor::{Client, Running, options, report};

const LONG: Duration = Duration::from_secs(30);

async fn health(running: &Running, service: &str) -> HealthCheckResponse {
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(client::channel(&running.socket())).check(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn a_call_is_answered_once_and_errors_carry_details() {
    let running = Running::start().await;
    let mut client = running.client();
    for _ in 0..2 {
        let answer = client.report_signal(report("r1")).await.unwrap().into_inner();
        assert_eq!(answer.signal.unwrap().id, "s1");
    }
    assert_eq!(running.store.unsent(10).await.unwrap().len(), 1);

    let status = client.report_signal(report("no id")).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(status.get_error_details().bad_request().unwrap().field_violations[0].field, "request_id");
    let request = ApproveSignalRequest { id: "s9".to_owned(), ..ApproveSignalRequest::default() };
    let status = client.approve_signal(request).await.unwrap_err();
    assert_eq!(status.get_details_resource_info().unwrap().resource_name, "s9");
    assert_eq!(error::describe(&status), "there is no signal `s9`");
    running.stop().await;
}

#[tokio::test]
async fn the_socket_is_private_and_a_dead_one_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let options = options(folder.path());
    // As a killed service leaves it.
    drop(std::os::unix::net::UnixListener::bind(&options.socket).unwrap());
    let running = Running::start_with(folder, options).await;
    let mode = std::fs::metadata(running.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    running.client().list_health(ListHealthRequest::default()).await.unwrap();
    let socket = running.socket();
    let _folder = running.stop().await;
    assert!(!socket.exists());
}

#[tokio::test]
async fn health_says_what_the_service_says() {
    let folder = tempfile::tempdir().unwrap();
    let (ready, is_ready) = watch::channel(true);
    let options = ServerOptions { ready: Some(is_ready), ..options(folder.path()) };
    let running = Running::start_with(folder, options).await;
    let name = "kiln.monitor.v1.MonitorService";
    let wait_for = async |wanted: ServingStatus| {
        let begin = Instant::now();
        while health(&running, name).await.status() != wanted {
            assert!(begin.elapsed() < LONG, "never {wanted:?}");
        }
        assert_eq!(health(&running, "").await.status(), wanted);
    };
    wait_for(ServingStatus::Serving).await;
    ready.send_replace(false);
    wait_for(ServingStatus::NotServing).await;
    ready.send_replace(true);
    wait_for(ServingStatus::Serving).await;
    running.stop().await;
}

#[tokio::test]
async fn reflection_names_the_services() {
    let running = Running::start().await;
    let message = Some(MessageRequest::ListServices(String::new()));
    let request = ServerReflectionRequest { host: String::new(), message_request: message };
    let mut client = ServerReflectionClient::new(client::channel(&running.socket()));
    let answers = client.server_reflection_info(futures::stream::iter([request])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&"kiln.monitor.v1.MonitorService".to_owned()), "{names:?}");
    assert!(names.contains(&"grpc.health.v1.Health".to_owned()), "{names:?}");
    running.stop().await;
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused() {
    let running = Running::start().await;
    let mut request = report("r1");
    request.summary = "x".repeat(5 << 20);
    let status = running.client().report_signal(request).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert_eq!(running.store.unsent(10).await.unwrap().len(), 0);
    running.stop().await;
}

/// A call that would never end, and a stream: the server ends in time all the same, and they with its process.
#[test]
fn the_end_is_bounded_and_open_calls_are_told() {
    let (process, caller) = (Runtime::new().unwrap(), Runtime::new().unwrap());
    let running = process.block_on(Running::start());
    let (mut stream, call) = caller.block_on(async {
        let mut stream =
            running.client().watch_health(WatchHealthRequest::default()).await.unwrap().into_inner();
        assert!(stream.message().await.unwrap().is_some());
        let mut client = running.client();
        let call = tokio::spawn(async move { client.list_signals(ListSignalsRequest::default()).await });
        (stream, call)
    });
    let begin = Instant::now();
    let _folder = process.block_on(running.stop());
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    drop(process);
    caller.block_on(async {
        assert!(tokio::time::timeout(LONG, stream.message()).await.unwrap().is_err());
        assert!(tokio::time::timeout(LONG, call).await.unwrap().unwrap().is_err());
    });
}

#[tokio::test]
async fn a_client_finds_a_service_that_was_away() {
    let folder = tempfile::tempdir().unwrap();
    let channel = client::channel(&folder.path().join("monitor.sock"));
    let mut client = crate::monitor::Client::new(channel);
    let status = client.list_health(ListHealthRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(error::describe(&status).contains("can't be reached"), "{}", error::describe(&status));
    let options = options(folder.path());
    let running = Running::start_with(folder, options.clone()).await;
    client.list_health(ListHealthRequest::default()).await.unwrap();
    let folder = running.stop().await;
    assert!(client.list_health(ListHealthRequest::default()).await.is_err());
    let running = Running::start_with(folder, options).await;
    client.list_health(ListHealthRequest::default()).await.unwrap();
    running.stop().await;
}

#[tokio::test]
async fn a_peer_that_stands_still_is_found_out_soon_also_in_a_call_without_a_limit() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("still.sock");
    // Connections to it are made, and nobody is there to answer.
    let _still = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let mut client = Client::new(client::channel(&socket));
    let call = client.watch_health(WatchHealthRequest::default());
    let answer = tokio::time::timeout(Duration::from_secs(8), call).await;
    assert_eq!(answer.expect("it waits on").unwrap_err().code(), Code::Unavailable);
}
