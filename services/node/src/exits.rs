//! Instances that end by themselves. The kernel says so at once; the node takes them off the edge without being asked.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::name::InstanceId;
use kiln_service::error::ApiError;
use kiln_store::{Batch, Store};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::launch::advance;
use crate::metrics;
use crate::node::{Node, blocking};
use crate::record::Fact;
use crate::rootfs;

/// Resolves when the process of a pidfd has ended.
pub(crate) async fn ended(pidfd: OwnedFd) -> std::io::Result<()> {
    // SAFETY: an `OwnedFd` stays the same open descriptor until it is dropped, which is after it was deregistered.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    pidfd.readable().await.map(drop)
}

impl<S: Store> Node<S> {
    /// From now on the end of this instance is noticed.
    pub(crate) fn watch_for_end(self: &Arc<Self>, id: InstanceId, pidfd: OwnedFd) {
        let node = Arc::clone(self);
        tokio::spawn(async move {
            if let Err(error) = ended(pidfd).await {
                tracing::error!(instance = %id, %error, "its end will be noticed at the next look");
                return;
            }
            node.record_end(&id).await;
        });
    }

    /// Takes an instance that has ended off the edge, records it, and clears it away.
    pub(crate) async fn record_end(self: &Arc<Self>, id: &InstanceId) {
        // Users first: each millisecond here is connections that are refused.
        if let Err(error) = self.take_off_edge(id).await {
            tracing::error!(instance = %id, %error, "could not be taken off the edge; trying again at the next look");
        }
        if let Some(plug) = self.book.get(id).and_then(|held| held.value.plug) {
            self.edge.forget(plug.address).await;
        }
        let mut pause = Duration::from_millis(100);
        while let Err(error) = self.record_end_once(id).await {
            tracing::error!(instance = %id, %error, again_in = ?pause, "its end could not be recorded");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(30));
        }
    }

    async fn record_end_once(self: &Arc<Self>, id: &InstanceId) -> Result<(), ApiError> {
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
        tracing::warn!(instance = %id, exit_code, "{why}");
        metrics::ended();
        let namespace = record.plug.as_ref().map(|plug| plug.namespace.clone());
        let exited = advance(record, Fact::Ended { exit_code, why })?;
        self.book.write(exited, Batch::default()).await?;
        self.take_apart(id, namespace).await
    }

    /// Removes everything an instance has on the machine but its log and exit code; fine if it has nothing.
    pub(crate) async fn take_apart(
        &self,
        id: &InstanceId,
        namespace: Option<String>,
    ) -> Result<(), ApiError> {
        let (runtime, dir, name) =
            (self.runtime.clone(), self.names.instance_dir(&id.to_string()), id.to_string());
        blocking(move || runtime.remove(&name).and_then(|()| rootfs::remove(&dir))).await??;
        if let Some(namespace) = namespace {
            self.pool.give_back(&namespace).await?;
        }
        Ok(())
    }
}
