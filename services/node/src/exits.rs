//! Instances that end by themselves. The kernel says so at once; the node takes them off the edge without being asked.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_api::engine;
use kiln_model::name::InstanceId;
use kiln_service::error::ApiError;
use kiln_store::{Batch, Store};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::launch::advance;
use crate::metrics;
use crate::node::{Node, blocking};
use crate::record::{Fact, Record, State};
use crate::rootfs;

/// Resolves when the process of a pidfd has ended.
pub(crate) async fn ended(pidfd: OwnedFd) -> std::io::Result<()> {
    // SAFETY: an `OwnedFd` stays the same open descriptor until it is dropped, which is after it was deregistered.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    pidfd.readable().await.map(drop)
}

/// Whether this process of the node was there when an instance ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watched {
    Yes,
    No,
}

/// An end that could not be seen to is tried again after growing pauses.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl<S: Store> Node<S> {
    /// From now on the end of this instance is noticed.
    pub(crate) fn watch_for_end(self: &Arc<Self>, id: InstanceId, pidfd: OwnedFd) {
        let node = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = ended(pidfd).await {
                tracing::error!(instance = %id, %error, "its end will be noticed at the next look");
                return;
            }
            if node.note_end(&id) {
                node.see_to_end(&id, Watched::Yes).await;
            }
        });
    }

    /// Keeps an instance that has ended off the edge until its record says that it has. False where it was noted before:
    /// then somebody sees to it.
    pub(crate) fn note_end(&self, id: &InstanceId) -> bool {
        self.ended().insert(id.clone())
    }

    pub(crate) fn has_ended(&self, id: &InstanceId) -> bool {
        self.ended().contains(id)
    }

    fn ended(&self) -> MutexGuard<'_, HashSet<InstanceId>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an instance whose end was noted off the edge, records it, and clears it away. Ends when that is done.
    pub(crate) async fn see_to_end(self: &Arc<Self>, id: &InstanceId, watched: Watched) {
        let mut pause = FIRST_PAUSE;
        while let Err(error) = self.see_to_end_once(id, watched).await {
            tracing::error!(instance = %id, %error, again_in = ?pause, "its end could not be seen to");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.ended().remove(id);
    }

    /// Each step finds out by itself whether it was done: after a crash, or a failure, all of them are gone through again.
    async fn see_to_end_once(&self, id: &InstanceId, watched: Watched) -> Result<(), ApiError> {
        // Users first: each millisecond here is connections that are refused. So not behind the plans of all servers, which
        // read and write the store with their lock, but behind one transaction of the edge at most.
        let record = self.book.get(id).map(|held| held.value);
        let off_edge = match record.as_ref().and_then(|record| Some((record, record.plug.as_ref()?))) {
            Some((record, plug)) => {
                let evicted = self.edge.evict(plug.address).await;
                // Of one that is being retired the retirement forgets them, as soon as it has seen the end as well.
                if !matches!(record.state, State::Retiring { .. }) {
                    // Twice: a packet that was let through just before the flip enters the table of connections after the
                    // first look at it, and the port that it came from would lead the next user of it here.
                    for _ in 0..2 {
                        self.edge.forget(plug.address).await;
                    }
                }
                evicted
            }
            None => Ok(()),
        };
        self.put_on_record(id, watched).await?;
        // Nobody else is given its address while users may be sent there.
        off_edge?;
        self.clear_away(id).await
    }

    /// The plan of the edge before the record: whoever sees that it ended may retire it, which a plan with it would forbid.
    pub(crate) async fn put_on_record(&self, id: &InstanceId, watched: Watched) -> Result<(), ApiError> {
        self.forget_on_edge(id).await?;
        self.record_end(id, watched).await
    }

    async fn record_end(&self, id: &InstanceId, watched: Watched) -> Result<(), ApiError> {
        let _alone = self.alone(id).await;
        // Another flow may have retired it meanwhile.
        let Some(record) = self.book.get(id).map(|held| held.value).filter(|record| record.is_running())
        else {
            return Ok(());
        };
        let exit_code = self.runtime.exit_code(&id.to_string()).await;
        let why = match exit_code {
            Some(code) if code > 128 => format!("ended by signal {}", code - 128),
            Some(code) => format!("ended by itself with exit code {code}"),
            None => "ended; nobody saw its exit code".to_owned(),
        };
        // Whatever ended the node may have ended it too: a machine that goes down kills what runs, or asks it to stop, and
        // conmon may live long enough to write down how it ended. What ends by its own fault does so again, watched.
        let cut_off = watched == Watched::No;
        tracing::warn!(instance = %id, exit_code, cut_off, "{why}");
        metrics::ended();
        let exited = advance(record, Fact::Ended { exit_code, why, cut_off })?;
        self.book.write(exited, Batch::default()).await.map(drop)
    }

    /// Clears away what an instance that is over still has on the machine; fine if it has nothing.
    pub(crate) async fn clear_away(&self, id: &InstanceId) -> Result<(), ApiError> {
        let _alone = self.alone(id).await;
        let record = self.book.get(id).map(|held| held.value);
        let Some(record) = record.filter(Record::is_left_over) else { return Ok(()) };
        let _turn = self.at_once.acquire().await.map_err(|error| ApiError::internal(&error))?;
        self.clear(record).await.map(drop)
    }

    /// The same. The caller holds the instance's lock.
    pub(crate) async fn clear(&self, record: Record) -> Result<engine::Instance, ApiError> {
        self.take_apart(&record).await?;
        self.book.write(advance(record, Fact::Cleared)?, Batch::default()).await
    }

    /// Removes everything an instance has on the machine but its log and exit code; fine if it has nothing.
    pub(crate) async fn take_apart(&self, record: &Record) -> Result<(), ApiError> {
        let name = record.spec.id.to_string();
        let (runtime, dir) = (self.runtime.clone(), self.names.instance_dir(&name));
        blocking(move || runtime.remove(&name).and_then(|()| rootfs::remove(&dir))).await??;
        if let Some(plug) = &record.plug {
            self.pool.give_back(&plug.namespace).await?;
        }
        Ok(())
    }
}
