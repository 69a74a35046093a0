//! What a new node does with what it finds: the store says what should be, the machine what is.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use kiln_model::name::InstanceId;
use kiln_service::error::ApiError;
use kiln_store::{Batch, Store};

use crate::cgroup::{self, Cgroup};
use crate::failure::Failure;
use crate::launch::advance;
use crate::names::Names;
use crate::network::{bridge, firewall};
use crate::node::{Node, blocking};
use crate::record::{Fact, Record, State};
use crate::{rootfs, runtime};

/// How long the records of ended instances are kept, with logs and exit codes.
const KEPT: SignedDuration = SignedDuration::from_hours(7 * 24);

impl<S: Store> Node<S> {
    /// Adopts what runs, finishes what was begun, removes what nobody knows. Users are served all the while.
    pub async fn reconcile(self: &Arc<Self>) -> Result<(), ApiError> {
        let mut ended = Vec::new();
        for record in self.book.all().into_iter().map(|held| held.value) {
            let id = record.spec.id.clone();
            match &record.state {
                State::Launching => {
                    let _alone = self.alone(&id).await;
                    self.fail_half_made(record).await?;
                }
                State::Running { process } => match process.open()? {
                    Some(pidfd) => self.watch_for_end(id, pidfd),
                    None => ended.push(id),
                },
                State::Retiring { .. } => self.finish_in_background(id),
                State::Exited | State::Retired | State::Failed => {}
            }
        }
        for id in &ended {
            self.record_end(id).await;
        }
        self.restore_edge().await?;
        self.remove_orphans().await
    }

    /// Half-made is never resumed: nobody knows how far it got. The caller holds the instance's lock.
    async fn fail_half_made(&self, record: Record) -> Result<(), ApiError> {
        let id = record.spec.id.clone();
        let namespace = record.plug.as_ref().map(|plug| plug.namespace.clone());
        self.take_apart(&id, namespace).await?;
        let why = "its launch was cut off; launch a new attempt".to_owned();
        self.book.write(advance(record, Fact::CouldNotLaunch { why })?, Batch::default()).await?;
        Ok(())
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

    /// Flows that failed half-way, as on a full disk, and that nobody has asked for again.
    async fn finish_flows(self: &Arc<Self>) -> Result<(), ApiError> {
        for record in self.book.all().into_iter().map(|held| held.value) {
            let id = record.spec.id;
            if !matches!(record.state, State::Launching | State::Retiring { .. }) {
                continue;
            }
            // A flow that still runs holds the lock. Without one the record is looked at again: it may just have ended.
            let Some(alone) = self.try_alone(&id) else { continue };
            match self.book.get(&id).map(|held| held.value) {
                Some(record) if record.state == State::Launching => self.fail_half_made(record).await?,
                Some(record) if matches!(record.state, State::Retiring { .. }) => {
                    drop(alone);
                    self.finish_in_background(id);
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Ids and namespaces of instances that have something on the machine.
    fn alive(&self) -> (BTreeSet<String>, BTreeSet<String>) {
        let alive: Vec<Record> =
            self.book.all().into_iter().map(|held| held.value).filter(|record| !record.is_over()).collect();
        let namespaces =
            alive.iter().filter_map(|record| record.plug.as_ref().map(|plug| plug.namespace.clone()));
        (alive.iter().map(|record| record.spec.id.to_string()).collect(), namespaces.collect())
    }

    /// Removes what carries the site's id and is in no record. Only at boot: later a launch may be ahead of its record.
    async fn remove_orphans(&self) -> Result<(), ApiError> {
        let (ids, namespaces) = self.alive();
        let (names, runtime) = (self.names.clone(), self.runtime.clone());
        blocking(move || {
            for id in made(&names)?.difference(&ids) {
                tracing::info!(id, "removing what no record knows");
                runtime.remove(id)?;
                rootfs::remove(&names.instance_dir(id))?;
            }
            Ok::<_, Failure>(())
        })
        .await??;
        for namespace in self.pool.known()?.iter().filter(|name| !namespaces.contains(*name)) {
            self.pool.give_back(namespace).await?;
        }
        Ok(())
    }

    /// What is done now and then: the machine's rules may have been flushed, and records grow old.
    pub async fn tend(self: &Arc<Self>) -> Result<(), ApiError> {
        bridge::ensure(&self.names, &self.helpers).await?;
        firewall::ensure(&self.names, &self.helpers).await?;
        self.restore_edge().await?;
        self.notice_missed_ends().await?;
        self.finish_flows().await?;
        let now = Timestamp::now();
        self.forget_old(now).await?;
        self.book.prune(now).await
    }

    /// Ends whose first handling failed.
    async fn notice_missed_ends(self: &Arc<Self>) -> Result<(), ApiError> {
        for record in self.book.all().into_iter().map(|held| held.value) {
            if let State::Running { process } = &record.state
                && process.open()?.is_none()
            {
                self.record_end(&record.spec.id).await;
            }
        }
        Ok(())
    }

    async fn forget_old(self: &Arc<Self>, now: Timestamp) -> Result<(), ApiError> {
        for record in self.book.all().into_iter().map(|held| held.value) {
            let old = record.ended.is_some_and(|ended| now.duration_since(ended) > KEPT);
            if !record.is_over() || !old {
                continue;
            }
            let id = record.spec.id;
            let _alone = self.alone(&id).await;
            let name = id.to_string();
            for path in [self.names.log_file(&name), self.names.exits_dir().join(&name)] {
                remove_file(&path)?;
            }
            self.book.forget(&id).await?;
        }
        Ok(())
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
