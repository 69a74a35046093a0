//! The names of all metrics, and their registry.

use std::sync::LazyLock;
use std::time::Duration;

use kiln_model::event::EventType;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

/// Calls that a service answered, by method and gRPC status code.
const GRPC_CALLS: &str = "kiln_grpc_calls_total";
/// Time from a call's arrival to the end of its answer.
const GRPC_SECONDS: &str = "kiln_grpc_call_seconds";
/// Events that the relay published, by type.
const EVENTS_PUBLISHED: &str = "kiln_events_published_total";
/// Events that wait in the outbox, as the relay last saw it.
const OUTBOX_WAITING: &str = "kiln_outbox_waiting";

struct Metrics {
    registry: Registry,
    grpc_calls: IntCounterVec,
    grpc_seconds: HistogramVec,
    events_published: IntCounterVec,
    outbox_waiting: IntGauge,
}

/// None only where two metrics had one name, which the tests rule out.
static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| match Metrics::build() {
    Ok(metrics) => Some(metrics),
    Err(error) => {
        tracing::error!(%error, "there are no metrics");
        None
    }
});

impl Metrics {
    fn build() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let grpc_calls = IntCounterVec::new(Opts::new(GRPC_CALLS, "Calls answered."), &["method", "code"])?;
        // From a read out of memory to a plan that asks an archive.
        let buckets = vec![0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];
        let grpc_seconds = HistogramVec::new(
            HistogramOpts::new(GRPC_SECONDS, "Time to the end of the answer.").buckets(buckets),
            &["method"],
        )?;
        let events_published =
            IntCounterVec::new(Opts::new(EVENTS_PUBLISHED, "Events published."), &["type"])?;
        let outbox_waiting = IntGauge::new(OUTBOX_WAITING, "Events that wait in the outbox.")?;
        registry.register(Box::new(grpc_calls.clone()))?;
        registry.register(Box::new(grpc_seconds.clone()))?;
        registry.register(Box::new(events_published.clone()))?;
        registry.register(Box::new(outbox_waiting.clone()))?;
        Ok(Self { registry, grpc_calls, grpc_seconds, events_published, outbox_waiting })
    }
}

/// Where a service registers what it counts itself.
pub fn registry() -> Option<&'static Registry> {
    METRICS.as_ref().map(|metrics| &metrics.registry)
}

pub(crate) fn grpc_call(method: &str, code: tonic::Code, took: Duration) {
    if let Some(metrics) = METRICS.as_ref() {
        metrics.grpc_calls.with_label_values(&[method, &format!("{code:?}")]).inc();
        metrics.grpc_seconds.with_label_values(&[method]).observe(took.as_secs_f64());
    }
}

pub(crate) fn event_published(kind: &EventType) {
    if let Some(metrics) = METRICS.as_ref() {
        metrics.events_published.with_label_values(&[kind.ce_type()]).inc();
    }
}

pub(crate) fn outbox_waiting(count: usize) {
    if let Some(metrics) = METRICS.as_ref() {
        metrics.outbox_waiting.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}

/// All metrics in Prometheus' text format.
pub(crate) fn render() -> Result<String, prometheus::Error> {
    TextEncoder::new().encode_to_string(&registry().map(Registry::gather).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown() {
        grpc_call("/kiln.test/Call", tonic::Code::Ok, Duration::from_millis(2));
        outbox_waiting(3);
        let text = render().unwrap();
        assert!(text.contains("kiln_grpc_calls_total{code=\"Ok\",method=\"/kiln.test/Call\"} 1"), "{text}");
        assert!(text.contains("kiln_outbox_waiting"), "{text}");
    }
}
