//! What a new node does with what it finds: the store says what should be, the machine what is.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::fs;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use jiff::{SignedDuration, Timestamp};
use kiln_model::name::InstanceId;
use kiln_service::error::ApiError;
use kiln_store::Store;

use crate::cgroup::{self, Cgroup};
use crate::exits::Watched;
use crate::failure::Failure;
use crate::names::Names;
use crate::network::{bridge, firewall};
use crate::node::{Node, blocking};
use crate::record::{Fact, Record, State};
use crate::{rootfs, runtime};

/// How long the records of ended instances are kept, with logs and exit codes.
const KEPT: SignedDuration = SignedDuration::from_hours(7 * 24);

/// What carries the site's id and was in no record at boot.
#[derive(Debug, Default)]
pub(crate) struct Orphans {
    instances: BTreeSet<String>,
    namespaces: BTreeSet<String>,
}

/// Work whose parts do not wait for each other: where one fails, the others are done all the same.
#[derive(Debug, Default)]
struct Parts {
    failed: Vec<String>,
}

impl Parts {
    fn note(&mut self, what: impl Display, outcome: Result<(), impl Display>) {
        if let Err(error) = outcome {
            self.failed.push(format!("{what}: {error}"));
        }
    }

    fn outcome(self) -> Result<(), ApiError> {
        if self.failed.is_empty() { Ok(()) } else { Err(ApiError::Unavailable(self.failed.join("; "))) }
    }
}

impl<S: Store> Node<S> {
    /// Adopts what runs, and takes what has ended off the edge, all at once. Everything else that there is to be done is
    /// left to [`Node::tend`], so that nothing that can't be mended keeps the node from serving.
    pub async fn take_over(self: &Arc<Self>) {
        let mut ended = Vec::new();
        for record in self.book.all().into_iter().map(|held| held.value) {
            let id = record.spec.id.clone();
            let State::Running { process } = &record.state else { continue };
            match process.open() {
                Ok(Some(pidfd)) => self.watch_for_end(id, pidfd),
                Ok(None) => ended.push(id),
                Err(error) => {
                    tracing::error!(instance = %id, %error, "its end will be noticed at the next look");
                }
            }
        }
        ended.retain(|id| self.note_end(id));
        if let Err(error) = self.restore_edge().await {
            tracing::error!(%error, "the edge could not be brought to what is wanted; trying again at the next look");
        }
        // On record before anybody is told of instances: one that is listed as running and does not answer is taken for
        // sick. What else there is to do for them goes on beside.
        for id in ended {
            if let Err(error) = self.put_on_record(&id, Watched::No).await {
                tracing::error!(instance = %id, %error, "its end could not be recorded; trying again beside");
            }
            let node = Arc::clone(self);
            tokio::spawn(async move { node.see_to_end(&id, Watched::No).await });
        }
        // Later a launch may be ahead of its record.
        match self.find_orphans() {
            Ok(orphans) => *self.orphans.lock().unwrap_or_else(PoisonError::into_inner) = orphans,
            Err(error) => {
                tracing::error!(%error, "what no record knows stays until the node is started again");
            }
        }
    }

    fn find_orphans(&self) -> Result<Orphans, Failure> {
        let records = self.book.all().into_iter().map(|held| held.value);
        let there: Vec<Record> =
            records.filter(|record| !record.is_over() || record.is_left_over()).collect();
        let ids: BTreeSet<String> = there.iter().map(|record| record.spec.id.to_string()).collect();
        let plugs = there.iter().filter_map(|record| record.plug.as_ref());
        let namespaces: BTreeSet<&String> = plugs.map(|plug| &plug.namespace).collect();
        let mut known = self.pool.known()?;
        known.retain(|name| !namespaces.contains(name));
        Ok(Orphans {
            instances: made(&self.names)?.difference(&ids).cloned().collect(),
            namespaces: known.into_iter().collect(),
        })
    }

    /// What is done at boot, and now and then: what failed half-way is finished, the machine's rules may have been flushed,
    /// and records grow old.
    pub async fn tend(self: &Arc<Self>) -> Result<(), ApiError> {
        let now = Timestamp::now();
        let mut parts = Parts::default();
        parts.note("the bridge", bridge::ensure(&self.names, &self.helpers).await);
        parts.note("the firewall", firewall::ensure(&self.names, &self.helpers).await);
        parts.note("the edge", self.restore_edge().await);
        parts.note("ends that nobody saw", self.notice_missed_ends());
        parts.note("flows that were cut off", self.finish_flows().await);
        parts.note("what is left over", self.clear_left_over().await);
        parts.note("what no record knows", self.remove_orphans().await);
        parts.note("old records", self.forget_old(now).await);
        parts.note("the store", self.book.prune(now).await);
        parts.outcome()
    }

    /// Ends that were not told of.
    fn notice_missed_ends(self: &Arc<Self>) -> Result<(), ApiError> {
        let mut parts = Parts::default();
        for record in self.book.all().into_iter().map(|held| held.value) {
            let id = record.spec.id;
            let State::Running { process } = record.state else { continue };
            match process.open() {
                Ok(Some(_)) => {}
                Ok(None) if self.note_end(&id) => {
                    let node = Arc::clone(self);
                    tokio::spawn(async move { node.see_to_end(&id, Watched::Yes).await });
                }
                Ok(None) => {}
                Err(error) => parts.note(id, Err(error)),
            }
        }
        parts.outcome()
    }

    /// Flows that were cut off or failed half-way, as on a full disk, and that nobody has asked for again.
    async fn finish_flows(self: &Arc<Self>) -> Result<(), ApiError> {
        let mut parts = Parts::default();
        for record in self.book.all().into_iter().map(|held| held.value) {
            let id = record.spec.id;
            if !matches!(record.state, State::Launching | State::Retiring { .. }) {
                continue;
            }
            // A flow that still runs holds the lock. Without one the record is looked at again: it may just have ended.
            let Some(alone) = self.try_alone(&id) else { continue };
            match self.book.get(&id).map(|held| held.value) {
                // Half-made is never resumed: nobody knows how far it got.
                Some(record) if record.state == State::Launching => {
                    parts.note(id, self.fail(record, Fact::CutOff).await.map(drop));
                }
                Some(record) if matches!(record.state, State::Retiring { .. }) => {
                    drop(alone);
                    self.finish_in_background(id);
                }
                _ => {}
            }
        }
        parts.outcome()
    }

    fn finish_in_background(self: &Arc<Self>, id: InstanceId) {
        let node = Arc::clone(self);
        tokio::spawn(async move {
            let _alone = node.alone(&id).await;
            // Whoever asked for it may have asked again, and be done.
            let record = node.book.get(&id).map(|held| held.value);
            let Some(record) = record.filter(|record| matches!(record.state, State::Retiring { .. })) else {
                return;
            };
            if let Err(error) = node.finish_retiring(record).await {
                tracing::warn!(instance = %id, %error, "could not be retired; trying again at the next look");
            }
        });
    }

    /// Clears away what ended or failed, and could not be cleared away then.
    async fn clear_left_over(&self) -> Result<(), ApiError> {
        let mut parts = Parts::default();
        for record in self.book.all().into_iter().map(|held| held.value) {
            let id = &record.spec.id;
            // One whose end was just noted is seen to.
            if record.is_left_over() && !self.has_ended(id) {
                parts.note(id, self.clear_away(id).await);
            }
        }
        parts.outcome()
    }

    async fn remove_orphans(&self) -> Result<(), ApiError> {
        let mut parts = Parts::default();
        let Orphans { instances, namespaces } =
            std::mem::take(&mut *self.orphans.lock().unwrap_or_else(PoisonError::into_inner));
        let mut left = Orphans::default();
        for id in instances {
            let removed = self.remove_orphan(&id).await;
            if removed.is_err() {
                left.instances.insert(id.clone());
            }
            parts.note(id, removed);
        }
        for name in namespaces {
            let removed = self.pool.give_back(&name).await;
            if removed.is_err() {
                left.namespaces.insert(name.clone());
            }
            parts.note(name, removed);
        }
        *self.orphans.lock().unwrap_or_else(PoisonError::into_inner) = left;
        parts.outcome()
    }

    async fn remove_orphan(&self, name: &str) -> Result<(), ApiError> {
        // It may be launched by now: that id was not in use, whatever lies under its name.
        let id: Option<InstanceId> = name.parse().ok();
        let _alone = match &id {
            Some(id) => Some(self.alone(id).await),
            None => None,
        };
        let held = id.and_then(|id| self.book.get(&id)).map(|held| held.value);
        if held.is_some_and(|record| !record.is_over()) {
            return Ok(());
        }
        tracing::info!(id = name, "removing what no record knows");
        let (names, runtime, name) = (self.names.clone(), self.runtime.clone(), name.to_owned());
        blocking(move || {
            runtime.remove(&name)?;
            rootfs::remove(&names.instance_dir(&name))
        })
        .await?
        .map_err(ApiError::from)
    }

    async fn forget_old(&self, now: Timestamp) -> Result<(), ApiError> {
        let mut parts = Parts::default();
        for record in self.book.all().into_iter().map(|held| held.value) {
            let old = record.ended.is_some_and(|ended| now.duration_since(ended) > KEPT);
            if record.is_over() && !record.is_left_over() && old {
                let id = &record.spec.id;
                parts.note(id, self.forget_one(id).await);
            }
        }
        parts.outcome()
    }

    async fn forget_one(&self, id: &InstanceId) -> Result<(), ApiError> {
        let _alone = self.alone(id).await;
        let name = id.to_string();
        for path in [self.names.log_file(&name), self.names.exits_dir().join(&name)] {
            remove_file(&path)?;
        }
        self.book.forget(id).await
    }
}

fn remove_file(path: &Path) -> Result<(), Failure> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::new(format!("removing {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

/// Ids of instances that have a control group, a folder or a runtime's state on the machine.
pub(crate) fn made(names: &Names) -> Result<BTreeSet<String>, Failure> {
    let mut ids: BTreeSet<String> = BTreeSet::new();
    for group in cgroup::groups(&names.cgroup())? {
        if group != Cgroup::HELPERS {
            ids.insert(runtime::instance_of(&group).to_owned());
        }
    }
    for dir in [names.instances_dir(), names.runc_root()] {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Failure::new(format!("listing {}", dir.display()), error)),
        };
        ids.extend(entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()));
    }
    Ok(ids)
}
