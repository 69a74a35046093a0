//! Looking at sources and taking definitions over from them: by hand, by a signal, or only to see.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use kiln_builder_core::definition::{self, IMAGE_CONTEXT_KIND, ImageContext};
use kiln_builder_core::head::{self, By, Found as Taken, Outcome};
use kiln_builder_core::server::{self, Refused, Server};
use kiln_builder_core::source::{Pending, Place, Source, SourceId};
use kiln_builder_core::{graph, signal};
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::digest::Digest;
use kiln_model::name::{NodeName, ServerName};
use kiln_service::aside::aside;
use kiln_store::Store;

use crate::audit::standing;
use crate::context::{self, Contexts, Found, Readable};
use crate::git::{self, Address};
use crate::repositories::Repositories;
use crate::store::{Documents, Edit, Read};
use crate::tree::{Tree, Unreadable};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Git(#[from] git::Error),
    #[error("the packed folder can't be taken: {0}")]
    Folder(#[from] Unreadable),
    #[error("{0}")]
    TooMuch(String),
    /// Definitions that were to be taken by hand are wrong: place and reason of each fault.
    #[error("{}", list(.0))]
    Faulty(Vec<(String, String)>),
    #[error("no {what} in {place}")]
    Empty { what: &'static str, place: String },
    #[error("writing a definition: {0}")]
    Disk(#[from] std::io::Error),
    #[error(transparent)]
    Store(#[from] kiln_store::Error),
}

fn list(faults: &[(String, String)]) -> String {
    let lines: Vec<_> = faults.iter().map(|(place, why)| format!("{place}: {why}")).collect();
    lines.join("\n")
}

/// What a source holds at one moment.
#[derive(Debug, Clone)]
pub struct Look {
    pub place: Place,
    /// Empty for a folder.
    pub commit: String,
    pub found: Vec<Found>,
}

/// What an apply did to one server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub name: ServerName,
    pub digest: Digest,
    pub outcome: Outcome,
    /// Of the server's document afterwards.
    pub version: u64,
    /// The other source that it was taken from until now.
    pub left: Option<Source>,
}

/// Sources on disk and in the store.
#[derive(Debug, Clone)]
pub struct Sources<S> {
    documents: Documents<S>,
    contexts: Contexts,
    repositories: Arc<dyn Repositories>,
    /// One fetch at a time of each.
    fetching: Arc<Mutex<HashMap<SourceId, Arc<tokio::sync::Mutex<()>>>>>,
    /// Where servers can run.
    nodes: Arc<BTreeSet<NodeName>>,
}

impl<S: Store> Sources<S> {
    pub fn new(documents: Documents<S>, contexts: Contexts, repositories: Arc<dyn Repositories>) -> Self {
        let nodes = Arc::new(BTreeSet::from([NodeName::local()]));
        Self { documents, contexts, repositories, fetching: Arc::default(), nodes }
    }

    /// Of a site with more machines than its own.
    #[must_use]
    pub fn with_nodes(mut self, names: impl IntoIterator<Item = NodeName>) -> Self {
        let own = NodeName::local();
        self.nodes = Arc::new(names.into_iter().chain([own]).collect());
        self
    }

    pub fn contexts(&self) -> &Contexts {
        &self.contexts
    }

    /// Fetches a Git source and reads what its branch holds now.
    ///
    /// # Errors
    /// The repository is away, or what it holds can't be taken.
    pub async fn look(&self, place: &Place) -> Result<Look, Error> {
        let Place::Git { url, branch } = place else {
            return Err(Error::Empty { what: "repository", place: format!("{place:?}") });
        };
        let address = Address::new(url, branch)?;
        let id = place.id();
        let turn = {
            let mut fetching = self.fetching.lock().unwrap_or_else(PoisonError::into_inner);
            fetching.entry(id.clone()).or_default().clone()
        };
        let _turn = turn.lock().await;
        let (commit, tree) = self.repositories.head(&id, address).await?;
        self.read(place.clone(), commit, tree).await
    }

    /// Reads a packed folder.
    ///
    /// # Errors
    /// It is no such thing, or is hostile.
    pub async fn unpack(&self, origin: &str, archive: Vec<u8>) -> Result<Look, Error> {
        let place = Place::Folder { origin: origin.to_owned() };
        let unpacked = aside(move || Tree::from_tar(&archive)).await;
        let tree = unpacked.map_err(std::io::Error::other)??;
        self.read(place, String::new(), tree).await
    }

    async fn read(&self, place: Place, commit: String, tree: Tree) -> Result<Look, Error> {
        // Hashing up to 64 MiB is no work for a thread that others wait for.
        let found = aside(move || context::find(&tree)).await.map_err(std::io::Error::other)?;
        let mut look = Look { place, commit, found: found.map_err(Error::TooMuch)? };
        self.name_by_folder(&mut look).await?;
        for found in &mut look.found {
            found.refuse_unknown_node(&self.nodes);
        }
        Ok(look)
    }

    /// A definition that can't be read is that of the server that was taken from its folder.
    async fn name_by_folder(&self, look: &mut Look) -> Result<(), Error> {
        if look.found.iter().all(|found| found.name().is_some()) {
            return Ok(());
        }
        let Some(source) = self.documents.source(look.place.id().as_str()).await? else { return Ok(()) };
        let mut folders = HashMap::new();
        for name in &source.value.servers {
            if let Some(server) = self.documents.server(name).await? {
                folders.insert(server.value.folder, name.clone());
            }
        }
        for found in &mut look.found {
            if let Err(faulty) = &mut found.read
                && faulty.name.is_none()
            {
                faulty.name = folders.get(&found.folder).cloned();
            }
        }
        Ok(())
    }

    /// Everything in a look that can be taken, on disk. Before the store names it.
    ///
    /// # Errors
    /// The disk is full, or refuses.
    pub async fn keep(&self, look: &Look, now: Timestamp) -> Result<(), Error> {
        for found in &look.found {
            if let Ok(readable) = &found.read {
                self.contexts.put(readable, now).await?;
            }
        }
        Ok(())
    }

    /// Takes over what somebody applies: all of it, or nothing.
    ///
    /// # Errors
    /// [`Error::Faulty`] with every fault of every definition.
    pub async fn apply(
        &self,
        look: &Look,
        cause: &Cause,
        now: Timestamp,
    ) -> Result<(Edit, Vec<Applied>), Error> {
        let mut faults = Vec::new();
        let mut readable = Vec::new();
        for found in &look.found {
            match &found.read {
                Ok(one) => readable.push((found, one)),
                Err(faulty) => {
                    faults.extend(faulty.faults.iter().map(|fault| (fault.place.clone(), fault.why.clone())));
                }
            }
        }
        if !faults.is_empty() {
            return Err(Error::Faulty(faults));
        }
        if readable.is_empty() {
            let place = match &look.place {
                Place::Git { url, branch } => format!("branch {branch} of {url}"),
                Place::Folder { origin } => origin.clone(),
            };
            return Err(Error::Empty { what: "server.yaml", place });
        }
        if let Err((name, problem)) = self.check_parents(&readable).await? {
            let child = readable.iter().find(|(_, one)| one.stored.definition.name == name);
            let fault = child.map_or((String::new(), problem.clone()), |(found, one)| {
                let fault = one.wrong_parent(&found.folder, problem);
                (fault.place, fault.why)
            });
            return Err(Error::Faulty(vec![fault]));
        }
        let mut taking = Taking::new(self, look, now).await?;
        let mut applied = Vec::new();
        for (found, one) in readable {
            applied.push(taking.take(found, one, cause.clone(), By::Hand).await?);
        }
        taking.orphan_others().await?;
        taking.source.value.commit.clone_from(&look.commit);
        taking.hold_unchanged();
        Ok((taking.finish()?, applied))
    }

    /// Follows signals that said that definitions changed: takes over what may be taken, and notes what may not.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn follow(&self, look: &Look, asked: &[Pending], now: Timestamp) -> Result<Edit, Error> {
        let mut taking = Taking::new(self, look, now).await?;
        let mut refused: BTreeMap<ServerName, String> = BTreeMap::new();
        let mut candidates: Vec<(&Found, &Readable)> =
            look.found.iter().filter_map(|found| Some((found, found.read.as_ref().ok()?))).collect();
        // One with an impossible parent is refused, and what is left is looked at again.
        while let Err((name, problem)) = self.check_parents(&candidates).await? {
            let before = candidates.len();
            if let Some((found, one)) = candidates.iter().find(|(_, one)| one.stored.definition.name == name)
            {
                let fault = one.wrong_parent(&found.folder, problem);
                refused.insert(name.clone(), format!("{}: {}", fault.place, fault.why));
            }
            candidates.retain(|(_, one)| one.stored.definition.name != name);
            if candidates.len() == before {
                break;
            }
        }
        for (found, one) in candidates {
            let name = &one.stored.definition.name;
            let about: Vec<&Pending> = asked.iter().filter(|pending| pending.server == *name).collect();
            let reference = one.stored.reference(&look.commit);
            let id = taking.source.value.id.clone();
            let take = match taking.server(name).await? {
                // It came with this commit, and says itself whether it may.
                None => one.stored.definition.update.definition == kiln_model::definition::Mode::Auto,
                Some(server) => server.source == id && head::may_take_over(server, &reference, &about),
            };
            // The server's own signal where there is one, else that of whoever came along with it.
            if take
                && let Some(cause) =
                    about.first().or(asked.first().as_ref()).map(|pending| pending.cause.clone())
            {
                taking.take(found, one, cause, By::Signal).await?;
            }
        }
        taking.note_refusals(&refused).await?;
        taking.orphan_others().await?;
        for pending in asked {
            if let Some(server) = taking.server(&pending.server).await?
                && !server.is_following(&pending.cause.id)
            {
                signal::in_vain(server, std::slice::from_ref(&pending.cause), now);
            }
        }
        taking.source.value.looked(&look.commit, asked);
        taking.finish()
    }

    /// Notes what a look shows without taking anything over: what is gone from the source, and what can't be taken.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn observe(&self, look: &Look, now: Timestamp) -> Result<Edit, Error> {
        let mut taking = Taking::new(self, look, now).await?;
        taking.note_refusals(&BTreeMap::new()).await?;
        taking.orphan_others().await?;
        taking.finish()
    }

    async fn check_parents(
        &self,
        readable: &[(&Found, &Readable)],
    ) -> Result<Result<(), (ServerName, String)>, Error> {
        let mut parents = BTreeMap::new();
        let mut changed = Vec::new();
        let mut unknown = Vec::new();
        for (_, one) in readable {
            let parent = one.stored.definition.parent().cloned();
            unknown.extend(parent.clone());
            changed.push(one.stored.definition.name.clone());
            parents.insert(one.stored.definition.name.clone(), parent);
        }
        // The servers above them; a circle ends where it comes back to what is known.
        while let Some(name) = unknown.pop() {
            if parents.contains_key(&name) {
                continue;
            }
            let Some(server) = self.documents.server(&name).await?.filter(|server| !server.value.removed)
            else {
                continue;
            };
            let parent = server.value.head.parent;
            unknown.extend(parent.clone());
            parents.insert(name, parent);
        }
        Ok(graph::check(&parents, &changed).map_err(|(name, illegal)| (name, illegal.to_string())))
    }
}

/// Servers and their source while definitions are taken over, then one change of the store.
struct Taking<'a, S> {
    documents: &'a Documents<S>,
    contexts: &'a Contexts,
    look: &'a Look,
    now: Timestamp,
    edit: Edit,
    source: Read<Source>,
    source_before: Option<Source>,
    servers: BTreeMap<ServerName, Touched>,
    written: BTreeSet<Digest>,
}

struct Touched {
    version: u64,
    before: Option<Server>,
    after: Option<Server>,
    told: Vec<kiln_builder_core::Told>,
}

impl<'a, S: Store> Taking<'a, S> {
    async fn new(sources: &'a Sources<S>, look: &'a Look, now: Timestamp) -> Result<Self, Error> {
        let Sources { documents, contexts, .. } = sources;
        let known = documents.source(look.place.id().as_str()).await?;
        let source_before = known.as_ref().map(|source| source.value.clone());
        let source = known.unwrap_or_else(|| Read { version: 0, value: Source::new(look.place.clone()) });
        let (servers, written) = (BTreeMap::new(), BTreeSet::new());
        let edit = Edit::new(now);
        Ok(Self { documents, contexts, look, now, edit, source, source_before, servers, written })
    }

    async fn touched(&mut self, name: &ServerName) -> Result<&mut Touched, Error> {
        if !self.servers.contains_key(name) {
            let read = self.documents.server(name).await?;
            let version = read.as_ref().map_or(0, |read| read.version);
            let before = read.map(|read| read.value);
            let after = before.clone();
            self.servers.insert(name.clone(), Touched { version, before, after, told: Vec::new() });
        }
        self.servers.get_mut(name).ok_or_else(|| Error::TooMuch(format!("server {name} is not there")))
    }

    async fn server(&mut self, name: &ServerName) -> Result<Option<&mut Server>, Error> {
        Ok(self.touched(name).await?.after.as_mut())
    }

    async fn take(&mut self, found: &Found, one: &Readable, cause: Cause, by: By) -> Result<Applied, Error> {
        let name = one.stored.definition.name.clone();
        self.write_definition(one).await?;
        let taken = Taken {
            source: self.source.value.id.clone(),
            folder: found.folder.clone(),
            definition: one.stored.reference(&self.look.commit),
        };
        let now = self.now;
        let documents = self.documents;
        let touched = self.touched(&name).await?;
        let awaited = match touched.after.as_ref().and_then(|server| server.building.as_ref()) {
            Some(building) => documents.build(&building.build).await?.map(|read| read.value),
            None => None,
        };
        let former = touched.before.as_ref().map(|server| server.source.clone());
        let (server, outcome, told) =
            head::take_over(touched.after.take(), &name, taken, cause, by, awaited.as_ref(), now);
        touched.told.extend(told);
        let version = touched.version + u64::from(touched.before.as_ref() != Some(&server));
        touched.after = Some(server);
        // One that was removed followed nothing.
        let left = self.leave(former, &name).await?.filter(|_| outcome != Outcome::Created);
        self.source.value.servers.insert(name.clone());
        Ok(Applied { name, digest: one.stored.digest, outcome, version, left })
    }

    /// A server that moves to this source is no longer another's, which is given.
    async fn leave(&mut self, former: Option<SourceId>, name: &ServerName) -> Result<Option<Source>, Error> {
        let Some(former) = former.filter(|former| *former != self.source.value.id) else { return Ok(None) };
        let Some(mut other) = self.documents.source(former.as_str()).await? else { return Ok(None) };
        if other.value.servers.remove(name) {
            if other.value.servers.is_empty() {
                self.edit.delete_source(other.version, &other.value.id);
            } else {
                self.edit.put_source(other.version, &other.value)?;
            }
        }
        Ok(Some(other.value))
    }

    async fn write_definition(&mut self, one: &Readable) -> Result<(), Error> {
        let stored = &one.stored;
        if self.written.insert(stored.digest) && self.documents.definition(&stored.digest).await?.is_none() {
            self.edit.put(definition::KIND, &stored.digest.hex(), 0, stored)?;
        }
        let context = stored.image_context;
        if self.written.insert(context) && self.documents.image_context(&context).await?.is_none() {
            let written = match self.contexts.first_written(&stored.digest).await {
                // It is only tried whether it can be taken.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => self.now,
                written => written?,
            };
            // Whole seconds: what file systems and archives keep of it differs below that.
            let first_applied = Timestamp::from_second(written.as_second()).unwrap_or(written);
            let context = ImageContext { digest: context, first_applied };
            self.edit.put(IMAGE_CONTEXT_KIND, &context.digest.hex(), 0, &context)?;
        }
        Ok(())
    }

    /// What is in the source and can't be taken; and what was so, and is mended.
    async fn note_refusals(&mut self, others: &BTreeMap<ServerName, String>) -> Result<(), Error> {
        let (look, id) = (self.look, self.source.value.id.clone());
        for found in &look.found {
            let Some(name) = found.name().cloned() else { continue };
            let problem = match &found.read {
                Err(faulty) => Some(faulty.problem()),
                Ok(_) => others.get(&name).cloned(),
            };
            let refused = problem.map(|problem| Refused {
                digest: found.digest(),
                commit: look.commit.clone(),
                problem,
            });
            let touched = self.touched(&name).await?;
            let Some(server) = touched.after.as_mut().filter(|server| server.source == id && !server.removed)
            else {
                continue;
            };
            match refused {
                Some(refused) => touched.told.extend(head::refuse(server, refused)),
                None if found.digest() == server.head.digest => {
                    head::seen_unchanged(server);
                }
                None => {}
            }
        }
        Ok(())
    }

    async fn orphan_others(&mut self) -> Result<(), Error> {
        let look = self.look;
        let there: BTreeSet<_> = look.found.iter().filter_map(Found::name).collect();
        let gone: Vec<_> =
            self.source.value.servers.iter().filter(|name| !there.contains(name)).cloned().collect();
        for name in gone {
            let touched = self.touched(&name).await?;
            if let Some(server) = &mut touched.after {
                touched.told.extend(head::orphan(server));
            }
        }
        Ok(())
    }

    /// That a server is as the person wants it is an answer too: one that was removed before is not what was read.
    fn hold_unchanged(&mut self) {
        let unchanged = self.servers.iter().filter(|(_, touched)| touched.before == touched.after);
        for (name, touched) in unchanged {
            self.edit.expect(server::KIND, name.as_str(), touched.version);
        }
    }

    fn finish(mut self) -> Result<Edit, Error> {
        for touched in self.servers.into_values() {
            if let Some(after) = &touched.after
                && touched.before.as_ref() != Some(after)
            {
                let before = touched.before.as_ref().map(standing).unwrap_or_default();
                self.edit.decided(before, after, &touched.told);
                self.edit.put_server(touched.version, after, &touched.told)?;
            }
        }
        // A source that only was looked at, and that nothing was taken from, is not remembered.
        let is_news = self.source_before.as_ref() != Some(&self.source.value);
        if is_news && (self.source_before.is_some() || !self.source.value.servers.is_empty()) {
            self.edit.put_source(self.source.version, &self.source.value)?;
        }
        Ok(self.edit)
    }
}

/// What somebody who applies says.
pub fn apply_cause(request_id: &str, actor: &str, look: &Look, now: Timestamp) -> Cause {
    let summary = match &look.place {
        Place::Git { url, branch } => {
            format!("{actor} applied {url} {branch} at {}", look.commit.get(..12).unwrap_or(&look.commit))
        }
        Place::Folder { origin } => format!("{actor} applied {origin}"),
    };
    Cause {
        kind: CauseKind::DefinitionApplied,
        id: request_id.to_owned(),
        summary,
        actor: actor.to_owned(),
        time: now,
        traceparent: kiln_service::trace::current(),
    }
}
