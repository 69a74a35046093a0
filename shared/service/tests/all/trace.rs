//! One trace, from a caller over gRPC, the outbox and the bus to whoever handles the event, as a collector sees it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_bus::{Bus as _, Handled, Handler, Interest, MemoryBus};
use kiln_model::event::{Event, Service};
use kiln_service::config::SiteFile;
use kiln_service::{relay, telemetry, trace};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use crate::monitor::{Running, report};

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().unwrap();
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let name = attributes.iter().find(|attribute| attribute.key == "service.name").unwrap();
            let name = format!("{:?}", name.value);
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                spans.push((name.clone(), span));
            }
        }
        Ok(Response::new(Default::default()))
    }
}

struct Handles(mpsc::UnboundedSender<()>);

#[async_trait::async_trait]
impl Handler for Handles {
    async fn handle(&self, event: &Event, _: u64) -> Handled {
        let span = trace::span_under(&event.event.traceparent, "handle the event");
        async { tracing::info!("handled") }.instrument(span).await;
        self.0.send(()).unwrap();
        Handled::Done
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_crosses_call_outbox_and_bus() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let sink = Sink::default();
    let collector = tonic::transport::Server::builder().add_service(TraceServiceServer::new(sink.clone()));
    tokio::spawn(collector.serve_with_incoming(TcpListenerStream::new(listener)));

    let home = tempfile::tempdir().unwrap();
    let file = format!(
        "name = \"home\"\nid = \"0a1b2c3d\"\nsubnet = \"10.77.3.0/24\"\nbridge = \"kiln-0a1b2c\"\n\
         [nats]\nurl = \"nats://127.0.0.1:4222\"\n[otlp]\nendpoint = \"{endpoint}\"\n"
    );
    let site = toml::from_str::<SiteFile>(&file).unwrap().check(home.path()).unwrap();
    let telemetry = telemetry::init(Service::Monitor, &site).unwrap();
    assert!(matches!(telemetry::init(Service::Monitor, &site), Err(telemetry::Error::Twice)));

    let running = Running::start().await;
    let bus = MemoryBus::new("home".parse().unwrap());
    let (stop, stopped) = watch::channel(false);
    let (handled, mut done) = mpsc::unbounded_channel();
    let relay = tokio::spawn(relay::run(running.store.clone(), bus.clone(), stopped.clone()));
    let consumer = tokio::spawn(async move {
        let interests = [Interest { service: Service::Monitor, entity: "*" }];
        bus.consume("builder", &interests, Arc::new(Handles(handled)), stopped).await
    });

    let mut client = running.client();
    let root = trace::span_under("", "a commit");
    let traceparent = trace::of(&root);
    client.report_signal(report("r1")).instrument(root).await.unwrap();
    tokio::time::timeout(Duration::from_secs(30), done.recv()).await.unwrap().unwrap();
    stop.send_replace(true);
    relay.await.unwrap();
    consumer.await.unwrap().unwrap();
    running.stop().await;
    tokio::task::spawn_blocking(move || drop(telemetry)).await.unwrap();

    let spans = sink.0.lock().unwrap();
    let find = |name: &str| {
        let found: Vec<_> = spans.iter().filter(|(_, span)| span.name == name).collect();
        assert_eq!(
            found.len(),
            1,
            "{name} among {:?}",
            spans.iter().map(|(_, span)| &span.name).collect::<Vec<_>>()
        );
        found[0]
    };
    let (service, root) = find("a commit");
    assert!(service.contains("kiln-monitor"), "{service}");
    let (_, call) = find("kiln.monitor.v1.MonitorService/ReportSignal");
    let (_, handle) = find("handle the event");
    assert_eq!((&call.trace_id, &handle.trace_id), (&root.trace_id, &root.trace_id));
    assert_eq!(call.parent_span_id, root.span_id);
    assert_eq!(handle.parent_span_id, call.span_id);
    let hex: String = root.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(traceparent.contains(&hex), "{traceparent}");
}
