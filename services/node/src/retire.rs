//! Retiring: drain, stop, take apart. Every step can be done again, so a crash at any point is carried on from the start.

use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use kiln_api::engine;
use kiln_model::name::InstanceId;
use kiln_model::time::Millis;
use kiln_service::error::ApiError;
use kiln_store::{Batch, Store};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use crate::drain::Connections;
use crate::exits::ended;
use crate::launch::advance;
use crate::node::{Node, blocking, to_the_end};
use crate::patience::within;
use crate::record::{Fact, Record, Role, State};

/// From the flip of the edge until the connections are looked at: a first packet that was let through before the flip
/// has arrived by then.
const SETTLE: Duration = Duration::from_millis(150);
const LOOK: Duration = Duration::from_millis(20);
/// For an instance's own way to stop.
const STOP: Duration = Duration::from_secs(10);
/// For the kernel, once it was told to kill.
const KILL: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct Retire {
    pub(crate) id: InstanceId,
    pub(crate) generation: u64,
    pub(crate) drain: Millis,
}

impl<S: Store> Node<S> {
    /// Ends an instance; answers when it is gone.
    pub(crate) async fn retire(self: &Arc<Self>, retire: Retire) -> Result<engine::Instance, ApiError> {
        let node = Arc::clone(self);
        to_the_end(async move { node.retire_alone(retire).await }).await
    }

    async fn retire_alone(self: &Arc<Self>, retire: Retire) -> Result<engine::Instance, ApiError> {
        let Retire { id, generation, drain } = retire;
        let _alone = self.alone(&id).await;
        let Some(held) = self.book.get(&id) else { return self.retire_unknown(&id, generation).await };
        if held.value.state == State::Retired {
            return Ok(held.value.to_message(held.version));
        }
        // Held until it is recorded: a plan that runs beside must not put it on the edge in between.
        let off_edge = self.off_edge(&id).await?;
        let mut record = held.value;
        if !matches!(record.state, State::Retiring { .. }) {
            let fleet = record.spec.role == Role::Fleet;
            let along = if fleet { self.book.fence(&id.server, generation).await? } else { Batch::default() };
            record = advance(record, Fact::ToRetire { drain })?;
            self.book.write(record.clone(), along).await?;
        }
        drop(off_edge);
        self.finish_retiring(record).await
    }

    /// An id that was never launched here, or was forgotten: it can't be launched from now on.
    async fn retire_unknown(&self, id: &InstanceId, generation: u64) -> Result<engine::Instance, ApiError> {
        // Release 0 is what tests of images run as.
        let mut batch = match id.release {
            0 => Batch::default(),
            _ => self.book.fence(&id.server, generation).await?,
        };
        batch.changes.append(&mut self.book.retired_mark(id).await?.changes);
        self.book.commit(batch).await?;
        let spec = engine::InstanceSpec {
            id: id.to_string(),
            server: id.server.to_string(),
            release: id.release,
            ordinal: id.ordinal,
            attempt: id.attempt,
            ..engine::InstanceSpec::default()
        };
        let state = engine::InstanceState::Retired.into();
        Ok(engine::Instance { spec: Some(spec), state, ..engine::Instance::default() })
    }

    /// Carries on with a retirement that was begun. The caller holds the instance's lock.
    pub(crate) async fn finish_retiring(
        self: &Arc<Self>,
        record: Record,
    ) -> Result<engine::Instance, ApiError> {
        let id = record.spec.id.clone();
        let pidfd = record.process().map(|process| process.open()).transpose()?.flatten();
        let mut exit_code = None;
        if let Some(pidfd) = pidfd {
            self.drain(&record).await?;
            self.stop(&record, pidfd).await?;
            exit_code = self.runtime.exit_code(&id.to_string()).await;
        }
        // At once, not behind launches: until then users' ports are bound to it.
        if let Some(plug) = &record.plug {
            self.edge.forget(plug.address).await;
        }
        let _turn = self.at_once.acquire().await.map_err(|error| ApiError::internal(&error))?;
        self.take_apart(&record).await?;
        let mark = self.book.retired_mark(&id).await?;
        let retired = advance(record, Fact::Gone { exit_code })?;
        let message = self.book.write(retired, mark).await?;
        self.left_edge.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        Ok(message)
    }

    /// Waits until no user's connection is open, for as long as the drain allows.
    async fn drain(&self, record: &Record) -> Result<(), ApiError> {
        let (State::Retiring { drain, .. }, Some(plug), Role::Fleet) =
            (&record.state, &record.plug, record.spec.role)
        else {
            return Ok(());
        };
        let mut ports = record.spec.targets();
        if ports.is_empty() {
            return Ok(());
        }
        let left =
            self.left_edge.lock().unwrap_or_else(PoisonError::into_inner).get(&record.spec.id).copied();
        // Where this node did not see it leave, it may have been just before the node began.
        let since = left.unwrap_or_else(Instant::now);
        tokio::time::sleep(SETTLE.saturating_sub(since.elapsed())).await;
        let until = Instant::now() + drain.as_duration();
        let namespace = plug.namespace.clone();
        let mut connections = blocking(move || Connections::of(&namespace)).await??;
        // Two looks must find none: a connection that opens while the kernel walks its table can be passed over.
        let mut quiet = 0;
        while quiet < 2 {
            let (open, back, asked) =
                blocking(move || (connections.open(&ports), connections, ports)).await?;
            (connections, ports) = (back, asked);
            quiet = if open? == 0 { quiet + 1 } else { 0 };
            if Instant::now() >= until {
                if quiet == 0 {
                    tracing::info!(instance = %record.spec.id, "its drain is over and connections are open");
                }
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The image's own signal first, then SIGKILL.
    async fn stop(&self, record: &Record, pidfd: OwnedFd) -> Result<(), ApiError> {
        let id = &record.spec.id;
        let internal = |error: std::io::Error| ApiError::internal(&error);
        let polled = || pidfd.try_clone().map_err(internal);
        send(&pidfd, self.verifier.stop_signal(&record.spec.image))?;
        if let Some(end) = within(STOP, ended(polled()?)).await {
            return end.map_err(internal);
        }
        tracing::warn!(instance = %id, "did not stop within {STOP:?} and is killed");
        send(&pidfd, Signal::KILL)?;
        within(KILL, ended(polled()?))
            .await
            .ok_or_else(|| {
                ApiError::Unavailable(format!(
                    "instance {id} was killed and does not end; it hangs in the kernel"
                ))
            })?
            .map_err(internal)
    }
}

fn send(pidfd: &OwnedFd, signal: Signal) -> Result<(), ApiError> {
    match pidfd_send_signal(pidfd, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(ApiError::internal(&error)),
    }
}
