//! The builder's documents in its store, and a change of them under construction.

use jiff::Timestamp;
use kiln_builder_core::build::{self, Build};
use kiln_builder_core::definition::{self, ImageContext, StoredDefinition};
use kiln_builder_core::server::{self, InForce, Server};
use kiln_builder_core::source::{self, Source, SourceId};
use kiln_builder_core::{Told, plan};
use kiln_model::digest::Digest;
use kiln_model::event::{EventType, NewEvent, Service};
use kiln_model::lock::Lock;
use kiln_model::name::{BuildId, ServerName};
use kiln_model::revision::{PackageVersions, Revision};
use kiln_store::{AuditRecord, Batch, Change, Document, Error, Expect, Store, Watermark, decode, encode};
use prost::Message;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::wire;

pub const REVISION_KIND: &str = "revision";
pub const LOCK_KIND: &str = "lock";
pub const IMAGE_KIND: &str = "image";
pub const HOLD_KIND: &str = "hold";
/// Of every document that is defined here.
pub const SCHEMA: u32 = 1;

/// A document as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Read<T> {
    /// 0 where it was not there.
    pub version: u64,
    pub value: T,
}

/// A revision, and what it put in force; nothing where it is a removal.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StoredRevision {
    pub revision: Revision,
    pub in_force: Option<InForce>,
}

/// An image that a build made. It is kept for as long as anything may need it.
///
/// Whoever comes to need it writes its document in the same commit, and so does its removal: of the two, one is refused.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StoredImage {
    pub digest: Digest,
    pub server: ServerName,
    pub lock_key: Digest,
    pub build: BuildId,
    pub key_id: String,
    pub packages: PackageVersions,
    /// When a build last came to it.
    pub created: Timestamp,
}

/// Images that somebody needs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StoredHold {
    pub images: Vec<Digest>,
}

/// The build that holds a lock key's slot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StoredSlot {
    pub build: BuildId,
}

pub fn revision_id(server: &ServerName, generation: u64) -> String {
    // Of one width, so that the order of ids is that of generations.
    format!("{server}/{generation:020}")
}

/// Typed access to a store.
#[derive(Debug, Clone)]
pub struct Documents<S> {
    store: S,
}

impl<S: Store> Documents<S> {
    pub fn new(store: S) -> Self {
        Self { store }
    }

    pub fn store(&self) -> &S {
        &self.store
    }

    async fn read<T: DeserializeOwned>(
        &self,
        kind: &str,
        id: &str,
        schema: u32,
    ) -> Result<Option<Read<T>>, Error> {
        let Some(document) = self.store.get(kind, id).await? else { return Ok(None) };
        Ok(Some(Read { version: document.version, value: decode(&document, schema)? }))
    }

    pub async fn server(&self, name: &ServerName) -> Result<Option<Read<Server>>, Error> {
        let read = self.read(server::KIND, name.as_str(), server::SCHEMA).await?;
        Ok(read.map(|Read { version, value }: Read<Server>| Read {
            version,
            value: value.numbered_above(self.store.numbers_above()),
        }))
    }

    pub async fn build(&self, id: &BuildId) -> Result<Option<Read<Build>>, Error> {
        self.read(build::KIND, &id.to_string(), build::SCHEMA).await
    }

    pub async fn source(&self, id: &str) -> Result<Option<Read<Source>>, Error> {
        self.read(source::KIND, id, source::SCHEMA).await
    }

    pub async fn definition(&self, digest: &Digest) -> Result<Option<StoredDefinition>, Error> {
        let read = self.read(definition::KIND, &digest.hex(), definition::SCHEMA).await?;
        Ok(read.map(|read| read.value))
    }

    pub async fn image_context(&self, digest: &Digest) -> Result<Option<ImageContext>, Error> {
        let read = self.read(definition::IMAGE_CONTEXT_KIND, &digest.hex(), definition::SCHEMA).await?;
        Ok(read.map(|read| read.value))
    }

    pub async fn lock(&self, key: &Digest) -> Result<Option<Lock>, Error> {
        Ok(self.read(LOCK_KIND, &key.hex(), SCHEMA).await?.map(|read| read.value))
    }

    pub async fn image(&self, digest: &Digest) -> Result<Option<Read<StoredImage>>, Error> {
        self.read(IMAGE_KIND, &digest.hex(), SCHEMA).await
    }

    pub async fn hold(&self, holder: &str) -> Result<Option<Read<StoredHold>>, Error> {
        self.read(HOLD_KIND, holder, SCHEMA).await
    }

    pub async fn revision(
        &self,
        server: &ServerName,
        generation: u64,
    ) -> Result<Option<StoredRevision>, Error> {
        let read = self.read(REVISION_KIND, &revision_id(server, generation), SCHEMA).await?;
        Ok(read.map(|read| read.value))
    }

    /// Which build holds a lock key's slot.
    pub async fn slot_holder(&self, key: &Digest) -> Result<Option<Read<StoredSlot>>, Error> {
        self.read(build::SLOT_KIND, &key.hex(), build::SCHEMA).await
    }

    /// What is there for a lock key, and the version of the slot's document.
    pub async fn slot(&self, key: &Digest) -> Result<Read<plan::Slot>, Error> {
        let Some(Read { version, value: StoredSlot { build: id } }) = self.slot_holder(key).await? else {
            return Ok(Read { version: 0, value: plan::Slot::Free });
        };
        let value = match self.build(&id).await? {
            Some(Read { value: Build { state: build::State::Succeeded { image }, .. }, .. }) => {
                plan::Slot::Succeeded { build: id, image }
            }
            Some(build) if build.value.state.holds_slot() => plan::Slot::Active(id),
            _ => plan::Slot::Free,
        };
        Ok(Read { version, value })
    }

    /// Every live document of a kind, as it is stored.
    pub async fn documents(&self, kind: &str, prefix: &str) -> Result<Vec<Document>, Error> {
        let mut found: Vec<Document> = Vec::new();
        loop {
            let after = found.last().map(|last| last.id.clone());
            let page = self.store.list(kind, prefix, after.as_deref(), 500).await?;
            if page.is_empty() {
                return Ok(found);
            }
            found.extend(page);
        }
    }

    /// Every live document of a kind.
    pub async fn all<T: DeserializeOwned>(&self, kind: &str, prefix: &str) -> Result<Vec<Read<T>>, Error> {
        self.documents(kind, prefix).await?.iter().map(typed).collect()
    }

    /// As [`Documents::all`], where one that can't be read holds no other back.
    pub async fn readable<T: DeserializeOwned>(&self, kind: &str) -> Result<Vec<Read<T>>, Error> {
        let documents = self.documents(kind, "").await?;
        Ok(documents.iter().filter_map(|document| readable(document)).collect())
    }
}

/// Reads a document where it can be read; another is said and passed over, as nothing of what it is about can be done.
pub fn readable<T: DeserializeOwned>(document: &Document) -> Option<Read<T>> {
    typed(document).inspect_err(|error| tracing::error!(%error, "a document can't be read")).ok()
}

/// Reads a document of a listing.
///
/// # Errors
/// As [`kiln_store::decode`].
pub fn typed<T: DeserializeOwned>(document: &Document) -> Result<Read<T>, Error> {
    Ok(Read { version: document.version, value: decode(document, SCHEMA)? })
}

/// A change of the store under construction.
#[derive(Debug)]
pub struct Edit {
    batch: Batch,
    now: Timestamp,
}

impl Edit {
    pub fn new(now: Timestamp) -> Self {
        Self { batch: Batch::default(), now }
    }

    pub fn is_empty(&self) -> bool {
        self.batch.changes.is_empty()
    }

    pub fn finish(self) -> Batch {
        self.batch
    }

    pub fn put<T: Serialize>(&mut self, kind: &str, id: &str, expected: u64, value: &T) -> Result<(), Error> {
        let body = encode(kind, id, value)?;
        let (kind, id) = (kind.to_owned(), id.to_owned());
        self.batch.changes.push(Change::Put { kind, id, expected, schema: SCHEMA, body });
        Ok(())
    }

    pub fn delete(&mut self, kind: &str, id: &str, expected: u64) {
        self.batch.changes.push(Change::Delete { kind: kind.to_owned(), id: id.to_owned(), expected });
    }

    pub fn expect(&mut self, kind: &str, id: &str, version: u64) {
        self.batch.expects.push(Expect { kind: kind.to_owned(), id: id.to_owned(), version });
    }

    pub fn watermark(&mut self, source_kind: &str, source_id: &str, version: u64) {
        let (source_kind, source_id) = (source_kind.to_owned(), source_id.to_owned());
        self.batch.watermarks.push(Watermark { source_kind, source_id, version });
    }

    pub fn audit(&mut self, record: AuditRecord) {
        self.batch.audit.push(record);
    }

    pub(crate) fn now(&self) -> Timestamp {
        self.now
    }

    pub fn put_image(&mut self, version: u64, image: &StoredImage) -> Result<(), Error> {
        self.put(IMAGE_KIND, &image.digest.hex(), version, image)
    }

    pub fn put_source(&mut self, version: u64, source: &Source) -> Result<(), Error> {
        self.put(source::KIND, source.id.as_str(), version, source)
    }

    pub fn delete_source(&mut self, version: u64, id: &SourceId) {
        self.delete(source::KIND, id.as_str(), version);
    }

    /// Writes a server with what others are told of it.
    pub fn put_server(&mut self, version: u64, server: &Server, told: &[Told]) -> Result<(), Error> {
        self.put(server::KIND, server.name.as_str(), version, server)?;
        for told in told {
            self.tell(version + 1, server, told)?;
        }
        Ok(())
    }

    fn tell(&mut self, version: u64, server: &Server, told: &Told) -> Result<(), Error> {
        let definition = |problem: &str| {
            let server = wire::server(server, version);
            kiln_api::events::DefinitionChanged { server: Some(server), problem: problem.to_owned() }
                .encode_to_vec()
        };
        let (entity, verb, payload) = match told {
            Told::DefinitionApplied => ("definition", "applied", definition("")),
            Told::DefinitionOrphaned => ("definition", "orphaned", definition("")),
            Told::DefinitionRemoved => ("definition", "removed", definition("")),
            Told::DefinitionRefused { problem } => ("definition", "refused", definition(problem)),
            Told::PlanUnchanged { server, cause, lock_key } => {
                let payload = kiln_api::events::PlanUnchanged {
                    server: server.to_string(),
                    cause: Some(cause.clone().into()),
                    lock_key: lock_key.to_string(),
                };
                let trace = &cause.traceparent;
                self.event(
                    &server.clone(),
                    "plan",
                    "unchanged",
                    server::KIND,
                    server.as_str(),
                    version,
                    payload.encode_to_vec(),
                    trace,
                );
                return Ok(());
            }
            Told::RevisionCreated(revision) => return self.put_revision(server, revision),
            // Told with the build's own document.
            Told::BuildQueued
            | Told::BuildStarted
            | Told::BuildSucceeded
            | Told::BuildFailed
            | Told::BuildCancelled => {
                return Ok(());
            }
        };
        self.event(&server.name, entity, verb, server::KIND, server.name.as_str(), version, payload, "");
        Ok(())
    }

    fn put_revision(&mut self, server: &Server, revision: &Revision) -> Result<(), Error> {
        let id = revision_id(&revision.server, revision.generation);
        let in_force = server.in_force.clone().filter(|in_force| in_force.generation == revision.generation);
        self.put(REVISION_KIND, &id, 0, &StoredRevision { revision: revision.clone(), in_force })?;
        let message = wire::revision(revision, 1);
        let trace = message.cause.as_ref().map(|cause| cause.traceparent.clone()).unwrap_or_default();
        let payload = kiln_api::events::RevisionCreated { revision: Some(message) }.encode_to_vec();
        self.event(&revision.server, "revision", "created", REVISION_KIND, &id, 1, payload, &trace);
        Ok(())
    }

    /// Writes a build with what others are told of it.
    pub fn put_build(&mut self, version: u64, build: &Build, told: Option<Told>) -> Result<(), Error> {
        let id = build.id.to_string();
        self.put(build::KIND, &id, version, build)?;
        let verb = match told {
            Some(Told::BuildQueued) => {
                self.queued(build);
                "queued"
            }
            Some(Told::BuildStarted) => "started",
            Some(Told::BuildSucceeded) => "succeeded",
            Some(Told::BuildFailed) => "failed",
            Some(Told::BuildCancelled) => "cancelled",
            _ => return Ok(()),
        };
        let message = wire::build(build, version + 1);
        let payload = kiln_api::events::BuildChanged { build: Some(message) }.encode_to_vec();
        let trace = build.cause.traceparent.clone();
        self.event(build.server(), "build", verb, build::KIND, &id, version + 1, payload, &trace);
        Ok(())
    }

    /// A build that gave its lock key's slot up lets another have it.
    pub fn free_slot(&mut self, slot_version: u64, build: &Build) {
        self.delete(build::SLOT_KIND, &build.lock_key.hex(), slot_version);
    }

    #[expect(clippy::too_many_arguments, reason = "the columns of an event, each once")]
    fn event(
        &mut self,
        server: &ServerName,
        entity: &'static str,
        verb: &'static str,
        aggregate_kind: &str,
        aggregate_id: &str,
        aggregate_version: u64,
        payload: Vec<u8>,
        trace: &str,
    ) {
        // What follows from an event belongs under the span that it comes from; without one, under the cause's.
        let current = kiln_service::trace::current();
        let traceparent = if current.is_empty() { trace.to_owned() } else { current };
        self.batch.events.push(NewEvent {
            kind: EventType::new(Service::Builder, entity, verb),
            server: Some(server.clone()),
            aggregate_kind: aggregate_kind.to_owned(),
            aggregate_id: aggregate_id.to_owned(),
            aggregate_version,
            payload,
            time: self.now,
            traceparent,
        });
    }
}

#[cfg(test)]
mod tests {
    use kiln_test_earlier::{documents, read};

    use super::*;

    #[test]
    fn what_an_earlier_version_wrote_is_read() {
        for document in &documents(kiln_test_earlier::BUILDER) {
            match document.kind.as_str() {
                server::KIND => read::<Server>(document, server::SCHEMA),
                source::KIND => read::<Source>(document, source::SCHEMA),
                build::KIND => read::<Build>(document, build::SCHEMA),
                build::SLOT_KIND => read::<StoredSlot>(document, build::SCHEMA),
                definition::KIND => read::<StoredDefinition>(document, definition::SCHEMA),
                definition::IMAGE_CONTEXT_KIND => read::<ImageContext>(document, definition::SCHEMA),
                REVISION_KIND => read::<StoredRevision>(document, SCHEMA),
                LOCK_KIND => read::<Lock>(document, SCHEMA),
                IMAGE_KIND => read::<StoredImage>(document, SCHEMA),
                HOLD_KIND => read::<StoredHold>(document, SCHEMA),
                other => panic!("nobody reads {other}"),
            }
        }
    }
}
