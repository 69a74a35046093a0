//! What the engine says of instances: an exit is known as soon as it happens, and its view counts only while it
//! answers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use kiln_api::engine::{Instance, InstanceState, WatchInstancesResponse};
use kiln_model::name::{InstanceId, NodeName};
use kiln_monitor_core::health::Fact;
use kiln_service::clock::Clock;
use kiln_service::shutdown;
use kiln_store::Store;
use tokio::sync::watch;

use crate::ports::{Engine, Problem};
use crate::watcher::Watcher;

/// Between two questions whether the engine still answers.
const PING: Duration = Duration::from_secs(1);

/// So long after its last answer the engine's view is no fact any more.
const FRESH: Duration = Duration::from_millis(2500);

const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Which instances run, as far as the engine said.
#[derive(Debug, Default)]
pub struct View {
    seen: Mutex<SeenByEngine>,
}

#[derive(Debug, Default)]
struct SeenByEngine {
    running: BTreeSet<InstanceId>,
    /// Monotonic time of the last answer; none while the view is not whole.
    confirmed: Option<Duration>,
}

impl View {
    /// Whether an instance runs; none where nobody knows.
    pub fn runs(&self, id: &InstanceId, now: Duration) -> Option<bool> {
        let seen = self.seen();
        let confirmed = seen.confirmed?;
        (now.saturating_sub(confirmed) <= FRESH).then(|| seen.running.contains(id))
    }

    fn note(&self, id: &InstanceId, runs: bool) {
        let mut seen = self.seen();
        if runs {
            seen.running.insert(id.clone());
        } else {
            seen.running.remove(id);
        }
    }

    fn confirm(&self, now: Duration) {
        self.seen().confirmed = Some(now);
    }

    fn lose(&self) {
        *self.seen() = SeenByEngine::default();
    }

    fn seen(&self) -> MutexGuard<'_, SeenByEngine> {
        // No code that can panic runs under the lock.
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One node's engine, and what it said.
#[derive(Clone)]
pub struct Followed {
    pub engine: Arc<dyn Engine>,
    pub view: Arc<View>,
    /// On this machine, where its instances answer: on another one they are looked at through it.
    pub is_here: bool,
}

/// The engines of a site, by the names of their nodes.
#[derive(Clone)]
pub struct Engines(Arc<BTreeMap<NodeName, Followed>>);

impl Engines {
    /// With each engine whether it is on this machine.
    pub fn new(engines: impl IntoIterator<Item = (NodeName, Arc<dyn Engine>, bool)>) -> Self {
        let followed = engines
            .into_iter()
            .map(|(name, engine, is_here)| (name, Followed { engine, view: Arc::default(), is_here }));
        Self(Arc::new(followed.collect()))
    }

    /// The node that every site has, on this machine, and no other.
    pub fn local(engine: Arc<dyn Engine>) -> Self {
        Self::new([(NodeName::local(), engine, true)])
    }

    pub(crate) fn of(&self, node: &NodeName) -> Option<&Followed> {
        self.0.get(node)
    }

    /// Follows each of them until told to stop.
    pub(crate) async fn follow<S: Store, C: Clock>(
        &self,
        watcher: &Watcher<S, C>,
        clock: &C,
        stop: &watch::Receiver<bool>,
    ) {
        let each = self.0.iter().map(|(node, followed)| follow(node, followed, watcher, clock, stop.clone()));
        futures::future::join_all(each).await;
    }
}

/// Follows an engine until told to stop, whenever it is there.
async fn follow<S: Store, C: Clock>(
    node: &NodeName,
    followed: &Followed,
    watcher: &Watcher<S, C>,
    clock: &C,
    mut stop: watch::Receiver<bool>,
) {
    let view = &followed.view;
    let mut pause = FIRST_PAUSE;
    let mut lost = false;
    while !*stop.borrow() {
        let problem = tokio::select! {
            biased;
            () = shutdown::requested(&mut stop) => return,
            problem = once(node, followed, watcher, clock, &mut pause) => problem,
        };
        view.lose();
        if lost {
            tracing::debug!(%node, %problem, "the engine is still away");
        } else {
            tracing::warn!(%node, %problem, "the engine is not watched for now");
        }
        lost = pause > FIRST_PAUSE;
        tokio::select! {
            biased;
            () = shutdown::requested(&mut stop) => return,
            () = clock.sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Follows one stream to its end, and says why it ended.
async fn once<S: Store, C: Clock>(
    node: &NodeName,
    followed: &Followed,
    watcher: &Watcher<S, C>,
    clock: &C,
    pause: &mut Duration,
) -> Problem {
    let Followed { engine, view, .. } = followed;
    let before = watcher.launched(node);
    let mut stream = match engine.watch().await {
        Ok(stream) => stream,
        Err(problem) => return problem,
    };
    let pings = async {
        loop {
            clock.sleep(PING).await;
            tokio::select! {
                biased;
                answer = engine.ping() => match answer {
                    Ok(()) => {
                        let now = clock.now().monotonic;
                        // Not before it was whole.
                        if view.seen().confirmed.is_some() {
                            view.confirm(now);
                        }
                    }
                    Err(problem) => return problem,
                },
                () = clock.sleep(FRESH) => return Problem("the engine does not answer".to_owned()),
            }
        }
    };
    tokio::pin!(pings);
    // Told until the view was whole for the first time; what follows are changes, which are no list.
    let mut there = Some(BTreeSet::<InstanceId>::new());
    loop {
        let message = tokio::select! {
            biased;
            message = stream.next() => message,
            problem = &mut pings => return problem,
        };
        let Some(WatchInstancesResponse { instance, synced }) = message else {
            return Problem("the engine ended its stream".to_owned());
        };
        if let Some(instance) = instance {
            let told = take(instance, view, watcher);
            if let Some(there) = &mut there {
                there.extend(told);
            }
        }
        if synced {
            view.confirm(clock.now().monotonic);
            *pause = FIRST_PAUSE;
            // Launched before the engine was asked, and the engine does not know them.
            if let Some(there) = there.take() {
                for id in before.difference(&there) {
                    watcher.learn(id, Fact::Absent, "is not known to the engine any more");
                }
            }
        }
    }
}

fn take<S: Store, C: Clock>(instance: Instance, view: &View, watcher: &Watcher<S, C>) -> Option<InstanceId> {
    let id: InstanceId = instance.spec.as_ref()?.id.parse().ok()?;
    let state = InstanceState::try_from(instance.state).unwrap_or(InstanceState::Unspecified);
    view.note(&id, state == InstanceState::Running);
    let detail = |what: String| match instance.detail.as_str() {
        "" => what,
        detail => format!("{what}: {detail}"),
    };
    match (state, instance.exit_code) {
        (InstanceState::Exited, Some(code)) => {
            watcher.learn(&id, Fact::Gone, &detail(format!("exited with status {code}")))
        }
        (InstanceState::Exited, None) => watcher.learn(&id, Fact::Gone, &detail("exited".to_owned())),
        // It never was there: the deployer launches another one, and nobody has to ask it to.
        (InstanceState::Failed, _) if instance.cut_off => watcher.leaves(&id),
        (InstanceState::Failed, _) => {
            watcher.learn(&id, Fact::Gone, &detail("could not be launched".to_owned()));
        }
        (InstanceState::Running, _) => watcher.learn(&id, Fact::Runs, ""),
        (InstanceState::Retiring | InstanceState::Retired, _) => watcher.leaves(&id),
        _ => {}
    }
    Some(id)
}
