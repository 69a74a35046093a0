//! How an instance is looked at: over the network, through its engine, or by what the engine says of it.

use std::time::Instant;

use async_trait::async_trait;
use kiln_model::check::{Check, CheckResult};
use kiln_probe::{Verdict, probe};
use kiln_service::clock::Clock;

use crate::engine::{Engines, Followed};
use crate::ports::{Eyes, Target};

pub struct Probes<C> {
    engines: Engines,
    clock: C,
}

impl<C: Clock> Probes<C> {
    pub fn new(engines: Engines, clock: C) -> Self {
        Self { engines, clock }
    }
}

#[async_trait]
impl<C: Clock> Eyes for Probes<C> {
    async fn look(&self, target: &Target) -> Option<CheckResult> {
        let started = Instant::now();
        let Some(Followed { engine, view, is_here }) = self.engines.of(&target.node) else {
            tracing::debug!(instance = %target.id, node = %target.node, "there is no such node in site.toml");
            return None;
        };
        let Some(policy) = &target.policy else {
            // That it does not run is told by its exit; until it is known to run, nothing is known.
            let runs = view.runs(&target.id, self.clock.now().monotonic)?;
            return runs.then(|| Verdict::passed("the engine says that it runs").since(started));
        };
        match &policy.check {
            check @ (Check::Http(_) | Check::Tcp(_)) if *is_here => {
                Some(probe(target.address, check, policy.timeout.as_duration()).await)
            }
            // That the engine can't be asked says nothing of the instance.
            check => match engine.check(&target.id, check, policy.timeout).await {
                Ok(result) => Some(result),
                Err(problem) => {
                    tracing::debug!(instance = %target.id, %problem, "an instance could not be checked");
                    None
                }
            },
        }
    }
}
