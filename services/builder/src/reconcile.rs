//! The loop that carries each server from what is to what it needs next.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use jiff::Timestamp;
use kiln_builder_core::build::{self, Build};
use kiln_builder_core::next::{self, Next, Order, Snapshot};
use kiln_builder_core::server::{self, Server};
use kiln_builder_core::source::{self, Source};
use kiln_builder_core::{Illegal, Told, graph, plan};
use kiln_model::cause::Cause;
use kiln_model::name::{BuildId, ServerName};
use kiln_model::revision::RevisionContent;
use kiln_model::time::Now;
use kiln_service::changes::Follower;
use kiln_service::clock::Clock;
use kiln_service::members::Members;
use kiln_service::shutdown;
use kiln_store::{Entry, Store};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::Instrument as _;

use crate::audit::standing;
use crate::bakery::Bakery;
use crate::builder::{Builder, Error};
use crate::store::{Edit, Read};

/// Plans that are made at once: resolving is mostly one process's work on one core.
const PLANS: usize = 4;
/// After a change that lost against others'.
const CONFLICT: Duration = Duration::from_millis(20);
/// Repositories that are fetched at once.
const LOOKS: usize = 8;
/// Between two looks at a server of which something is under way, whatever was told or lost.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// After the store refused.
const PAUSE: Duration = Duration::from_secs(1);

/// A changed document; none where it was deleted. One that can't be read is told and passed over: its change is not seen
/// again, and the others' must be seen.
pub(crate) fn readable<T: DeserializeOwned>(entry: &Entry) -> Option<Read<T>> {
    let Entry::Document(document) = entry else { return None };
    crate::store::readable(document)
}

/// What is remembered of a server between its changes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Summary {
    parent: Option<ServerName>,
    building: Option<BuildId>,
    /// Something of it is under way.
    unfinished: bool,
}

struct Reconciler<S, K, C> {
    builder: Builder<S, K, C>,
    members: Members,
    servers: Follower,
    builds: Follower,
    sources: Follower,
    known: HashMap<ServerName, Summary>,
    dirty: BTreeSet<ServerName>,
    /// When to look at a server again though nothing changed, by the clock that nobody sets.
    due: BTreeMap<ServerName, Duration>,
    /// Sources with something to look at, and when.
    asked: BTreeMap<String, Duration>,
    planning: BTreeSet<ServerName>,
    looking: BTreeSet<String>,
    tasks: JoinSet<Done>,
}

enum Done {
    Planned(ServerName, Result<(), Error>),
    /// False where it is to be done again, should it still be asked for.
    Looked(String, Result<bool, Error>),
}

/// Runs until told to stop. What is under way then is dropped: nothing of it is lost, since it is committed at its end.
pub async fn run<S: Store, K: Bakery, C: Clock>(
    builder: Builder<S, K, C>,
    members: Members,
    mut stop: watch::Receiver<bool>,
) {
    let mut others = members.changes();
    let mut sequence = builder.documents.store().sequence();
    let clock = builder.clock.clone();
    let mut reconciler = Reconciler {
        builder,
        members,
        servers: Follower::new(server::KIND),
        builds: Follower::new(build::KIND),
        sources: Follower::new(source::KIND),
        known: HashMap::new(),
        dirty: BTreeSet::new(),
        due: BTreeMap::new(),
        asked: BTreeMap::new(),
        planning: BTreeSet::new(),
        looking: BTreeSet::new(),
        tasks: JoinSet::new(),
    };
    while !*stop.borrow() {
        sequence.borrow_and_update();
        let pause = match reconciler.turn().await {
            Ok(pause) => pause,
            Err(error) => {
                tracing::warn!(%error, "servers could not be brought forward");
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
            () = shutdown::requested(&mut stop) => return,
            // Before the changes, which may come without end: what has ended makes room.
            Some(done) = reconciler.tasks.join_next() => reconciler.done(done),
            changed = sequence.changed() => {
                if changed.is_err() { return; }
            }
            Ok(()) = others.changed() => reconciler.everything_again(),
            () = sleep => {}
        }
    }
}

impl<S: Store, K: Bakery, C: Clock> Reconciler<S, K, C> {
    /// Does what can be done now, and says how long nothing more can.
    async fn turn(&mut self) -> Result<Option<Duration>, Error> {
        self.notice().await?;
        let now = self.builder.clock.now().monotonic;
        let due: Vec<_> =
            self.due.iter().filter(|(_, at)| **at <= now).map(|(name, _)| name.clone()).collect();
        self.dirty.extend(due);
        self.dirty.retain(|name| self.members.is_mine(name.as_str(), now));
        let waiting: Vec<_> =
            self.dirty.iter().filter(|name| !self.planning.contains(*name)).cloned().collect();
        for name in waiting {
            match self.evaluate(&name).await {
                Ok(true) => {
                    self.dirty.remove(&name);
                    // A reader that was behind may have seen nothing to do.
                    if self.known.get(&name).is_some_and(|known| known.unfinished) {
                        self.due.entry(name).or_insert(now + LOOK_AGAIN);
                    }
                }
                Ok(false) => {}
                // One that can't be read holds no other back.
                Err(error) => {
                    tracing::warn!(server = %name, %error, "could not be brought forward");
                    self.dirty.remove(&name);
                    self.due.insert(name, now + PAUSE);
                }
            }
        }
        self.look(now);
        // Where there is no room for a plan, the end of another one wakes this loop.
        let times = self.due.values().chain(self.asked.values());
        let next = times.filter(|at| **at > now).min().map(|at| *at - now);
        // Rounded up, so that it is time when the clock says so.
        Ok(next.map(|wait| wait + Duration::from_millis(1)))
    }

    /// Someone came or went: what is whose is found by looking at all of it. Most of it needs nothing.
    fn everything_again(&mut self) {
        self.dirty.extend(self.known.keys().cloned());
    }

    async fn notice(&mut self) -> Result<(), Error> {
        let store = self.builder.documents.store().clone();
        for entry in self.servers.changes(&store).await? {
            let Some(Read { value, .. }) = readable::<Server>(&entry) else { continue };
            let parent = value.effective().and_then(|effective| effective.parent.clone());
            let building = value.building.as_ref().map(|building| building.build.clone());
            self.dirty.insert(value.name.clone());
            let children = self.known.iter().filter(|(_, known)| known.parent.as_ref() == Some(&value.name));
            self.dirty.extend(children.map(|(name, _)| name.clone()));
            let unfinished = building.is_some() || value.wanted.is_some();
            self.known.insert(value.name, Summary { parent, building, unfinished });
        }
        // Those that ended, and those that give way where something newer is wanted.
        let mut ended = BTreeSet::new();
        for entry in self.builds.changes(&store).await? {
            let Some(Read { value, .. }) = readable::<Build>(&entry) else { continue };
            if value.state.has_ended() || value.is_tried_again() {
                ended.insert(value.id);
            }
        }
        let awaits = |known: &Summary| known.building.as_ref().is_some_and(|build| ended.contains(build));
        let awaiting = self.known.iter().filter(|(_, known)| awaits(known)).map(|(name, _)| name.clone());
        self.dirty.extend(awaiting);
        for entry in self.sources.changes(&store).await? {
            if let Entry::Tombstone { id, .. } = &entry {
                self.asked.remove(id);
            }
            let Some(Read { value, .. }) = readable::<Source>(&entry) else { continue };
            let now = self.builder.clock.now();
            match value.due(now.wall) {
                Some(at) => self.asked.insert(value.id.to_string(), monotonic(at, now)),
                None => self.asked.remove(value.id.as_str()),
            };
        }
        Ok(())
    }

    /// Does what a server needs next. False where there is no room for it now.
    async fn evaluate(&mut self, name: &ServerName) -> Result<bool, Error> {
        self.due.remove(name);
        let documents = &self.builder.documents;
        let Some(read) = documents.server(name).await? else { return Ok(true) };
        let server = &read.value;
        let build = match &server.building {
            Some(building) => documents.build(&building.build).await?.map(|build| build.value),
            None => None,
        };
        let parent = match server.effective().and_then(|effective| effective.parent.as_ref()) {
            Some(parent) => documents.server(parent).await?.map(|parent| parent.value),
            None => None,
        };
        if let Some(parent) = &parent
            && self.follow_parent(&read, parent).await?
        {
            // Its own change brings it back here.
            return Ok(true);
        }
        let now = self.builder.clock.now();
        match next::next(Snapshot { server, build: build.as_ref(), parent: parent.as_ref() }, now.wall) {
            Next::Nothing | Next::AwaitParent => {}
            Next::Wait(until) => {
                self.due.insert(name.clone(), monotonic(until, now));
            }
            Next::Plan(_) if self.planning.len() >= PLANS => return Ok(false),
            Next::Plan(order) => self.plan(name.clone(), *order),
            Next::Adopt => {
                if let Some(build) = build
                    && !self.adopt(read, &build).await?
                {
                    self.again(name);
                }
            }
            Next::Forget => {
                tracing::warn!(server = %name, "the build that it awaits is lost, and is planned anew");
                self.forget(read).await?;
            }
            Next::Supersede => {
                if !self.supersede(read).await? {
                    self.again(name);
                }
            }
        }
        Ok(true)
    }

    fn plan(&mut self, name: ServerName, order: Order) {
        self.planning.insert(name.clone());
        let builder = self.builder.clone();
        self.tasks.spawn(async move {
            let made = builder.make_plan(&name, &order).await;
            Done::Planned(name, made)
        });
    }

    /// A parent's image that this server does not stand on yet.
    async fn follow_parent(&self, child: &Read<Server>, parent: &Server) -> Result<bool, Error> {
        let Some(in_force) = &parent.in_force else { return Ok(false) };
        let mut server = child.value.clone();
        let now = self.builder.now();
        // Asked with a cause that costs nothing first: most of the time there is nothing to follow.
        let revision = self.builder.documents.revision(&parent.name, in_force.generation);
        let Some(cause) = revision.await?.and_then(|stored| cause_of(stored.revision.content)) else {
            return Ok(false);
        };
        if !graph::follow_parent(&mut server, parent, &cause, now) {
            return Ok(false);
        }
        let mut edit = Edit::new(now);
        edit.put_server(child.version, &server, &[])?;
        self.commit(edit).await?;
        Ok(true)
    }

    /// Looks at a server again although it did not change: others changed what its change rests on.
    fn again(&mut self, name: &ServerName) {
        self.due.insert(name.clone(), self.builder.clock.now().monotonic + CONFLICT);
    }

    async fn forget(&self, read: Read<Server>) -> Result<bool, Error> {
        let now = self.builder.now();
        let mut server = read.value;
        next::forget(&mut server, now);
        let mut edit = Edit::new(now);
        edit.put_server(read.version, &server, &[])?;
        self.commit(edit).await
    }

    /// Ends a build that waits for its next try; one that is another server's goes on without this one. False where
    /// others were first.
    async fn supersede(&self, read: Read<Server>) -> Result<bool, Error> {
        let mut server = read.value;
        let Some(id) = server.building.as_ref().map(|building| building.build.clone()) else {
            return Ok(true);
        };
        let Some(build) = self.builder.documents.build(&id).await? else { return Ok(false) };
        let mut edit = if id.server == server.name && build.value.is_tried_again() {
            self.builder.cancel(build, "builder").await?.0
        } else {
            Edit::new(self.builder.now())
        };
        tracing::info!(server = %server.name, build = %id, "gives way to a newer definition");
        next::forget(&mut server, self.builder.now());
        edit.put_server(read.version, &server, &[])?;
        self.commit(edit).await
    }

    /// False where others were first.
    async fn adopt(&self, read: Read<Server>, build: &Build) -> Result<bool, Error> {
        let Some(building) = read.value.building.clone() else { return Ok(true) };
        let trace = building.causes.first().map(|cause| cause.traceparent.clone()).unwrap_or_default();
        let span = kiln_service::trace::span_under(&trace, "adopt build");
        async {
            let digest = building.definition.digest;
            let definition = self.builder.documents.definition(&digest).await?;
            let definition =
                definition.ok_or_else(|| Error::Lost { what: "definition", id: digest.to_string() })?;
            let now = self.builder.now();
            let name = read.value.name.clone();
            let (server, revision) = match plan::adopt(read.value.clone(), build, &definition, now) {
                Ok(adopted) => adopted,
                Err(Illegal::Stale { .. } | Illegal::State { .. }) => return Ok(true),
                Err(illegal) => return Err(illegal.into()),
            };
            let mut edit = Edit::new(now);
            let image = server.in_force.as_ref().map(|in_force| in_force.image).filter(|_| revision.is_some());
            if let Some(image) = image
                && let Err(error) = self.builder.need(&mut edit, &image).await
            {
                let Error::Illegal(illegal) = error else { return Err(error) };
                tracing::warn!(server = %name, build = %build.id, %illegal, "is planned anew");
                return self.forget(read).await;
            }
            match &revision {
                Some(revision) => {
                    tracing::info!(server = %name, build = %build.id, generation = revision.generation, "a revision");
                }
                None => tracing::warn!(server = %name, build = %build.id, problem = server.problem(), "no revision"),
            }
            let told: Vec<_> = revision.map(|revision| Told::RevisionCreated(Box::new(revision))).into_iter().collect();
            edit.decided(standing(&read.value), &server, &told);
            edit.put_server(read.version, &server, &told)?;
            self.commit(edit).await
        }
        .instrument(span)
        .await
    }

    /// A conflict is no failure, and gives false. Who changed the server brings it back here.
    async fn commit(&self, edit: Edit) -> Result<bool, Error> {
        match self.builder.documents.store().commit(edit.finish()).await {
            Ok(_) => Ok(true),
            Err(kiln_store::Error::Conflict { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn look(&mut self, now: Duration) {
        let due: Vec<_> = self.asked.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()).collect();
        for id in due {
            if self.looking.len() >= LOOKS
                || !self.members.is_mine(&id, now)
                || !self.looking.insert(id.clone())
            {
                continue;
            }
            let builder = self.builder.clone();
            self.tasks.spawn(async move {
                let looked = builder.look(&id).await;
                Done::Looked(id, looked)
            });
        }
    }

    fn done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        let later = self.builder.clock.now().monotonic + PAUSE;
        match done {
            Ok(Done::Planned(name, made)) => {
                self.planning.remove(&name);
                match made {
                    Ok(()) => self.dirty.insert(name),
                    Err(error) => {
                        tracing::warn!(server = %name, %error, "a plan could not be kept");
                        self.due.insert(name, later).is_none()
                    }
                };
            }
            Ok(Done::Looked(id, looked)) => {
                self.looking.remove(&id);
                if let Err(error) = &looked {
                    tracing::warn!(source = %id, %error, "a look could not be kept");
                }
                // Kept or not, its change may have been noticed by now, and then nobody asks any more.
                if !matches!(looked, Ok(true))
                    && let Some(at) = self.asked.get_mut(&id)
                {
                    *at = later;
                }
            }
            // A plan that panicked is a defect; everything else goes on, and what it was for is made anew.
            Err(error) => {
                tracing::error!(%error, "a task of the reconcile loop ended badly");
                self.dirty.extend(std::mem::take(&mut self.planning));
                self.looking.clear();
            }
        }
    }
}

/// When a moment of the wall clock comes, if nobody sets it meanwhile; whoever is woken then asks it again.
pub(crate) fn monotonic(at: Timestamp, now: Now) -> Duration {
    now.monotonic + Duration::try_from(at.duration_since(now.wall)).unwrap_or_default()
}

fn cause_of(content: RevisionContent) -> Option<Cause> {
    match content {
        RevisionContent::Image(image) => Some(image.cause),
        RevisionContent::Removed { .. } => None,
    }
}

impl<S: Store, K: Bakery, C: Clock> Builder<S, K, C> {
    /// Looks at a source because signals ask for it, and takes over what may be taken. False where none was seen to ask, or
    /// others were first each time.
    ///
    /// # Errors
    /// The store refuses. That the repository is away is noted with the source, and is no error here.
    pub async fn look(&self, id: &str) -> Result<bool, Error> {
        let read = self.documents.source(id).await?;
        let Some(read) = read.filter(|read| !read.value.pending.is_empty()) else { return Ok(false) };
        let asked = read.value.pending.clone();
        let trace = asked.first().map(|pending| pending.cause.traceparent.clone()).unwrap_or_default();
        let span = kiln_service::trace::span_under(&trace, "look at source");
        async {
            let look = match self.sources.look(&read.value.place).await {
                Ok(look) => look,
                Err(error) => return self.look_failed(id, &error).await,
            };
            if let Err(error) = self.sources.keep(&look, self.now()).await {
                return self.look_failed(id, &error).await;
            }
            for _ in 0..crate::builder::TRIES {
                let edit = match self.sources.follow(&look, &asked, self.now()).await {
                    Ok(edit) => edit,
                    Err(crate::sources::Error::Store(error)) => return Err(error.into()),
                    Err(error) => return self.look_failed(id, &error).await,
                };
                match self.documents.store().commit(edit.finish()).await {
                    Ok(_) => return Ok(true),
                    Err(kiln_store::Error::Conflict { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(false)
        }
        .instrument(span)
        .await
    }

    async fn look_failed(&self, id: &str, error: &crate::sources::Error) -> Result<bool, Error> {
        tracing::warn!(source = id, %error, "could not be looked at");
        let Some(mut read) = self.documents.source(id).await? else { return Ok(false) };
        let now = self.now();
        read.value.look_failed(error.to_string(), now);
        let mut edit = Edit::new(now);
        edit.put_source(read.version, &read.value)?;
        match self.documents.store().commit(edit.finish()).await {
            Ok(_) => Ok(true),
            Err(kiln_store::Error::Conflict { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
