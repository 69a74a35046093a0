//! Launching: record, root file system, bundle, runtime, record again. A crash in between leaves a record of a launch
//! that never ended, which the next node takes apart.

use std::sync::Arc;
use std::time::Instant;

use jiff::Timestamp;
use kiln_api::engine;
use kiln_model::architecture::Architecture;
use kiln_model::digest::Digest;
use kiln_service::emulation;
use kiln_service::error::ApiError;
use kiln_store::{Batch, Store};
use tracing::{Instrument, info_span};

use crate::book::Book;
use crate::bundle::{self, Contents};
use crate::failure::{During, Failure};
use crate::metrics;
use crate::network::{Plug, namespace};
use crate::node::{Node, to_the_end};
use crate::process::Process;
use crate::record::{Fact, Record, Role, Spec, State};
use crate::rootfs::{self, Identity};
use crate::verify::Verified;

/// The memory of an instance's writable paths where its definition limits none. The kernel takes it page by page.
const WRITABLE_MEMORY: u64 = 256 << 20;

#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) spec: Spec,
    pub(crate) generation: u64,
    pub(crate) traceparent: String,
}

impl<S: Store> Node<S> {
    /// Starts an instance, once; answers with what became of it.
    pub(crate) async fn launch(self: &Arc<Self>, launch: Launch) -> Result<engine::Instance, ApiError> {
        let node = Arc::clone(self);
        to_the_end(async move { node.launch_alone(launch).await }).await
    }

    async fn launch_alone(self: &Arc<Self>, launch: Launch) -> Result<engine::Instance, ApiError> {
        let Launch { spec, generation, traceparent } = launch;
        let asked = Instant::now();
        let _alone = self.alone(&spec.id).await;
        let digest = Digest::of_json(&spec).map_err(|error| ApiError::internal(&error))?;
        if let Some(answer) = self.launched_before(&spec, &digest).await? {
            return Ok(answer);
        }
        if let Some(name) = bundle::refused_capability(&spec.run.capabilities) {
            return Err(ApiError::invalid(
                "spec.run.capabilities",
                format!("{name} is not granted to instances"),
                format!("leave it out; these are granted: {}", bundle::grantable()),
            ));
        }
        let _turn = self.at_once.acquire().await.map_err(|error| ApiError::internal(&error))?;
        let verified = self.verifier.verify(&self.book, spec.image, spec.server().as_str());
        let verified = verified.instrument(info_span!("verify")).await?;
        let plug = self.pool.take().instrument(info_span!("network")).await?;
        let record = Record::launching(spec, digest, plug.clone(), traceparent, Timestamp::now());
        if let Err(error) = begin(&self.book, &record, generation).await {
            self.pool.give_back(&plug.namespace).await?;
            return Err(error);
        }
        let instance = self.carry_out(record, verified).await?;
        if instance.state() == engine::InstanceState::Running {
            metrics::launched(asked.elapsed());
        }
        Ok(instance)
    }

    /// What an earlier launch of this id came to; an error where it was another, or is over.
    async fn launched_before(
        &self,
        spec: &Spec,
        digest: &Digest,
    ) -> Result<Option<engine::Instance>, ApiError> {
        let id = &spec.id;
        let over = || {
            ApiError::precondition(
                format!("instance {id} was retired and is never launched again"),
                "launch a new attempt",
            )
        };
        match self.book.get(id) {
            Some(held) if held.value.digest != *digest => {
                let why = "it was launched from another specification; launch a new attempt".to_owned();
                Err(ApiError::AlreadyExists { what: "instance", id: id.to_string(), why })
            }
            Some(held) if matches!(held.value.state, State::Retiring { .. } | State::Retired) => Err(over()),
            Some(held) => Ok(Some(held.value.to_message(held.version))),
            None if self.book.is_retired(id).await? => Err(over()),
            None => Ok(None),
        }
    }

    async fn carry_out(
        self: &Arc<Self>,
        record: Record,
        verified: Verified,
    ) -> Result<engine::Instance, ApiError> {
        let id = record.spec.id.clone();
        match self.start(&record, verified).await {
            Ok((process, pidfd)) => {
                let running = advance(record.clone(), Fact::Started { process })?;
                match self.book.write(running, Batch::default()).await {
                    Ok(message) => {
                        self.watch_for_end(id, pidfd);
                        Ok(message)
                    }
                    Err(error) => {
                        // It runs, but nobody will ever know: as good as half-made. The next look records that.
                        self.take_apart(&record).await?;
                        Err(error)
                    }
                }
            }
            Err(failure) => {
                tracing::warn!(instance = %id, error = %failure, "could not be launched");
                self.fail(record, Fact::CouldNotLaunch { why: failure.to_string() }).await
            }
        }
    }

    /// Records that a launch failed, and clears it away: now, or when the node looks again. The caller holds the instance's
    /// lock.
    pub(crate) async fn fail(&self, record: Record, fact: Fact) -> Result<engine::Instance, ApiError> {
        let failed = advance(record, fact)?;
        let message = self.book.write(failed.clone(), Batch::default()).await?;
        match self.clear(failed).await {
            Ok(cleared) => Ok(cleared),
            Err(error) => {
                tracing::warn!(id = message.spec.as_ref().map(|spec| &spec.id), %error, "could not be cleared away");
                Ok(message)
            }
        }
    }

    async fn start(
        &self,
        record: &Record,
        verified: Verified,
    ) -> Result<(Process, std::os::fd::OwnedFd), Failure> {
        let id = record.spec.id.to_string();
        let dir = self.names.instance_dir(&id);
        let what = || format!("launching {id}");
        let plug =
            record.plug.clone().ok_or_else(|| Failure::new(what(), "it has no place in the network"))?;
        let cgroup = format!("/{}/{id}", self.names.cgroup());
        let spec = record.spec.clone();
        let prepared = dir.clone();
        tokio::task::spawn_blocking(move || prepare(&prepared, &spec, &plug, &cgroup, &verified))
            .instrument(info_span!("prepare"))
            .await
            .during(what)??;
        let pid = self.runtime.create(&id).instrument(info_span!("create")).await?;
        let process = Process::of(pid)?;
        let pidfd =
            process.open()?.ok_or_else(|| Failure::new(what(), "its process ended before it began"))?;
        self.runtime.start(&id).instrument(info_span!("start")).await?;
        // The instance has its own view of the mounts by now.
        rootfs::detach(&dir)?;
        Ok((process, pidfd))
    }
}

/// Records the launch, with the plan's generation, before anything is done.
async fn begin<S: Store>(book: &Book<S>, record: &Record, generation: u64) -> Result<(), ApiError> {
    const TRIES: u32 = 8;
    for _ in 0..TRIES {
        // A test's instance belongs to a build, not to a plan for the fleet.
        let along = match record.spec.role {
            Role::Fleet => book.fence(record.spec.server(), generation).await?,
            Role::Test => Batch::default(),
        };
        match book.write(record.clone(), along).await {
            // Another flow of the same server raised the fence in between.
            Err(ApiError::Conflict(_)) => {}
            other => return other.map(drop),
        }
    }
    Err(ApiError::Conflict(format!("others kept planning for server {}", record.spec.server())))
}

pub(crate) fn advance(record: Record, fact: Fact) -> Result<Record, ApiError> {
    record.next(fact, Timestamp::now()).map_err(|error| ApiError::internal(&error))
}

fn prepare(
    dir: &std::path::Path,
    spec: &Spec,
    plug: &Plug,
    cgroup: &str,
    verified: &Verified,
) -> Result<(), Failure> {
    let hostname = spec.id.to_string();
    let config = verified.image.config.config().as_ref();
    let text = |field: Option<&String>| field.cloned().unwrap_or_default();
    let list = |field: Option<&Vec<String>>| field.cloned().unwrap_or_default();
    let user = text(config.and_then(|config| config.user().as_ref()));
    let workdir = text(config.and_then(|config| config.working_dir().as_ref()));
    let mut command = list(config.and_then(|config| config.entrypoint().as_ref()));
    command.extend(list(config.and_then(|config| config.cmd().as_ref())));
    let architecture = verified.image.config.architecture().to_string();
    if let Some(wanted) = Architecture::named(&architecture)
        && let Err(why) = emulation::can_run(wanted)
    {
        let doing = format!("launching {hostname}, whose image is for {wanted}");
        return Err(Failure::new(doing, format!("{why}: {}", emulation::REMEDY)));
    }
    if command.is_empty() {
        return Err(Failure::new(
            format!("launching {hostname}"),
            "its image has no command; set `image.command`",
        ));
    }
    let rootfs = rootfs::make(&rootfs::Plan {
        dir,
        layers: &verified.layers,
        writable: &spec.run.writable,
        memory: spec.run.limits.memory_bytes.unwrap_or(WRITABLE_MEMORY),
        identity: Identity { hostname: &hostname, address: plug.address },
        user: &user,
    })?;
    bundle::write(
        dir,
        &rootfs,
        &Contents {
            hostname: &hostname,
            command: &command,
            workdir: if workdir.is_empty() { "/" } else { &workdir },
            image_env: &list(config.and_then(|config| config.env().as_ref())),
            env: &spec.run.env,
            capabilities: &spec.run.capabilities,
            limits: &spec.run.limits,
            network: &namespace::path(&plug.namespace),
            cgroup,
        },
    )
}
