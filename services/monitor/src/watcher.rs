//! The instances that are watched: a task for each that looks, keeps what it saw, and says what changed.

mod tracked;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt, stream};
use kiln_api::convert::{Invalid, text};
use kiln_api::{deployer, monitor};
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_monitor_core::health::Fact;
use kiln_service::clock::Clock;
use kiln_service::members::Members;
use kiln_service::trace;
use kiln_store::{Batch, Change, Error, Store, Watermark};
use tokio::sync::{Semaphore, broadcast};
use tracing::Instrument;

use crate::documents::{self, HEALTH, Seen, Watched};
use crate::metrics;
use crate::ports::{Eyes, Listing};
use crate::signals::{Scope, Signals};

use tracked::{Facts, Tracked, read};
pub use tracked::{Told, health_of};

/// Looks under way at once. Each may hold a socket for its whole timeout.
const LOOKS: usize = 1024;

/// Changes that a slow listener may lag behind before it is given the whole state again.
const LAG: usize = 4096;

/// Instances of a list that are taken over at once.
const TOLD_AT_ONCE: usize = 64;

/// Without an address, on its way out, or gone: nothing is looked at until something wakes the task.
const IDLE: Duration = Duration::from_secs(3600);

/// A state that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// Names the deployer's instances among the watermarks.
const SOURCE: &str = "deployer.instance";

/// Cheap to clone; every clone is the same.
#[derive(Clone)]
pub struct Watcher<S, C> {
    store: S,
    clock: C,
    members: Members,
    eyes: Arc<dyn Eyes>,
    signals: Signals<S, C>,
    shared: Arc<Shared>,
}

struct Shared {
    tracked: Mutex<BTreeMap<InstanceId, Arc<Tracked>>>,
    told: broadcast::Sender<Told>,
    looks: Semaphore,
}

impl<S: Store, C: Clock> Watcher<S, C> {
    /// Goes on watching what was watched before.
    ///
    /// # Errors
    /// Where the store can't be read.
    pub async fn load(
        store: S,
        clock: C,
        members: Members,
        eyes: Arc<dyn Eyes>,
        signals: Signals<S, C>,
    ) -> Result<Self, Error> {
        let watched: Vec<(u64, Watched)> = documents::load(&store, HEALTH).await?;
        let shared = Shared {
            tracked: Mutex::default(),
            told: broadcast::Sender::new(LAG),
            looks: Semaphore::new(LOOKS),
        };
        let watcher = Self { store, clock, members, eyes, signals, shared: Arc::new(shared) };
        for (version, watched) in watched {
            watcher.resume(watched, version, Tracked::first_after_restart);
        }
        Ok(watcher)
    }

    /// Goes on with an instance that a process before this one, or beside it, began to watch.
    fn resume(&self, watched: Watched, version: u64, first: impl FnOnce(&Tracked) -> Duration) {
        let tracked = Arc::new(Tracked::resume(watched, version, self.clock.now()));
        {
            let mut all = self.tracked();
            if all.contains_key(&tracked.id) {
                return;
            }
            all.insert(tracked.id.clone(), tracked.clone());
        }
        let first = first(&tracked);
        self.attend(tracked, first);
    }

    /// Takes over what another replica wrote of an instance.
    pub fn adopt(&self, watched: Watched, version: u64) {
        let Some(tracked) = self.find(&watched.id) else {
            // It may have been launched just now.
            return self.resume(watched, version, |_| Duration::ZERO);
        };
        if tracked.adopt(watched, version, self.is_mine(&tracked.id), self.clock.now()) {
            tracked.wake.notify_one();
            self.tell_listeners(&tracked);
        }
    }

    /// Another replica was told that it is retired.
    pub fn adopt_end(&self, id: &InstanceId) {
        if let Some(tracked) = self.tracked().remove(id) {
            tracked.ended.cancel();
        }
    }

    /// Takes over an answer that another replica had from an instance that it looks at.
    ///
    /// # Errors
    /// Where it makes no sense.
    pub fn hear(&self, heard: monitor::Health) -> Result<(), Invalid> {
        let id: InstanceId = text("instance", &heard.instance)?;
        if let Some(tracked) = self.find(&id).filter(|_| !self.is_mine(&id))
            && tracked.hear(heard, self.clock.now())?
        {
            self.tell_listeners(&tracked);
        }
        Ok(())
    }

    /// Another replica came or went: looks at what is this one's to look at now.
    pub fn share_anew(&self) {
        let all: Vec<_> = self.tracked().values().cloned().collect();
        for tracked in all {
            if tracked.share(self.is_mine(&tracked.id)) {
                tracked.wake.notify_one();
            }
        }
    }

    /// Whether an instance is looked at here.
    pub fn is_mine(&self, id: &InstanceId) -> bool {
        self.members.is_alone() || self.members.is_mine(&id.to_string(), self.clock.now().monotonic)
    }

    fn tell_listeners(&self, tracked: &Tracked) {
        if self.shared.told.receiver_count() > 0 {
            // Nobody may listen any more by now.
            let _ = self.shared.told.send(Told::new(tracked.message(self.clock.now())));
        }
    }

    /// Each change and each answer from now on.
    pub fn listen(&self) -> broadcast::Receiver<Told> {
        self.shared.told.subscribe()
    }

    /// The health of a server's instances, or of all, by id.
    pub fn health(&self, server: Option<&ServerName>) -> Vec<monitor::Health> {
        let tracked = self.tracked();
        let wanted =
            tracked.values().filter(|tracked| server.is_none_or(|server| tracked.id.server == *server));
        let mut wanted: Vec<&Arc<Tracked>> = wanted.collect();
        wanted.sort_by(|a, b| a.id.cmp(&b.id));
        wanted.into_iter().map(|tracked| tracked.message(self.clock.now())).collect()
    }

    /// The newest answers of one instance, which the store does not have.
    pub fn newest(&self, id: &InstanceId) -> Option<monitor::Health> {
        self.find(id).map(|tracked| tracked.message(self.clock.now()))
    }

    pub fn is_watched(&self, id: &InstanceId) -> bool {
        self.tracked().contains_key(id)
    }

    /// An instance as the deployer told of it in an event.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn tell(&self, epoch: &str, message: deployer::Instance) -> Result<(), Error> {
        let (id, version) = (message.id.clone(), message.version);
        match read(epoch, message, self.clock.now().wall) {
            Ok(facts) => self.take(facts).await,
            Err(invalid) => {
                tracing::warn!(instance = id, version, %invalid, "the deployer told of an instance that can't be read");
                Ok(())
            }
        }
    }

    /// All instances that the deployer has: what is not among them is retired.
    ///
    /// # Errors
    /// Where the store can't be written.
    pub async fn tell_all(
        &self,
        listing: Listing<deployer::Instance>,
        before: &BTreeSet<InstanceId>,
    ) -> Result<(), Error> {
        let there: BTreeSet<String> = listing.items.iter().map(|instance| instance.id.clone()).collect();
        // Many at a time share a commit of the store.
        let epoch = &listing.epoch;
        stream::iter(listing.items)
            .map(|instance| self.tell(epoch, instance))
            .buffer_unordered(TOLD_AT_ONCE)
            .try_collect::<()>()
            .await?;
        for id in before.iter().filter(|id| !there.contains(&id.to_string())) {
            self.forget(id, None).await?;
        }
        self.judge_all().await
    }

    /// Those that are watched now.
    pub fn ids(&self) -> BTreeSet<InstanceId> {
        self.tracked().keys().cloned().collect()
    }

    /// Those that were launched on a node, as far as the deployer told.
    pub fn launched(&self, node: &NodeName) -> BTreeSet<InstanceId> {
        let tracked = self.tracked();
        let targets = tracked.values().filter_map(|tracked| tracked.target());
        targets.filter(|(target, _)| target.node == *node).map(|(target, _)| target.id).collect()
    }

    /// What the engine says of an instance beside any check of it.
    pub fn learn(&self, id: &InstanceId, fact: Fact, detail: &str) {
        if let Some(tracked) = self.find(id)
            && tracked.learn(fact, detail, self.clock.now())
        {
            tracked.wake.notify_one();
        }
    }

    /// The engine lets an instance end: what it answers meanwhile says nothing.
    pub fn leaves(&self, id: &InstanceId) {
        if let Some(tracked) = self.find(id) {
            tracked.leave();
            tracked.wake.notify_one();
        }
    }

    async fn take(&self, facts: Facts) -> Result<(), Error> {
        let Some(tracked) = self.find(&facts.id) else { return self.begin(facts).await };
        if !facts.seen.is_newer_than(&tracked.seen()) {
            return Ok(());
        }
        if facts.retired {
            return self.forget(&facts.id, Some(&facts.seen)).await;
        }
        if tracked.update(facts, self.clock.now()) {
            tracked.wake.notify_one();
        }
        self.keep(&tracked).await
    }

    /// Watches one more instance.
    async fn begin(&self, facts: Facts) -> Result<(), Error> {
        if facts.retired {
            return Ok(());
        }
        if self.was_handled(&facts).await? {
            // By a process that stood still meanwhile, or shares the work: it is watched where it was not forgotten.
            if let Some((version, watched)) =
                documents::one(&self.store, HEALTH, &facts.id.to_string()).await?
            {
                self.resume(watched, version, Tracked::first_after_restart);
            }
            return Ok(());
        }
        let tracked = Arc::new(Tracked::new(facts, self.clock.now()));
        {
            let mut all = self.tracked();
            // An event and a list may tell of it at the same time. What the other did not know comes with the next list.
            if all.contains_key(&tracked.id) {
                return Ok(());
            }
            all.insert(tracked.id.clone(), tracked.clone());
        }
        // Looked at before it is written: a launch is seen as early as it can be.
        self.attend(tracked.clone(), Duration::ZERO);
        self.keep(&tracked).await
    }

    async fn was_handled(&self, facts: &Facts) -> Result<bool, Error> {
        let mark = watermark(&facts.id, &facts.seen);
        Ok(self.store.watermark(&mark.source_kind, &mark.source_id).await? >= mark.version)
    }

    /// It is retired: nothing of it is kept but that it was handled.
    async fn forget(&self, id: &InstanceId, seen: Option<&Seen>) -> Result<(), Error> {
        let Some(tracked) = self.find(id) else { return Ok(()) };
        let _writing = tracked.writing.lock().await;
        if tracked.ended.is_cancelled() {
            return Ok(());
        }
        let mut news = seen;
        loop {
            let (kind, expected) = (HEALTH.to_owned(), tracked.version());
            let delete = Change::Delete { kind, id: id.to_string(), expected };
            let mut batch = Batch { changes: vec![delete], ..Batch::default() };
            batch.watermarks.extend(news.map(|seen| watermark(id, seen)));
            match self.store.commit(batch).await {
                Ok(_) => break,
                Err(Error::Stale { .. }) => news = None,
                Err(Error::Conflict { .. }) => tracked.found(self.document_version(id).await?),
                Err(error) => return Err(error),
            }
        }
        // Its task ends, and nothing of it is written any more.
        tracked.ended.cancel();
        self.tracked().remove(id);
        self.signals.settle(|record| record.signal.instance.as_ref() == Some(id)).await
    }

    /// Looks at an instance until it is forgotten.
    fn attend(&self, tracked: Arc<Tracked>, first: Duration) {
        let watcher = self.clone();
        tokio::spawn(async move {
            let mut pause = first;
            loop {
                tokio::select! {
                    biased;
                    () = tracked.ended.cancelled() => return,
                    () = tracked.wake.notified() => {}
                    () = watcher.clock.sleep(pause) => {}
                }
                // On the heap, and only while it looks: thousands of tasks wait most of their time.
                pause = Box::pin(watcher.attend_once(&tracked)).await;
            }
        });
    }

    /// Writes what is not written, and looks; gives the pause until the next time.
    async fn attend_once(&self, tracked: &Arc<Tracked>) -> Duration {
        let written = self.keep(tracked).await;
        if let Err(error) = &written {
            tracing::warn!(instance = %tracked.id, %error, "the health of an instance could not be written");
        }
        let mine = self.is_mine(&tracked.id);
        tracked.share(mine);
        let Some((target, interval)) = tracked.target().filter(|_| mine) else {
            return if written.is_ok() { IDLE } else { RETRY };
        };
        let look = async {
            // Never closed.
            let _permit = self.shared.looks.acquire().await;
            self.eyes.look(&target).await
        };
        let result = tokio::select! {
            biased;
            () = tracked.ended.cancelled() => return IDLE,
            // It is gone, leaves, or is elsewhere: what would be answered counts no more.
            () = tracked.wake.notified() => return Duration::ZERO,
            result = look => result,
        };
        let now = self.clock.now();
        let Some(result) = result else { return tracked.gap(now.monotonic) };
        metrics::looked(result.passed, result.took.as_duration());
        let changed = tracked.answer(result, now);
        if changed && let Err(error) = self.keep(tracked).await {
            tracing::warn!(instance = %tracked.id, %error, "the health of an instance could not be written");
            return interval.min(RETRY);
        }
        if !changed {
            self.tell_listeners(tracked);
        }
        tracked.gap(now.monotonic)
    }

    /// Writes an instance's state with its event, and makes its signals what the state calls for.
    async fn keep(&self, tracked: &Arc<Tracked>) -> Result<(), Error> {
        if !tracked.is_unwritten() {
            return Ok(());
        }
        let span = trace::span_under(&tracked.traceparent(), "health");
        let (written, judged) =
            async { tokio::join!(self.write(tracked), self.judge(tracked)) }.instrument(span).await;
        written.and(judged)
    }

    async fn write(&self, tracked: &Arc<Tracked>) -> Result<(), Error> {
        let _writing = tracked.writing.lock().await;
        loop {
            let Some(draft) = tracked.draft() else { return Ok(()) };
            let now = self.clock.now().wall;
            let id = tracked.id.to_string();
            let mut batch = Batch {
                changes: vec![documents::put(HEALTH, &id, draft.expected, &draft.watched)?],
                events: draft.event(now).into_iter().collect(),
                ..Batch::default()
            };
            batch.watermarks.extend(draft.news.as_ref().map(|seen| watermark(&tracked.id, seen)));
            match self.store.commit(batch).await {
                Ok(_) => {
                    tracked.written(&draft);
                    if draft.changed {
                        tracing::info!(instance = id, state = ?draft.watched.state, "an instance's health changed");
                    }
                    self.tell_listeners(tracked);
                }
                // Handled before a restart that forgot it, or by another replica.
                Err(Error::Stale { .. }) => tracked.no_news(&draft),
                Err(Error::Conflict { .. }) => match documents::one(&self.store, HEALTH, &id).await? {
                    // Another replica may have written the same.
                    Some((version, watched)) => {
                        tracked.adopt(watched, version, self.is_mine(&tracked.id), self.clock.now());
                    }
                    None => tracked.found(0),
                },
                Err(error) => return Err(error),
            }
        }
    }

    async fn document_version(&self, id: &InstanceId) -> Result<u64, Error> {
        Ok(self.store.get(HEALTH, &id.to_string()).await?.map_or(0, |document| document.version))
    }

    async fn judge(&self, tracked: &Arc<Tracked>) -> Result<(), Error> {
        // What another replica looks at is known here a little later.
        if !self.is_mine(&tracked.id) {
            return Ok(());
        }
        let observed = tracked.observations();
        self.signals.see(&Scope::Health(tracked.id.clone()), &observed).await
    }

    /// Raises and resolves what a crash between two commits left.
    async fn judge_all(&self) -> Result<(), Error> {
        let open: BTreeSet<InstanceId> =
            self.signals.live().into_iter().filter_map(|record| record.signal.instance).collect();
        let all: Vec<Arc<Tracked>> = self.tracked().values().cloned().collect();
        for tracked in all.iter().filter(|tracked| tracked.is_bad() || open.contains(&tracked.id)) {
            self.judge(tracked).await?;
        }
        let retired = |id: &InstanceId| !self.is_watched(id);
        self.signals.settle(|record| record.signal.instance.as_ref().is_some_and(retired)).await
    }

    /// Ends every task. A state that was not written is found again after the next start.
    pub fn end(&self) {
        for tracked in self.tracked().values() {
            tracked.ended.cancel();
        }
    }

    fn find(&self, id: &InstanceId) -> Option<Arc<Tracked>> {
        self.tracked().get(id).cloned()
    }

    fn tracked(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Arc<Tracked>>> {
        // No code that can panic runs under the lock.
        self.shared.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn watermark(id: &InstanceId, seen: &Seen) -> Watermark {
    Watermark {
        source_kind: SOURCE.to_owned(),
        source_id: format!("{}/{id}", seen.epoch),
        version: seen.version,
    }
}
