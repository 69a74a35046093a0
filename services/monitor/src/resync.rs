//! State is the truth: what others have is listed at boot, and again and again, whatever events came or were lost.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_model::cause::CauseKind;
use kiln_model::signal::{Remedy, SignalId};
use kiln_service::clock::Clock;
use kiln_store::Store;

use crate::definitions::Definitions;
use crate::ports::{Builder, Deployer, Problem};
use crate::servers::Servers;
use crate::signals::Signals;
use crate::watcher::Watcher;

fn store(error: kiln_store::Error) -> Problem {
    Problem(format!("what was listed could not be written: {error}"))
}

/// Instances, from the deployer.
pub async fn instances<S: Store, C: Clock>(
    deployer: &dyn Deployer,
    watcher: &Watcher<S, C>,
) -> Result<(), Problem> {
    // What is told by an event while the list is under way may not be in it.
    let before = watcher.ids();
    let listing = deployer.instances().await?;
    watcher.tell_all(listing, &before).await.map_err(store)
}

/// Servers and sources, from the builder.
pub async fn builder<S: Store, C: Clock>(
    builder: &dyn Builder,
    servers: &Servers<S>,
    definitions: &Definitions<S, C>,
) -> Result<(), Problem> {
    // As above.
    let before = servers.seen();
    servers.take(builder.servers().await?, &before).await.map_err(store)?;
    definitions.take(builder.sources().await?);
    Ok(())
}

/// Reports whose answer was lost with its event: where a plan finds nothing to do, they are done.
#[derive(Debug, Clone, Default)]
pub struct Answers {
    /// How long each waits until it is asked for, doubling.
    asked: Arc<Mutex<HashMap<SignalId, Duration>>>,
}

impl Answers {
    /// # Errors
    /// Where the store can't be written. A plan that fails is asked for again later.
    pub async fn find<S: Store, C: Clock>(
        &self,
        builder: &dyn Builder,
        signals: &Signals<S, C>,
        now: jiff::Timestamp,
        period: Duration,
    ) -> Result<(), Problem> {
        let open = signals.live();
        let open: Vec<_> = open
            .iter()
            .filter(|r| r.signal.cause == CauseKind::Reported && r.signal.remedy == Remedy::Rebuild)
            .collect();
        self.asked().retain(|id, _| open.iter().any(|record| record.signal.id == *id));
        for record in open {
            let signal = &record.signal;
            let age = Duration::try_from(now.duration_since(signal.raised)).unwrap_or_default();
            let wait = self.asked().get(&signal.id).copied().unwrap_or(period * 2);
            if age < wait {
                continue;
            }
            self.asked().insert(signal.id, age * 2);
            match builder.plan(&signal.server).await {
                Ok(plan) if !plan.needs_build && !plan.needs_revision => {
                    signals.settle(|other| other.signal.id == signal.id).await.map_err(store)?;
                }
                Ok(_) => {}
                Err(problem) => {
                    tracing::debug!(server = %signal.server, %problem, "a report waits for its answer")
                }
            }
        }
        Ok(())
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, HashMap<SignalId, Duration>> {
        // No code that can panic runs under the lock.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
