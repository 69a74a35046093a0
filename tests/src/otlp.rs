//! A sink for traces: what an OpenTelemetry collector would be sent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use tonic::{Request, Response, Status};

use crate::Result;

/// One span, as far as the tests look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub service: String,
    pub name: String,
    pub trace: String,
    pub attributes: BTreeMap<String, String>,
}

#[derive(Clone, Default)]
struct Sink {
    spans: Arc<Mutex<Vec<Span>>>,
}

/// Listens on loopback until the process ends.
pub struct Collector {
    sink: Sink,
    address: SocketAddr,
}

impl Collector {
    /// # Errors
    /// Where no port can be had.
    pub async fn start() -> Result<Self> {
        let sink = Sink::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(sink.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        Ok(Self { sink, address })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What came in so far.
    pub fn spans(&self) -> Vec<Span> {
        self.sink.spans.lock().map(|spans| spans.clone()).unwrap_or_default()
    }
}

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> std::result::Result<Response<ExportTraceServiceResponse>, Status> {
        let text = |value: &opentelemetry_proto::tonic::common::v1::AnyValue| match &value.value {
            Some(opentelemetry_proto::tonic::common::v1::any_value::Value::StringValue(text)) => text.clone(),
            other => format!("{other:?}"),
        };
        let mut spans = self.spans.lock().map_err(|error| Status::internal(error.to_string()))?;
        for resource in request.into_inner().resource_spans {
            let service = resource
                .resource
                .iter()
                .flat_map(|resource| &resource.attributes)
                .find(|attribute| attribute.key == "service.name")
                .and_then(|attribute| attribute.value.as_ref())
                .map(text)
                .unwrap_or_default();
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                let attributes = span.attributes.iter();
                spans.push(Span {
                    service: service.clone(),
                    name: span.name,
                    trace: hex::encode(&span.trace_id),
                    attributes: attributes
                        .filter_map(|attribute| {
                            Some((attribute.key.clone(), text(attribute.value.as_ref()?)))
                        })
                        .collect(),
                });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
