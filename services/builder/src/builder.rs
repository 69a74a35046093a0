//! What every part of the builder works with, and the making of plans.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use kiln_builder_core::build;
use kiln_builder_core::definition::{DefinitionRef, StoredDefinition};
use kiln_builder_core::next::{Order, ParentImage};
use kiln_builder_core::plan::{self, Comparison, Made, Planned, Slot};
use kiln_builder_core::server::{ReleaseFile, Server};
use kiln_builder_core::{Illegal, Told};
use kiln_model::cause::Cause;
use kiln_model::definition::{Definition, Source, Step};
use kiln_model::digest::Digest;
use kiln_model::lock::Lock;
use kiln_model::name::{BuildId, ServerName};
use kiln_model::revision::PackageVersions;
use kiln_model::time::Millis;
use kiln_service::clock::Clock;
use kiln_store::Store;
use tracing::Instrument as _;

use crate::audit::standing;
use crate::bake::{BakeError, Current, DebianRoot, LogSink, ParentImage as BakeParent, ResolveRequest};
use crate::bakery::Bakery;
use crate::logs::Logs;
use crate::sources::Sources;
use crate::store::{Documents, Edit, LOCK_KIND, Read, StoredSlot};

/// Links that a parent's own parents are looked up through; [`kiln_builder_core::graph`] refuses longer chains.
const MAX_PARENTS: usize = 32;
/// Lines of resolving that a build's log begins with.
const MAX_SAID: usize = 500;
/// Times that a change is decided anew where others change the same documents.
pub const TRIES: u32 = 8;

/// The builder's state and means. Cheap to clone.
#[derive(Clone)]
pub struct Builder<S, K, C> {
    pub documents: Documents<S>,
    pub sources: Sources<S>,
    pub bakery: K,
    pub logs: Logs,
    pub clock: C,
}

/// A lock with what a plan needs beside it.
#[derive(Debug, Clone)]
pub struct Resolved {
    pub stored: StoredDefinition,
    pub definition: DefinitionRef,
    pub lock: Lock,
    pub key: Digest,
    pub parent_image: Option<Digest>,
    pub packages: PackageVersions,
    /// Those that an archive for security updates has.
    pub security: PackageVersions,
    pub release_files: Vec<ReleaseFile>,
    pub took: Millis,
    /// What resolving said.
    pub log: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] kiln_store::Error),
    #[error(transparent)]
    Bake(#[from] BakeError),
    #[error(transparent)]
    Illegal(#[from] Illegal),
    /// The image store or the folder of logs, in words.
    #[error("{0}")]
    Disk(String),
    /// A document that another one names is not there.
    #[error("{what} {id} is not in the store")]
    Lost { what: &'static str, id: String },
}

impl Error {
    /// Trying again, with nothing changed, may succeed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store(kiln_store::Error::Schema { .. } | kiln_store::Error::Unreadable { .. }) => false,
            Self::Store(_) | Self::Disk(_) => true,
            Self::Bake(error) => error.is_transient(),
            Self::Illegal(_) | Self::Lost { .. } => false,
        }
    }

    /// Somebody else changed what this was decided on.
    pub fn is_conflict(&self) -> bool {
        matches!(self, Self::Store(kiln_store::Error::Conflict { .. }) | Self::Illegal(Illegal::Stale { .. }))
    }
}

impl Resolved {
    pub fn planned(self, cause: Cause, further_causes: Vec<Cause>) -> Planned {
        Planned {
            definition: self.definition,
            lock_key: self.key,
            parent_image: self.parent_image,
            packages: self.packages,
            security: self.security,
            release_files: self.release_files,
            resolving: self.took,
            cause,
            further_causes,
        }
    }
}

impl<S: Store, K: Bakery, C: Clock> Builder<S, K, C> {
    pub fn now(&self) -> Timestamp {
        self.clock.now().wall
    }

    /// Resolves a definition's lock. `listener` hears what it says while it does.
    ///
    /// # Errors
    /// What the bake machinery says, or a document that is lost.
    pub async fn resolve(
        &self,
        server: &Server,
        definition: &DefinitionRef,
        parent: Option<&ParentImage>,
        pinned: Option<&Lock>,
        listener: Option<&LogSink>,
    ) -> Result<Resolved, Error> {
        let digest = definition.digest;
        let lost = |what: &'static str, id: String| Error::Lost { what, id };
        let stored = self
            .documents
            .definition(&digest)
            .await?
            .ok_or_else(|| lost("definition", digest.to_string()))?;
        let context = self.documents.image_context(&stored.image_context).await?;
        let context = context.ok_or_else(|| lost("image context", stored.image_context.to_string()))?;
        let bake_parent = match (parent, &definition.parent) {
            (Some(image), Some(name)) => {
                Some(BakeParent { digest: image.image, debian: self.debian_root(name).await? })
            }
            _ => None,
        };
        let name = server.name.clone();
        let said: Arc<Mutex<Vec<String>>> = Arc::default();
        let (keep, listener) = (said.clone(), listener.cloned());
        let request = ResolveRequest {
            definition: &stored.definition,
            context: &self.sources.contexts().folder(&digest),
            parent: bake_parent,
            timestamp: context.first_applied,
            pinned,
            current: self.current(server, &stored.definition).await?,
            log: Arc::new(move |line: &str| {
                tracing::debug!(server = %name, line, "resolving");
                if let Some(listener) = &listener {
                    listener(line);
                }
                let mut lines = keep.lock().unwrap_or_else(PoisonError::into_inner);
                if lines.len() < MAX_SAID {
                    lines.push(line.to_owned());
                }
            }),
        };
        let span = tracing::info_span!("resolve", server = %server.name, pinned = pinned.is_some());
        let began = self.clock.now().monotonic;
        let resolution = self.bakery.resolve(request).instrument(span).await?;
        let took = self.clock.now().monotonic.saturating_sub(began).into();
        let key =
            resolution.lock.key().map_err(|error| lost("lock of", format!("{}: {error}", server.name)))?;
        let mut packages = parent.map(|parent| parent.packages.clone()).unwrap_or_default();
        packages.extend(resolution.lock.packages());
        let mut security = parent.map(|parent| parent.security.clone()).unwrap_or_default();
        security.extend(resolution.security);
        let release_files = match resolution.release_files {
            Some(files) => {
                files.into_iter().map(|file| ReleaseFile { url: file.url, digest: file.digest }).collect()
            }
            // Nothing was asked: what was known stays true.
            None => {
                server.in_force.as_ref().map(|in_force| in_force.release_files.clone()).unwrap_or_default()
            }
        };
        let parent_image = parent.map(|parent| parent.image);
        let definition = definition.clone();
        let log = std::mem::take(&mut *said.lock().unwrap_or_else(PoisonError::into_inner));
        let lock = resolution.lock;
        Ok(Resolved {
            stored,
            definition,
            lock,
            key,
            parent_image,
            packages,
            security,
            release_files,
            took,
            log,
        })
    }

    /// What is in force, where a step of the definition is to be run again only for newer packages.
    async fn current(&self, server: &Server, definition: &Definition) -> Result<Option<Current>, Error> {
        let provisions = definition.image.steps.iter().any(|step| matches!(step, Step::Provision(_)));
        let Some(in_force) = server.in_force.as_ref().filter(|_| provisions) else { return Ok(None) };
        let lock = self.documents.lock(&in_force.lock_key).await?;
        Ok(lock.map(|lock| Current { lock, image: in_force.image }))
    }

    /// The archives that a parent's image was made from.
    async fn debian_root(&self, parent: &ServerName) -> Result<Option<DebianRoot>, Error> {
        let mut name = parent.clone();
        for _ in 0..MAX_PARENTS {
            let Some(server) = self.documents.server(&name).await? else { return Ok(None) };
            let Some(in_force) = server.value.in_force else { return Ok(None) };
            let digest = in_force.definition.digest;
            let Some(stored) = self.documents.definition(&digest).await? else {
                return Err(Error::Lost { what: "definition", id: digest.to_string() });
            };
            match stored.definition.image.from {
                Source::Server { name: above } => name = above,
                Source::Debian { suite, archives, .. } => {
                    let context = self.sources.contexts().folder(&digest);
                    return Ok(Some(DebianRoot { suite: Some(suite), archives, context }));
                }
                Source::Archive { archives, .. } | Source::Image { archives, .. } => {
                    let context = self.sources.contexts().folder(&digest);
                    return Ok(Some(DebianRoot { suite: None, archives, context }));
                }
                // What its image names as its suite, from the site's archives.
                Source::Containerfile(_) => {
                    let context = self.sources.contexts().folder(&digest);
                    return Ok(Some(DebianRoot { suite: None, archives: Vec::new(), context }));
                }
                Source::Scratch => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Resolves what a server is to be made of now.
    ///
    /// Where the newest packages are convicted, the definition goes out with those in force: bad packages hold a commit
    /// back no more than a bad commit holds packages back.
    ///
    /// # Errors
    /// As [`Builder::resolve`].
    pub async fn resolve_shippable(
        &self,
        server: &Server,
        order: &Order,
        listener: Option<&LogSink>,
    ) -> Result<Resolved, Error> {
        let resolve =
            |pinned| self.resolve(server, &order.definition, order.parent.as_ref(), pinned, listener);
        let newest = resolve(None).await?;
        let compare = |resolved: &Resolved| {
            plan::compare(server, &resolved.key, &resolved.definition.run_digest, &resolved.packages)
        };
        let (Comparison::Held(_), Some(in_force)) = (compare(&newest), &server.in_force) else {
            return Ok(newest);
        };
        let Some(lock) = self.documents.lock(&in_force.lock_key).await? else { return Ok(newest) };
        match resolve(Some(&lock)).await {
            Ok(pinned) if matches!(compare(&pinned), Comparison::Image | Comparison::RunOnly) => Ok(pinned),
            // It can't be had without the convicted ones; the objection to the newest says why.
            _ => Ok(newest),
        }
    }

    /// Adds to a change that it comes to need an image.
    ///
    /// # Errors
    /// [`Illegal::Stale`] where the image was removed.
    pub async fn need(&self, edit: &mut Edit, image: &Digest) -> Result<(), Error> {
        let Some(Read { version, value }) = self.documents.image(image).await? else {
            let detail = "nobody needed it, and it was removed".to_owned();
            return Err(Illegal::Stale { what: format!("image {}", image.short()), detail }.into());
        };
        Ok(edit.put_image(version, &value)?)
    }

    /// What a plan leads to, as a change of the store.
    ///
    /// # Errors
    /// [`Illegal::Stale`] where the plan is about what is no longer so.
    pub async fn decide(
        &self,
        read: Read<Server>,
        planned: Planned,
        stored: &StoredDefinition,
        lock: &Lock,
    ) -> Result<(Edit, Made), Error> {
        let now = self.now();
        let slot = self.documents.slot(&planned.lock_key).await?;
        let lock_key = planned.lock_key;
        let was_active = matches!(slot.value, Slot::Active(_));
        let before = standing(&read.value);
        let decided = plan::planned(read.value, planned, stored, slot.value, now)?;
        let mut edit = Edit::new(now);
        edit.decided(before, &decided.server, &decided.told);
        edit.put_server(read.version, &decided.server, &decided.told)?;
        if let Made::Queued(build) = &decided.made {
            edit.put_build(0, build, Some(Told::BuildQueued))?;
            let holder = StoredSlot { build: build.id.clone() };
            edit.put(build::SLOT_KIND, &lock_key.hex(), slot.version, &holder)?;
        } else if was_active {
            edit.expect(build::SLOT_KIND, &lock_key.hex(), slot.version);
        }
        if matches!(decided.made, Made::Queued(_) | Made::Revision(_) | Made::Joined(_))
            && self.documents.lock(&lock_key).await?.is_none()
        {
            edit.put(LOCK_KIND, &lock_key.hex(), 0, lock)?;
        }
        let mut needed = BTreeSet::new();
        if matches!(decided.made, Made::Revision(_)) {
            needed.extend(decided.server.in_force.iter().map(|in_force| in_force.image));
        }
        // Of an image that is there already the parent has no part any more.
        if matches!(decided.made, Made::Queued(_) | Made::Joined(_)) {
            needed.extend(decided.server.building.iter().filter_map(|building| building.parent_image));
        }
        for image in &needed {
            self.need(&mut edit, image).await?;
        }
        Ok((edit, decided.made))
    }

    /// Makes a plan that is wanted, and commits what it leads to.
    ///
    /// # Errors
    /// The store refuses. That no plan can be made is noted with the server, and is no error here.
    pub async fn make_plan(&self, name: &ServerName, order: &Order) -> Result<(), Error> {
        let trace = order.causes.first().map(|cause| cause.traceparent.clone()).unwrap_or_default();
        let span = kiln_service::trace::span_under(&trace, "plan");
        self.make_plan_in(name, order).instrument(span).await
    }

    async fn make_plan_in(&self, name: &ServerName, order: &Order) -> Result<(), Error> {
        let Some(read) = self.documents.server(name).await? else { return Ok(()) };
        let mut causes = order.causes.clone();
        if causes.is_empty() {
            return Ok(());
        }
        let resolved = match self.resolve_shippable(&read.value, order, None).await {
            Ok(resolved) => resolved,
            Err(Error::Store(error)) => return Err(error.into()),
            Err(error) => return self.plan_failed(name, order, &error).await,
        };
        let cause = causes.remove(0);
        let (stored, lock) = (resolved.stored.clone(), resolved.lock.clone());
        let said = resolved.log.clone();
        let planned = resolved.planned(cause, causes);
        for _ in 0..TRIES {
            let Some(read) = self.documents.server(name).await? else { return Ok(()) };
            let done = match self.decide(read, planned.clone(), &stored, &lock).await {
                Ok((edit, made)) => self.documents.store().commit(edit.finish()).await.map(|_| made),
                // It is planned anew from what is there now.
                Err(Error::Illegal(illegal)) => {
                    tracing::info!(server = %name, %illegal, "a plan came too late");
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            match done {
                Err(kiln_store::Error::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
                Ok(made) => {
                    match made {
                        Made::Unchanged => tracing::info!(server = %name, "planned: nothing changed"),
                        Made::Held { problem } => {
                            tracing::warn!(server = %name, problem, "planned: held back")
                        }
                        Made::Revision(revision) => {
                            tracing::info!(server = %name, generation = revision.generation, "planned: a revision");
                        }
                        Made::Joined(build) => {
                            tracing::info!(server = %name, %build, "planned: joins a build")
                        }
                        Made::Queued(build) => {
                            self.log_resolving(&build.id, &said);
                            tracing::info!(server = %name, build = %build.id, "planned: a build")
                        }
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Tells in a build's log how its lock came to be: it is part of how long the build takes.
    pub fn log_resolving(&self, build: &BuildId, said: &[String]) {
        let log = self.logs.writer(build);
        for line in said {
            log.line(line);
        }
    }

    async fn plan_failed(&self, name: &ServerName, order: &Order, error: &Error) -> Result<(), Error> {
        tracing::warn!(server = %name, %error, "could not be planned");
        for _ in 0..TRIES {
            let Some(mut read) = self.documents.server(name).await? else { return Ok(()) };
            // What was planned is no longer wanted: its failure says nothing.
            if read.value.effective().map(|effective| effective.digest) != Some(order.definition.digest) {
                return Ok(());
            }
            let now = self.now();
            let problem = format!("could not be planned: {error}");
            plan::plan_failed(&mut read.value, &order.causes, problem, error.is_transient(), now);
            let mut edit = Edit::new(now);
            edit.put_server(read.version, &read.value, &[])?;
            match self.documents.store().commit(edit.finish()).await {
                Err(kiln_store::Error::Conflict { .. }) => {}
                other => return other.map(drop).map_err(Error::from),
            }
        }
        Ok(())
    }
}
