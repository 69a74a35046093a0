//! Workers: a bounded number of builds at once, each claimed from the store by a lease with a fencing token.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_builder_core::Told;
use kiln_builder_core::build::{
    self, Build, Failed, HEARTBEAT, Phase, Precedence, Progress, State, Step, TestResult,
};
use kiln_builder_core::plan::Slot;
use kiln_model::digest::Digest;
use kiln_model::name::BuildId;
use kiln_service::changes::Follower;
use kiln_service::clock::Clock;
use kiln_service::members::Members;
use kiln_service::shutdown;
use kiln_store::Store;
use tokio::sync::{Notify, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::bake::{BakeError, BakeRun, Progress as BakeProgress};
use crate::bakery::Bakery;
use crate::builder::{Builder, Error};
use crate::describe::{About, Provenance};
use crate::image_tests::{TestRun, Tester};
use crate::logs::Writer;
use crate::reconcile::{monotonic, readable};
use crate::store::{Edit, Read, StoredImage};
use crate::timings::{self, Timings};

/// After the store refused.
const PAUSE: Duration = Duration::from_secs(1);
/// For how long a replica leaves a build to the one that it belongs to, though it has a free place itself.
const OTHERS_FIRST: Duration = Duration::from_millis(250);
/// What an interrupted build gets to take its sandbox down.
const GRACE: Duration = Duration::from_secs(5);

/// What a worker is.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Those that share the work. The id of this run of this process is part of every lease.
    pub members: Members,
    /// Builds at once.
    pub workers: usize,
}

/// What a build came to.
struct Baked {
    image: Digest,
    key_id: String,
    tests: Vec<TestResult>,
}

/// What a build fell over; the image is there where only its tests failed.
struct Fell {
    failed: Failed,
    image: Option<(Digest, String)>,
}

/// A build that may be claimed at some time.
struct Claimable {
    /// By the clock that nobody sets.
    at: Duration,
    precedence: Precedence,
}

struct Dispatcher<S, K, C, T> {
    builder: Builder<S, K, C>,
    tester: T,
    options: WorkerOptions,
    builds: Follower,
    /// Those that have not ended.
    claimable: BTreeMap<BuildId, Claimable>,
    running: HashMap<BuildId, CancellationToken>,
    tasks: JoinSet<()>,
    /// Which build each task is for, and with which token: one that panics can't say so itself.
    claimed: HashMap<task::Id, (BuildId, u64)>,
}

/// Runs builds until told to stop. What runs then is interrupted, and claimed anew by the process that comes next.
pub async fn run<S: Store, K: Bakery, C: Clock, T: Tester>(
    builder: Builder<S, K, C>,
    tester: T,
    options: WorkerOptions,
    mut stop: watch::Receiver<bool>,
) {
    let mut sequence = builder.documents.store().sequence();
    let clock = builder.clock.clone();
    let mut others = options.members.changes();
    let mut dispatcher = Dispatcher {
        builder,
        tester,
        options,
        builds: Follower::new(build::KIND),
        claimable: BTreeMap::new(),
        running: HashMap::new(),
        tasks: JoinSet::new(),
        claimed: HashMap::new(),
    };
    while !*stop.borrow() {
        sequence.borrow_and_update();
        let pause = match dispatcher.turn().await {
            Ok(pause) => pause,
            Err(error) => {
                tracing::warn!(%error, "builds could not be claimed");
                Some(PAUSE)
            }
        };
        let sleep = async {
            match pause {
                Some(pause) => clock.sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = shutdown::requested(&mut stop) => break,
            // Before the changes, which may come without end: what has ended makes room.
            Some(ended) = dispatcher.tasks.join_next_with_id() => dispatcher.ended(ended).await,
            changed = sequence.changed() => {
                if changed.is_err() { break; }
            }
            Ok(()) = others.changed() => {
                if let Err(error) = recover(&dispatcher.builder, &dispatcher.options.members).await {
                    tracing::warn!(%error, "builds of a replica that is gone wait for the end of their leases");
                }
            }
            () = sleep => {}
        }
    }
    for token in dispatcher.running.values() {
        token.cancel();
    }
    let ended = async { while dispatcher.tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(GRACE, ended).await.is_err() {
        tracing::warn!("builds were cut off; what they left is swept at the next start");
    }
}

/// Lets go of the builds of processes that are gone: before the first claim, and when another replica went.
///
/// # Errors
/// The store refuses.
pub async fn recover<S: Store, K: Bakery, C: Clock>(
    builder: &Builder<S, K, C>,
    members: &Members,
) -> Result<(), Error> {
    for read in builder.documents.readable::<Build>(build::KIND).await? {
        let mut value = read.value;
        if value.abandoned(|owner| members.is_there(owner), builder.now()) {
            match builder.interrupted(read.version, &value).await {
                // Another replica was first.
                Err(error) if error.is_conflict() => {}
                done => done?,
            }
        }
    }
    Ok(())
}

impl<S: Store, K: Bakery, C: Clock, T: Tester> Dispatcher<S, K, C, T> {
    async fn turn(&mut self) -> Result<Option<Duration>, Error> {
        let store = self.builder.documents.store().clone();
        for entry in self.builds.changes(&store).await? {
            let Some(Read { value, .. }) = readable::<Build>(&entry) else { continue };
            let now = self.builder.clock.now();
            match value.claimable_at(now.wall) {
                Some(at) => {
                    let (at, precedence) = (monotonic(at, now), value.precedence());
                    self.claimable.insert(value.id, Claimable { at, precedence })
                }
                None => {
                    // Cancelled while it ran.
                    if let Some(token) = self.running.get(&value.id) {
                        token.cancel();
                    }
                    self.claimable.remove(&value.id)
                }
            };
        }
        let now = self.builder.clock.now().monotonic;
        let mut waiting: Vec<_> =
            self.claimable.iter().map(|(id, it)| (it.precedence, id.clone(), it.at)).collect();
        waiting.sort();
        let mut next: Option<Duration> = None;
        for (_, id, at) in waiting {
            if self.running.contains_key(&id) {
                continue;
            }
            let is_mine = self.options.members.is_mine(&id.to_string(), now);
            let at = if is_mine { at } else { at + OTHERS_FIRST };
            if at > now {
                next = Some(next.map_or(at, |next| next.min(at)));
            } else if self.running.len() < self.options.workers
                && let Some(again) = self.claim(id).await?
            {
                next = Some(next.map_or(again, |next| next.min(again)));
            }
        }
        Ok(next.map(|at| at.saturating_sub(now) + Duration::from_millis(1)))
    }

    /// Where it could not be claimed, when to try again.
    async fn claim(&mut self, id: BuildId) -> Result<Option<Duration>, Error> {
        let Some(Read { version, value: mut build }) = self.builder.documents.build(&id).await? else {
            self.claimable.remove(&id);
            return Ok(None);
        };
        let clock = self.builder.clock.now();
        let now = clock.wall;
        let token = match build.claim(self.options.members.id(), now) {
            Ok(token) => token,
            Err(illegal) => {
                tracing::debug!(build = %id, %illegal, "is not to be claimed");
                // Claimed by another meanwhile, or the clock was set back.
                let at = build.claimable_at(now).map_or(Duration::ZERO, |at| monotonic(at, clock));
                let at = at.max(clock.monotonic + PAUSE);
                if let Some(waiting) = self.claimable.get_mut(&id) {
                    waiting.at = at;
                }
                return Ok(Some(at));
            }
        };
        let mut edit = Edit::new(now);
        edit.put_build(version, &build, Some(Told::BuildStarted))?;
        match self.builder.documents.store().commit(edit.finish()).await {
            Ok(_) => {}
            // Its change, or what this reader was behind of, is seen then.
            Err(kiln_store::Error::Conflict { .. }) => return Ok(Some(clock.monotonic + PAUSE)),
            Err(error) => return Err(error.into()),
        }
        let cancel = CancellationToken::new();
        self.running.insert(id.clone(), cancel.clone());
        let (for_build, span_of) = (id.clone(), build.cause.traceparent.clone());
        let worker = Worker {
            builder: self.builder.clone(),
            tester: self.tester.clone(),
            log: self.builder.logs.writer(&id),
            build,
            token,
            cancel,
            progress: Arc::default(),
            timings: Timings::default(),
            moved: Arc::default(),
        };
        let span = kiln_service::trace::span_under(&span_of, "build");
        let task = self.tasks.spawn(async move { worker.run().await }.instrument(span));
        self.claimed.insert(task.id(), (for_build, token));
        Ok(None)
    }

    /// A worker's task has ended, one way or the other: its place is free.
    async fn ended(&mut self, ended: Result<(task::Id, ()), JoinError>) {
        let (task, error) = match ended {
            Ok((task, ())) => (task, None),
            Err(error) => (error.id(), Some(error)),
        };
        let Some((id, token)) = self.claimed.remove(&task) else { return };
        self.running.remove(&id);
        let Some(error) = error else { return };
        tracing::error!(build = %id, %error, "its worker ended badly");
        self.builder
            .logs
            .writer(&id)
            .line("a defect of Kiln ended this attempt; the builder's own log has more");
        if let Err(error) = self.broke_off(&id, token).await {
            // Its lease runs out, and it is claimed anew.
            tracing::warn!(build = %id, %error, "could not be given back");
        }
    }

    async fn broke_off(&self, id: &BuildId, token: u64) -> Result<(), Error> {
        let Some(Read { version, value: mut build }) = self.builder.documents.build(id).await? else {
            return Ok(());
        };
        build.broke_off(token, self.builder.now())?;
        self.builder.interrupted(version, &build).await
    }
}

struct Worker<S, K, C, T> {
    builder: Builder<S, K, C>,
    tester: T,
    build: Build,
    token: u64,
    cancel: CancellationToken,
    log: Writer,
    progress: Arc<Mutex<Progress>>,
    timings: Timings,
    moved: Arc<Notify>,
}

impl<S: Store, K: Bakery, C: Clock, T: Tester> Worker<S, K, C, T> {
    async fn run(self) {
        let id = self.build.id.clone();
        tracing::info!(build = %id, attempt = self.build.attempts, "building");
        let mut work = std::pin::pin!(self.work());
        let outcome = tokio::select! {
            biased;
            outcome = &mut work => outcome,
            () = self.keep_lease() => {
                // Told to stop, and waited for: its sandbox has to go. What it comes to counts for nothing.
                self.cancel.cancel();
                work.await
            }
        };
        self.settle(outcome).await;
    }

    async fn work(&self) -> Result<Baked, Fell> {
        let build = &self.build;
        let lost =
            |what: &str| self.fell(format!("{what} is not in the store; apply the definition again"), false);
        let stored = |error: kiln_store::Error| self.fell(error.to_string(), true);
        let lock = self.builder.documents.lock(&build.lock_key).await.map_err(stored)?;
        let lock = lock.ok_or_else(|| lost("its lock"))?;
        let definition = self.builder.documents.definition(&build.definition).await.map_err(stored)?;
        let definition = definition.ok_or_else(|| lost("its definition"))?.definition;
        self.log.line(&format!("{} (attempt {}): lock {}", build.id, build.attempts, build.lock_key.short()));

        let begun = self.builder.clock.now().wall;
        let image = self.bake(&lock, !build.verify).await?;
        let again = self.builder.came_to_again(&image).await;
        again.map_err(|error| self.fell(error.to_string(), error.is_transient()))?;
        let made = Provenance {
            build: build.id.clone(),
            lock,
            lock_key: build.lock_key,
            definition: build.definition,
            commit: self.commit().await.map_err(stored)?,
            cause: build.cause.clone(),
            begun,
            ended: self.builder.clock.now().wall,
        };
        if build.verify {
            return match self.first_image().await.map_err(stored)? {
                Some(first) if first == image => {
                    Ok(Baked { image, key_id: self.sign(image, &made).await?, tests: Vec::new() })
                }
                Some(first) => {
                    let problem = format!("the same lock gave {first} the first time and {image} now");
                    Err(self.fell(problem, false))
                }
                None => {
                    let problem = format!(
                        "it gave {image}, and the image to compare it with was removed meanwhile; run `kiln build --verify \
                         {}` again",
                        build.server()
                    );
                    Err(self.fell(problem, false))
                }
            };
        }
        // Signed before its tests: nothing runs an image whose signature it can't verify.
        let key_id = self.sign(image, &made).await?;
        self.share(image).await?;
        let run = TestRun {
            build: &build.id,
            attempt: self.token,
            image,
            definition: &definition,
            log: self.log.clone(),
            cancel: self.cancel.clone(),
            traceparent: kiln_service::trace::current(),
        };
        let span = tracing::info_span!("image tests", build = %build.id);
        let tests = self.during(Phase::Test, self.tester.test(run)).instrument(span).await;
        let tests = tests.map_err(|fault| Fell {
            image: Some((image, key_id.clone())),
            ..self.fell(format!("its tests could not be run: {}", fault.problem), fault.transient)
        })?;
        let failed: Vec<_> = tests.iter().filter(|test| !test.passed).collect();
        if let Some(first) = failed.first() {
            let problem =
                format!("{} of {} tests failed: {}: {}", failed.len(), tests.len(), first.name, first.detail);
            let mut fell = self.fell(problem, false);
            fell.failed.tests = tests;
            fell.image = Some((image, key_id));
            return Err(fell);
        }
        let server = self.builder.documents.server(build.server()).await.map_err(stored)?;
        let before = server.and_then(|server| server.value.in_force).map(|in_force| in_force.image);
        let about = About { made, definition, tests, before };
        let described = self.during(Phase::Describe, self.builder.bakery.describe(image, &about)).await;
        if let Err(error) = described {
            // It has passed its tests: what people would read about it is no reason to keep it back.
            self.log.line(&format!("it has no datasheet: {error}"));
        }
        self.share(image).await?;
        Ok(Baked { image, key_id, tests: about.tests })
    }

    /// What this build's lock gave the first time: the image in force, which has no slot where a later build of the same
    /// lock failed, or else that of the slot.
    async fn first_image(&self) -> Result<Option<Digest>, kiln_store::Error> {
        let documents = &self.builder.documents;
        let server = documents.server(self.build.server()).await?;
        let in_force = server.and_then(|server| server.value.in_force);
        if let Some(in_force) = in_force.filter(|in_force| in_force.lock_key == self.build.lock_key) {
            return Ok(Some(in_force.image));
        }
        let slot = documents.slot(&self.build.lock_key).await?;
        Ok(if let Slot::Succeeded { image, .. } = slot.value { Some(image) } else { None })
    }

    async fn bake(&self, lock: &kiln_model::lock::Lock, use_layer_cache: bool) -> Result<Digest, Fell> {
        let log = self.log.clone();
        let (progress, moved) = (self.progress.clone(), self.moved.clone());
        let run = BakeRun {
            build: self.build.id.clone(),
            log: Arc::new(move |line: &str| log.line(line)),
            progress: Arc::new(move |step: BakeProgress| {
                note(&mut progress.lock().unwrap_or_else(PoisonError::into_inner), step);
                moved.notify_one();
            }),
            cancel: self.cancel.clone(),
            timings: self.timings.clone(),
            use_layer_cache,
        };
        let span = tracing::info_span!("bake", build = %self.build.id);
        let baked = self
            .builder
            .bakery
            .bake(lock, run)
            .instrument(span)
            .await
            .map_err(|error| self.bake_fell(&error))?;
        let steps = baked.steps.into_iter();
        let steps: Vec<_> =
            steps.map(|step| Step { name: step.name, cached: step.cached, millis: step.millis }).collect();
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.steps_total = u32::try_from(steps.len()).unwrap_or(u32::MAX);
        progress.steps = steps;
        Ok(baked.digest)
    }

    /// Waits for a part of a phase. By the clock of the rest, and not by the bakes' own, so that one story has one end.
    async fn during<F: Future>(&self, phase: Phase, work: F) -> F::Output {
        let began = self.builder.clock.now().monotonic;
        let done = work.instrument(timings::span(phase)).await;
        self.timings.add(phase, self.builder.clock.now().monotonic.saturating_sub(began));
        done
    }

    fn so_far(&self) -> Progress {
        let progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Progress { timings: self.timings.so_far(), ..progress }
    }

    async fn sign(&self, image: Digest, made: &Provenance) -> Result<String, Fell> {
        let signed = self.during(Phase::Sign, self.builder.bakery.sign(image, made)).await;
        signed.map_err(|error| self.bake_fell(&error))
    }

    /// Git's name for what the definition was taken from; empty for a folder, and where nobody waits for the build any more.
    async fn commit(&self) -> Result<String, kiln_store::Error> {
        let server = self.builder.documents.server(self.build.server()).await?;
        let building = server.and_then(|server| server.value.building);
        let ours = building.filter(|building| building.build == self.build.id);
        Ok(ours.map(|building| building.definition.commit).unwrap_or_default())
    }

    async fn share(&self, image: Digest) -> Result<(), Fell> {
        let share = self.during(Phase::Push, self.builder.bakery.share(image));
        let shared = tokio::select! {
            biased;
            shared = share => shared,
            () = self.cancel.cancelled() => Err(BakeError::Cancelled),
        };
        if shared.map_err(|error| self.bake_fell(&error))? {
            self.log.line("pushed to the registry");
        }
        Ok(())
    }

    fn bake_fell(&self, error: &BakeError) -> Fell {
        let problem = error.to_string();
        self.log.line(&format!("failed: {problem}"));
        // An interrupted bake is none of the build's fault: its next owner takes it up.
        let transient = error.is_transient() || matches!(error, BakeError::Cancelled);
        self.fell(problem, transient)
    }

    fn fell(&self, problem: String, transient: bool) -> Fell {
        let failed = Failed { problem, transient, last_log: self.log.last_lines(), tests: Vec::new() };
        Fell { failed, image: None }
    }

    /// Renews the lease, with how far the build is. Returns when the build is no longer this worker's.
    async fn keep_lease(&self) {
        loop {
            tokio::select! {
                biased;
                // Told to stop by the service: nothing is renewed any more, and the work ends by itself.
                () = self.cancel.cancelled() => return std::future::pending().await,
                () = self.moved.notified() => {}
                () = self.builder.clock.sleep(HEARTBEAT) => {}
            }
            match self.heartbeat().await {
                Ok(()) => {}
                Err(Error::Illegal(illegal)) => {
                    tracing::warn!(build = %self.build.id, %illegal, "is no longer built here");
                    return;
                }
                // The lease lasts for several heartbeats.
                Err(error) => {
                    tracing::warn!(build = %self.build.id, %error, "its lease could not be renewed")
                }
            }
        }
    }

    async fn heartbeat(&self) -> Result<(), Error> {
        let Some(Read { version, value: mut build }) = self.builder.documents.build(&self.build.id).await?
        else {
            return Err(Error::Lost { what: "build", id: self.build.id.to_string() });
        };
        let now = self.builder.now();
        build.heartbeat(self.token, Some(self.so_far()), now)?;
        let mut edit = Edit::new(now);
        edit.put_build(version, &build, None)?;
        match self.builder.documents.store().commit(edit.finish()).await {
            Ok(_) | Err(kiln_store::Error::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Commits what became of the build, as often as it takes: an outcome that is not written is built again.
    async fn settle(&self, outcome: Result<Baked, Fell>) {
        let id = &self.build.id;
        if self.cancel.is_cancelled() && outcome.is_err() {
            tracing::info!(build = %id, "was interrupted");
            match self.release().await {
                Ok(()) => {}
                Err(error) => tracing::debug!(build = %id, %error, "is not given back"),
            }
            return;
        }
        loop {
            match self.write(&outcome).await {
                Ok(()) => return,
                Err(Error::Illegal(illegal)) => {
                    tracing::warn!(build = %id, %illegal, "its outcome comes too late");
                    return;
                }
                Err(error) if error.is_conflict() => {}
                Err(error) => {
                    tracing::warn!(build = %id, %error, "its outcome can't be written yet");
                    self.builder.clock.sleep(PAUSE).await;
                }
            }
        }
    }

    /// The service ends in order: the next one goes on at once. A build that was cancelled is nobody's any more.
    async fn release(&self) -> Result<(), Error> {
        let Some(Read { version, value: mut build }) = self.builder.documents.build(&self.build.id).await?
        else {
            return Ok(());
        };
        let now = self.builder.now();
        build.release(self.token, now)?;
        let mut edit = Edit::new(now);
        edit.put_build(version, &build, None)?;
        self.builder.documents.store().commit(edit.finish()).await?;
        Ok(())
    }

    async fn write(&self, outcome: &Result<Baked, Fell>) -> Result<(), Error> {
        let documents = &self.builder.documents;
        let Some(Read { version, value: mut build }) = documents.build(&self.build.id).await? else {
            return Err(Error::Lost { what: "build", id: self.build.id.to_string() });
        };
        let now = self.builder.now();
        let mut edit = Edit::new(now);
        let (told, image) = match outcome {
            Ok(baked) => {
                build.succeed(self.token, baked.image, self.so_far(), baked.tests.clone(), now)?;
                (Some(Told::BuildSucceeded), Some((baked.image, baked.key_id.clone())))
            }
            Err(fell) => {
                build.fail(self.token, fell.failed.clone(), now)?;
                ((build.state == State::Failed).then_some(Told::BuildFailed), fell.image.clone())
            }
        };
        if let Some((digest, key_id)) = image {
            // One that was there before is a day old from now on, and is not removed before it is taken over.
            let known = documents.image(&digest).await?.map_or(0, |known| known.version);
            let lock = documents.lock(&build.lock_key).await?;
            let stored = StoredImage {
                digest,
                server: build.server().clone(),
                lock_key: build.lock_key,
                build: build.id.clone(),
                key_id,
                packages: lock.map(|lock| lock.packages()).unwrap_or_default(),
                created: now,
            };
            edit.put_image(known, &stored)?;
        }
        edit.put_build(version, &build, told)?;
        self.builder.free_slot_of(&mut edit, &build).await?;
        documents.store().commit(edit.finish()).await?;
        match outcome {
            Ok(baked) => tracing::info!(build = %build.id, image = %baked.image, "succeeded"),
            Err(fell) => {
                tracing::warn!(build = %build.id, problem = fell.failed.problem, state = build.state.as_str(), "failed");
            }
        }
        Ok(())
    }
}

impl<S: Store, K: Bakery, C: Clock> Builder<S, K, C> {
    /// Adds to a change what becomes of the slot of a build that was changed.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn free_slot_of(&self, edit: &mut Edit, build: &Build) -> Result<(), Error> {
        if build.state.holds_slot() || build.verify {
            return Ok(());
        }
        if let Some(slot) = self.documents.slot_holder(&build.lock_key).await?
            && slot.value.build == build.id
        {
            edit.free_slot(slot.version, build);
        }
        Ok(())
    }

    /// Writes a build whose attempt ended without an outcome.
    async fn interrupted(&self, version: u64, build: &Build) -> Result<(), Error> {
        tracing::info!(build = %build.id, state = build.state.as_str(), times = build.interruptions, "was interrupted");
        let mut edit = Edit::new(self.now());
        edit.put_build(version, build, (build.state == State::Failed).then_some(Told::BuildFailed))?;
        self.free_slot_of(&mut edit, build).await?;
        self.documents.store().commit(edit.finish()).await?;
        Ok(())
    }

    /// Cancels a build, whoever runs it.
    ///
    /// # Errors
    /// [`Illegal::State`] where it has ended otherwise.
    pub async fn cancel(&self, read: Read<Build>, actor: &str) -> Result<(Edit, Build), Error> {
        let now = self.now();
        let mut build = read.value;
        let mut edit = Edit::new(now);
        if build.cancel(actor, now)? {
            edit.put_build(read.version, &build, Some(Told::BuildCancelled))?;
            self.free_slot_of(&mut edit, &build).await?;
        }
        Ok((edit, build))
    }
}

fn note(progress: &mut Progress, step: BakeProgress) {
    match step {
        BakeProgress::Steps { total } => {
            progress.steps.clear();
            progress.steps_total = total;
        }
        BakeProgress::Began { .. } => {}
        BakeProgress::Ended { report, .. } => {
            progress.steps.push(Step { name: report.name, cached: report.cached, millis: report.millis });
        }
    }
}
