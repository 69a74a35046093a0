//! What the deployer counts.

use std::sync::LazyLock;
use std::time::Duration;

use kiln_deployer_core::Event;
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts};

/// What happened to rollouts: `started`, `succeeded`, `rolled_back` and so on.
const ROLLOUTS: &str = "kiln_deployer_rollouts_total";
/// What happened to instances.
const INSTANCES: &str = "kiln_deployer_instances_total";
/// Time that an effect took, by what it was and whether it worked.
const EFFECT_SECONDS: &str = "kiln_deployer_effect_seconds";

struct Metrics {
    rollouts: IntCounterVec,
    instances: IntCounterVec,
    effect_seconds: HistogramVec,
}

static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| match Metrics::build() {
    Ok(metrics) => Some(metrics),
    Err(error) => {
        tracing::error!(%error, "the deployer counts nothing");
        None
    }
});

impl Metrics {
    fn build() -> Result<Self, prometheus::Error> {
        let rollouts = IntCounterVec::new(Opts::new(ROLLOUTS, "What happened to rollouts."), &["what"])?;
        let instances = IntCounterVec::new(Opts::new(INSTANCES, "What happened to instances."), &["what"])?;
        // From a flip of the edge to a drain of minutes.
        let buckets = vec![0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0];
        let effect_seconds = HistogramVec::new(
            HistogramOpts::new(EFFECT_SECONDS, "Time that an effect took.").buckets(buckets),
            &["effect", "worked"],
        )?;
        if let Some(registry) = kiln_service::metrics::registry() {
            registry.register(Box::new(rollouts.clone()))?;
            registry.register(Box::new(instances.clone()))?;
            registry.register(Box::new(effect_seconds.clone()))?;
        }
        Ok(Self { rollouts, instances, effect_seconds })
    }
}

/// What was committed.
pub(crate) fn happened(events: &[Event]) {
    let Some(metrics) = METRICS.as_ref() else { return };
    for event in events {
        match event {
            Event::Rollout(verb, _) => metrics.rollouts.with_label_values(&[verb.as_str()]).inc(),
            Event::Instance(verb, _, _) => metrics.instances.with_label_values(&[verb.as_str()]).inc(),
            Event::Release(_) => {}
        }
    }
}

pub(crate) fn carried_out(effect: &str, worked: bool, took: Duration) {
    if let Some(metrics) = METRICS.as_ref() {
        let worked = if worked { "true" } else { "false" };
        metrics.effect_seconds.with_label_values(&[effect, worked]).observe(took.as_secs_f64());
    }
}
