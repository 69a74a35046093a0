//! The loop: load a fleet, decide, commit, act, and learn of the results. One for each server, woken by facts, and
//! ticking only while something is due.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_deployer_core::{Decision, next};
use kiln_model::name::{NodeName, ServerName};
use kiln_service::clock::Clock;
use kiln_service::members::Members;
use kiln_service::shutdown::requested;
use kiln_store::{Error, Store};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::board::Board;
use crate::effects::{Hands, Peers};
use crate::metrics;
use crate::store::{Loaded, Outcome, batch, load};
use crate::watch::list_node;

/// A fleet is committed so often within so long at most; what comes meanwhile shares the next commit. It is often enough
/// for all that happens.
const BURST: u32 = 32;
const BURST_WITHIN: Duration = Duration::from_millis(100);
/// Writes of others within the same time after which this one rests: a call or a revision is one, and two that take the
/// fleet for theirs for a moment and know different things would answer each other without an end.
const OTHERS: u32 = 4;

/// After a failure of the store.
const RETRY: Duration = Duration::from_secs(1);

/// What all loops share. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Deployer<S, C> {
    pub(crate) store: S,
    pub(crate) clock: C,
    pub(crate) peers: Peers,
    pub(crate) board: Board,
    /// Those that share the fleets.
    pub(crate) members: Members,
    /// When this process began to listen to the others.
    started: Duration,
    loops: Arc<Mutex<Loops>>,
    stop: watch::Receiver<bool>,
}

#[derive(Default)]
struct Loops {
    known: HashMap<ServerName, tokio::task::AbortHandle>,
    tasks: JoinSet<()>,
}

impl<S: Store, C: Clock> Deployer<S, C> {
    pub(crate) fn new(
        store: S,
        clock: C,
        members: Members,
        peers: Peers,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let started = clock.now().monotonic;
        Self { store, clock, peers, board: Board::default(), members, started, loops: Arc::default(), stop }
    }

    pub(crate) fn stop(&self) -> watch::Receiver<bool> {
        self.stop.clone()
    }

    /// Sees to it that a server's loop runs, and that it looks again.
    pub(crate) fn look_after(&self, server: &ServerName) {
        let mut loops = self.loops.lock().unwrap_or_else(PoisonError::into_inner);
        let runs = loops.known.get(server).is_some_and(|handle| !handle.is_finished());
        if !runs {
            let handle = loops.tasks.spawn(reconcile(self.clone(), server.clone()));
            loops.known.insert(server.clone(), handle);
        }
        drop(loops);
        self.board.wake(server);
    }
}

/// One server's loop, until it is time to stop.
async fn reconcile<S: Store, C: Clock>(deployer: Deployer<S, C>, server: ServerName) {
    let waker = deployer.board.waker(&server);
    let mut stop = deployer.stop();
    let mut hands =
        Hands::new(server.clone(), deployer.peers.clone(), deployer.board.clone(), deployer.clock.clone());
    let mut desk = Desk {
        deployer: &deployer,
        server: &server,
        held: None,
        committed: Duration::ZERO,
        burst: Burst::default(),
    };
    while !*stop.borrow() {
        let wake_in = match desk.look(&mut hands).await {
            Ok(Looked::Again) => continue,
            Ok(Looked::Rest(wake_in)) => wake_in,
            Err(error) => {
                tracing::warn!(%server, %error, "a fleet could not be seen to");
                desk.held = None;
                Some(RETRY)
            }
        };
        let timer = async {
            match wake_in {
                Some(wait) => deployer.clock.sleep(wait).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            () = hands.ended() => {}
            () = waker.notified() => {}
            () = timer => {}
        }
    }
}

/// Nodes that a decision on the fleet is about.
pub(crate) fn nodes_needed(loaded: &Loaded) -> BTreeSet<NodeName> {
    let target = loaded.releases.get(&loaded.fleet.target()).filter(|_| !loaded.fleet.removed);
    let target = target.map(|release| release.revision.run.node());
    loaded.fleet.nodes().into_iter().cloned().chain(target).collect()
}

enum Looked {
    /// Something was committed: what follows from it is decided at once.
    Again,
    Rest(Option<Duration>),
}

/// The fleet as it was last seen.
struct Desk<'a, S, C> {
    deployer: &'a Deployer<S, C>,
    server: &'a ServerName,
    held: Option<Loaded>,
    /// When it was last committed, by whomever.
    committed: Duration,
    burst: Burst,
}

#[derive(Debug, Default)]
struct Burst {
    /// When counting began.
    since: Duration,
    commits: u32,
    /// Of others, as far as they were noticed.
    others: u32,
}

impl<S: Store, C: Clock> Desk<'_, S, C> {
    async fn look(&mut self, hands: &mut Hands<C>) -> Result<Looked, Error> {
        if !self.deployer.members.is_mine(self.server.as_str(), self.deployer.clock.now().monotonic) {
            // What was seen of it is no measure of time any more when it comes back.
            self.held = None;
            return Ok(Looked::Rest(None));
        }
        if let Some(rest) = self.rest() {
            return Ok(Looked::Rest(Some(rest)));
        }
        let loaded = self.fresh().await?;
        if loaded.version == 0 {
            // Not a server of ours (yet): what runs under its name is not ours to judge.
            return Ok(Looked::Rest(None));
        }
        if let Some(node) = self.deployer.board.behind(&loaded.fleet, self.committed)
            && let Err(problem) = list_node(self.deployer, &node).await
        {
            tracing::warn!(server = %self.server, %node, %problem, "the node could not be asked");
            return Ok(Looked::Rest(Some(RETRY)));
        }
        let now = self.deployer.clock.now();
        let elapsed = now.monotonic.saturating_sub(self.committed);
        let nodes = nodes_needed(&loaded);
        let view = self.deployer.board.view(self.server, &nodes, now, self.deployer.started, elapsed);
        let decision = next(&loaded.fleet, &loaded.releases, &view, now);
        let changed = decision.fleet != loaded.fleet;
        if changed && !self.commit(&loaded, &decision, now).await? {
            return Ok(Looked::Again);
        }
        self.deployer.board.prune(&decision.fleet);
        let Decision { effects, wake_in, fleet, .. } = decision;
        let retry_in = hands.begin(effects, fleet.generation);
        Ok(if changed { Looked::Again } else { Looked::Rest(wake_in.into_iter().chain(retry_in).min()) })
    }

    /// How long nothing is committed, after too much of it.
    fn rest(&mut self) -> Option<Duration> {
        let now = self.deployer.clock.now().monotonic;
        let Burst { since, commits, others } = self.burst;
        let over = now.saturating_sub(since);
        if over >= BURST_WITHIN {
            self.burst = Burst { since: now, ..Burst::default() };
            return None;
        }
        (commits >= BURST || others >= OTHERS).then(|| BURST_WITHIN - over)
    }

    /// The fleet as it is stored. What was read before is used again where nobody wrote since: each write of what
    /// belongs to a fleet writes the fleet too.
    async fn fresh(&mut self) -> Result<Loaded, Error> {
        let document = self.deployer.store.get(crate::record::FLEET, self.server.as_str()).await?;
        let version = document.map_or(0, |document| document.version);
        match self.held.take() {
            Some(held) if held.version == version => {
                self.held = Some(held.clone());
                return Ok(held);
            }
            Some(_) => self.burst.others += 1,
            None => {}
        }
        let loaded = load(&self.deployer.store, self.server).await?;
        self.committed = self.deployer.clock.now().monotonic;
        self.held = Some(loaded.clone());
        Ok(loaded)
    }

    /// False where somebody else wrote in between.
    async fn commit(
        &mut self,
        loaded: &Loaded,
        decision: &Decision,
        now: kiln_model::time::Now,
    ) -> Result<bool, Error> {
        let outcome = Outcome {
            fleet: &decision.fleet,
            releases: &decision.releases,
            events: &decision.events,
            now: now.wall,
        };
        let batch = batch(&self.deployer.store, loaded, &outcome).await?;
        self.burst.commits += 1;
        match self.deployer.store.commit(batch).await {
            Ok(_) => metrics::happened(&decision.events),
            Err(Error::Conflict { .. }) => {
                self.held = None;
                self.burst.others += 1;
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        let mut releases = loaded.releases.clone();
        releases.extend(decision.releases.iter().map(|release| (release.number, release.clone())));
        self.held = Some(Loaded { fleet: decision.fleet.clone(), version: loaded.version + 1, releases });
        self.committed = now.monotonic;
        Ok(true)
    }
}
