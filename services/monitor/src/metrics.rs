//! What the monitor counts.

use std::sync::LazyLock;
use std::time::Duration;

use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};

/// Looks at instances that had an answer, by whether it passed.
const LOOK_SECONDS: &str = "kiln_monitor_look_seconds";
/// Looks at Git repositories and archives, by kind and outcome.
const POLLS: &str = "kiln_monitor_polls_total";

struct Metrics {
    look_seconds: HistogramVec,
    polls: IntCounterVec,
}

static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| match Metrics::build() {
    Ok(metrics) => Some(metrics),
    Err(error) => {
        tracing::error!(%error, "the monitor counts nothing");
        None
    }
});

impl Metrics {
    fn build() -> Result<Self, prometheus::Error> {
        // From an answer on the same machine to the longest sensible timeout.
        let buckets = vec![0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];
        let look_seconds = HistogramVec::new(
            HistogramOpts::new(LOOK_SECONDS, "Time that an instance took to answer.").buckets(buckets),
            &["passed"],
        )?;
        let polls = IntCounterVec::new(
            Opts::new(POLLS, "Looks at repositories and archives."),
            &["kind", "outcome"],
        )?;
        if let Some(registry) = kiln_service::metrics::registry() {
            registry.register(Box::new(look_seconds.clone()))?;
            registry.register(Box::new(polls.clone()))?;
        }
        Ok(Self { look_seconds, polls })
    }
}

pub(crate) fn looked(passed: bool, took: Duration) {
    if let Some(metrics) = METRICS.as_ref() {
        let passed = if passed { "true" } else { "false" };
        metrics.look_seconds.with_label_values(&[passed]).observe(took.as_secs_f64());
    }
}

pub(crate) fn polled(kind: &'static str, reached: bool) {
    if let Some(metrics) = METRICS.as_ref() {
        let outcome = if reached { "reached" } else { "failed" };
        metrics.polls.with_label_values(&[kind, outcome]).inc();
    }
}
