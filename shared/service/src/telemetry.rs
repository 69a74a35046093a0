//! Logs as JSON lines on standard error, each with its trace; spans to an OTLP collector where one is configured.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::OnceLock;
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::event::Service;
use opentelemetry::KeyValue;
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use serde_json::{Map, Value};
use tracing::dispatcher::WeakDispatch;
use tracing::field::{Field, Visit};
use tracing::{Dispatch, Event, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer};

use crate::config::Site;

/// Bound on handing in the last spans at the end.
const FLUSH: Duration = Duration::from_secs(2);
/// What libraries tell of each frame and packet is not for a service's log.
const QUIET: [&str; 7] = ["h2", "hyper", "hyper_util", "tonic", "tower", "async_nats", "opentelemetry"];

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the log filter `{filter}` is none: {reason}")]
    Filter { filter: String, reason: String },
    #[error("can't export traces to {endpoint}: {reason}")]
    Exporter { endpoint: String, reason: String },
    #[error("telemetry was set up before")]
    Twice,
}

/// Hands in the last spans when it is dropped.
#[derive(Debug)]
pub struct Guard {
    provider: SdkTracerProvider,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = self.provider.shutdown_with_timeout(FLUSH) {
            tracing::debug!(%error, "could not hand in the last spans");
        }
    }
}

/// Sets up logs and traces of a service.
///
/// # Errors
/// Where the filter or the endpoint is wrong, or it was done before.
pub fn init(service: Service, site: &Site) -> Result<Guard, Error> {
    let attributes = [
        KeyValue::new("service.namespace", "kiln"),
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("kiln.site", site.name.to_string()),
    ];
    let resource =
        Resource::builder().with_service_name(format!("kiln-{service}")).with_attributes(attributes).build();
    // Without an exporter as well: the trace ids tie logs, documents and events together.
    let mut provider = SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::AlwaysOn)))
        .with_resource(resource);
    if let Some(endpoint) = &site.otlp {
        let exporter = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build();
        let exporter = exporter
            .map_err(|error| Error::Exporter { endpoint: endpoint.clone(), reason: error.to_string() })?;
        provider = provider.with_batch_exporter(exporter);
    }
    let provider = provider.build();
    opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
    opentelemetry::global::set_tracer_provider(provider.clone());
    let quiet: String = QUIET.iter().fold(String::new(), |mut text, library| {
        // Writing to a String can't fail.
        let _ = write!(text, "{library}=warn,");
        text
    });
    let filter = EnvFilter::builder()
        .parse(format!("{quiet}{}", site.log))
        .map_err(|error| Error::Filter { filter: site.log.clone(), reason: error.to_string() })?;
    tracing_subscriber::registry()
        .with(filter)
        .with(tracing_opentelemetry::layer().with_tracer(provider.tracer("kiln")))
        .with(JsonLines { service, dispatch: OnceLock::new() })
        .try_init()
        .map_err(|_| Error::Twice)?;
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "a task panicked")));
    Ok(Guard { provider })
}

/// `{"time":…,"level":…,"service":…,"target":…,"message":…,"trace_id":…,"span_id":…, fields…}`
struct JsonLines {
    service: Service,
    dispatch: OnceLock<WeakDispatch>,
}

impl JsonLines {
    fn line<S>(&self, event: &Event<'_>, context: &Context<'_, S>) -> Value
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let mut fields = Fields(Map::new());
        event.record(&mut fields);
        let Fields(mut line) = fields;
        let metadata = event.metadata();
        line.insert("time".to_owned(), Timestamp::now().to_string().into());
        line.insert("level".to_owned(), metadata.level().as_str().into());
        line.insert("service".to_owned(), self.service.as_str().into());
        line.insert("target".to_owned(), metadata.target().into());
        let dispatch = self.dispatch.get().and_then(WeakDispatch::upgrade);
        if let (Some(span), Some(dispatch)) = (context.event_span(event), dispatch)
            && let Some(context) = tracing_opentelemetry::get_otel_context(&span.id(), &dispatch)
        {
            let span = context.span().span_context().clone();
            line.insert("trace_id".to_owned(), span.trace_id().to_string().into());
            line.insert("span_id".to_owned(), span.span_id().to_string().into());
        }
        Value::Object(line)
    }
}

impl<S> Layer<S> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_register_dispatch(&self, dispatch: &Dispatch) {
        let _ = self.dispatch.set(dispatch.downgrade());
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut line = self.line(event, &context).to_string();
        line.push('\n');
        // One write for each line, so that lines of several threads don't mix. With standard error gone there is
        // nowhere to complain.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

struct Fields(Map<String, Value>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name().to_owned(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name().to_owned(), value.into());
    }
}
