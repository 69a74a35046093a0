//! The names of the node's own metrics.

use std::sync::LazyLock;
use std::time::Duration;

use kiln_service::metrics::registry;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntGaugeVec, Opts};

use crate::record::{Record, State};

/// Instances that the node has a record of, by state.
const INSTANCES: &str = "kiln_node_instances";
/// From the request to the start of the instance's program.
const LAUNCH_SECONDS: &str = "kiln_node_launch_seconds";
/// Instances that ended by themselves.
const ENDED: &str = "kiln_node_ended_total";
/// Transactions that changed the edge.
const FLIPS: &str = "kiln_node_edge_changes_total";

struct Metrics {
    instances: IntGaugeVec,
    launch_seconds: Histogram,
    ended: IntCounter,
    flips: IntCounter,
}

static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| {
    Metrics::build().inspect_err(|error| tracing::error!(%error, "the node's own metrics are missing")).ok()
});

impl Metrics {
    fn build() -> Result<Self, prometheus::Error> {
        let instances = IntGaugeVec::new(Opts::new(INSTANCES, "Instances by state."), &["state"])?;
        let buckets = vec![0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.0, 5.0];
        let launch_seconds =
            Histogram::with_opts(HistogramOpts::new(LAUNCH_SECONDS, "Time of a launch.").buckets(buckets))?;
        let ended = IntCounter::new(ENDED, "Instances that ended by themselves.")?;
        let flips = IntCounter::new(FLIPS, "Changes of the edge.")?;
        if let Some(registry) = registry() {
            registry.register(Box::new(instances.clone()))?;
            registry.register(Box::new(launch_seconds.clone()))?;
            registry.register(Box::new(ended.clone()))?;
            registry.register(Box::new(flips.clone()))?;
        }
        Ok(Self { instances, launch_seconds, ended, flips })
    }
}

pub(crate) fn launched(took: Duration) {
    if let Some(metrics) = METRICS.as_ref() {
        metrics.launch_seconds.observe(took.as_secs_f64());
    }
}

pub(crate) fn ended() {
    if let Some(metrics) = METRICS.as_ref() {
        metrics.ended.inc();
    }
}

pub(crate) fn flipped() {
    if let Some(metrics) = METRICS.as_ref() {
        metrics.flips.inc();
    }
}

/// An instance that had one record and now has another, or none.
pub(crate) fn moved(before: Option<&Record>, after: Option<&Record>) {
    let word = |record: &Record| State::word(&record.state);
    if let Some(metrics) = METRICS.as_ref() {
        for (record, step) in [(before, -1), (after, 1)] {
            if let Some(record) = record {
                metrics.instances.with_label_values(&[word(record)]).add(step);
            }
        }
    }
}
