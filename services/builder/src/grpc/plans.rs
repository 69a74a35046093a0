//! Plans, and builds that a person asks for.

use kiln_api::builder::build_response::Item as BuildItem;
use kiln_api::builder::plan_response::Item as PlanItem;
use kiln_api::builder::{BuildOutcome, BuildRequest, BuildResponse, Plan, PlanRequest, PlanResponse};
use kiln_builder_core::Told;
use kiln_builder_core::build::package_changes;
use kiln_builder_core::next::{Order, parent_image};
use kiln_builder_core::plan::{self, Comparison, Made};
use kiln_builder_core::server::{ReleaseFile, Server};
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::digest::Digest;
use kiln_model::lock::Lock;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_service::requests;
use kiln_store::{AuditRecord, Batch, Store};
use tracing::Instrument as _;

use super::told::told;
use super::{Api, Streamed};
use crate::bake::LogSink;
use crate::bakery::Bakery;
use crate::builder::{Error, Resolved};
use crate::differences::differences;
use crate::store::{Edit, Read};
use crate::wire;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    pub(super) fn plan_server(&self, request: PlanRequest) -> Streamed<PlanResponse> {
        let api = self.clone();
        let say = |item| PlanResponse { item: Some(item) };
        told(
            move |line| say(PlanItem::Line(line)),
            move |listener| async move { Ok(say(PlanItem::Plan(api.plan(&request, &listener).await?))) },
        )
    }

    async fn plan(&self, request: &PlanRequest, listener: &LogSink) -> Result<Plan, ApiError> {
        let read = self.live_server(&request.server).await?;
        let server = &read.value;
        let order = self.order(server, Vec::new()).await?;
        let span = tracing::info_span!("plan", server = %server.name);
        let resolved =
            self.builder.resolve_shippable(server, &order, Some(listener)).instrument(span).await?;
        let run = &resolved.definition.run_digest;
        let comparison = plan::compare(server, &resolved.key, run, &resolved.packages);
        let in_force = server.in_force.as_ref();
        let known = match in_force {
            Some(in_force) => self.builder.documents.lock(&in_force.lock_key).await?,
            None => None,
        };
        let mut changes = known.as_ref().map(|known| differences(known, &resolved.lock)).unwrap_or_default();
        if in_force.is_some_and(|in_force| in_force.definition.run_digest != *run) {
            changes.push("run: changed".to_owned());
        }
        if let Comparison::Held(objection) = &comparison {
            changes.push(format!("held back: {objection}"));
        }
        let before = in_force.map(|in_force| in_force.packages.clone()).unwrap_or_default();
        let answer = Plan {
            server: server.name.to_string(),
            definition_digest: resolved.definition.digest.to_string(),
            lock_key: resolved.key.to_string(),
            current_lock_key: in_force.map(|in_force| in_force.lock_key.to_string()).unwrap_or_default(),
            needs_build: comparison == Comparison::Image,
            needs_revision: matches!(comparison, Comparison::Image | Comparison::RunOnly),
            packages: wire::package_changes(&package_changes(&before, &resolved.packages)),
            changes,
            current_image: in_force.map(|in_force| in_force.image.to_string()).unwrap_or_default(),
            replicas: resolved.definition.replicas,
            release_file_digest: release_file_digest(&resolved.release_files),
        };
        if comparison == Comparison::Unchanged {
            self.note_resolved(read, resolved).await?;
        }
        Ok(answer)
    }

    /// The archives moved on and nothing in the image did: what was compared with is what counts from now on, so that
    /// nobody asks again because of the same release files.
    async fn note_resolved(&self, read: Read<Server>, resolved: Resolved) -> Result<(), ApiError> {
        let mut server = read.value;
        let Some(in_force) = &mut server.in_force else { return Ok(()) };
        if in_force.release_files == resolved.release_files {
            return Ok(());
        }
        let now = self.builder.now();
        in_force.release_files = resolved.release_files;
        in_force.resolved = now;
        let mut edit = Edit::new(now);
        edit.put_server(read.version, &server, &[])?;
        match self.builder.documents.store().commit(edit.finish()).await {
            // Somebody else moved it on: what they wrote is newer.
            Ok(_) | Err(kiln_store::Error::Conflict { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn order(&self, server: &Server, causes: Vec<Cause>) -> Result<Order, ApiError> {
        let Some(definition) = server.effective() else {
            return Err(ApiError::precondition(
                server.problem(),
                "change the definition, then apply it again",
            ));
        };
        let parent = match &definition.parent {
            None => None,
            Some(name) => {
                let parent = self.builder.documents.server(name).await?;
                let image = parent.as_ref().and_then(|parent| parent_image(&parent.value));
                Some(image.ok_or_else(|| {
                    let reason =
                        format!("{} begins with the image of {name}, which has none yet", server.name);
                    ApiError::precondition(reason, format!("see `kiln status {name}`"))
                })?)
            }
        };
        Ok(Order { definition: definition.clone(), parent, causes })
    }

    pub(super) fn build_server(&self, request: BuildRequest, by: String) -> Streamed<BuildResponse> {
        let api = self.clone();
        let say = |item| BuildResponse { item: Some(item) };
        told(
            move |line| say(BuildItem::Line(line)),
            move |listener| async move { Ok(say(BuildItem::Outcome(api.build(request, by, &listener).await?))) },
        )
    }

    async fn build(
        &self,
        request: BuildRequest,
        by: String,
        listener: &LogSink,
    ) -> Result<BuildOutcome, ApiError> {
        let store = self.builder.documents.store();
        // What the first call found may be otherwise by now: its own build is under way.
        if let Some(answer) = requests::answered(store, &request.request_id, &request).await? {
            return Ok(answer);
        }
        let read = self.live_server(&request.server).await?;
        let server = &read.value;
        let cause = Cause {
            kind: CauseKind::Manual,
            id: request.request_id.clone(),
            summary: format!("{by} asked for a build of {}", server.name),
            actor: by,
            time: self.builder.now(),
            traceparent: kiln_service::trace::current(),
        };
        if request.verify {
            let decide = || self.decide_verify(&request.server, &cause);
            return requests::once(store, &request.request_id, &request, decide).await;
        }
        refuse_busy(server)?;
        let order = self.order(server, vec![cause.clone()]).await?;
        let resolved = if request.pinned {
            let lock = self.lock_in_force(server).await?;
            let parent = order.parent.as_ref();
            self.builder.resolve(server, &order.definition, parent, Some(&lock), Some(listener)).await?
        } else {
            self.builder.resolve_shippable(server, &order, Some(listener)).await?
        };
        let decide = || self.decide_build(&request.server, &cause, &resolved);
        let answer = requests::once(store, &request.request_id, &request, decide).await?;
        // One that it joined has the log of the plan that queued it.
        let queued = answer.build.as_ref().filter(|build| build.version == 1);
        if let Some(id) = queued.and_then(|build| build.id.parse().ok()) {
            self.builder.log_resolving(&id, &resolved.log);
        }
        Ok(answer)
    }

    async fn lock_in_force(&self, server: &Server) -> Result<Lock, ApiError> {
        let nothing = || {
            let reason = format!("server {} has no lock in force whose packages could be kept", server.name);
            ApiError::precondition(reason, "build it without `--pinned`")
        };
        let in_force = server.in_force.as_ref().ok_or_else(nothing)?;
        self.builder.documents.lock(&in_force.lock_key).await?.ok_or_else(nothing)
    }

    async fn decide_build(
        &self,
        name: &str,
        cause: &Cause,
        resolved: &Resolved,
    ) -> Result<(Batch, BuildOutcome), ApiError> {
        let read = self.live_server(name).await?;
        refuse_busy(&read.value)?;
        let server = read.value.name.clone();
        let before =
            serde_json::json!({ "lock": read.value.in_force.as_ref().map(|in_force| in_force.lock_key) });
        let planned = resolved.clone().planned(cause.clone(), Vec::new());
        let decided = self.builder.decide(read, planned, &resolved.stored, &resolved.lock).await;
        let (mut edit, made) = decided.map_err(|error| match error {
            Error::Illegal(illegal) => ApiError::Conflict(illegal.to_string()),
            other => other.into(),
        })?;
        let record = AuditRecord::new(edit.now(), &cause.actor, "build", name).of_server(&server);
        let after = serde_json::json!({ "lock": resolved.key, "outcome": made_of(&made) });
        edit.audit(record.asked(&cause.id).changed(before, after));
        let image_of = |digest: Option<Digest>| digest.map(|digest| digest.to_string()).unwrap_or_default();
        let answer = match made {
            Made::Unchanged => {
                let image = self.live_server(name).await?.value.in_force.map(|in_force| in_force.image);
                BuildOutcome { build: None, image_digest: image_of(image), unchanged: true }
            }
            Made::Held { problem } => {
                return Err(ApiError::precondition(
                    problem,
                    "change the definition, or wait for newer packages",
                ));
            }
            Made::Queued(build) => {
                BuildOutcome { build: Some(wire::build(&build, 1)), ..BuildOutcome::default() }
            }
            Made::Joined(id) => {
                let build = self.builder.documents.build(&id).await?;
                let build = build.map(|read| wire::build(&read.value, read.version));
                BuildOutcome { build, ..BuildOutcome::default() }
            }
            Made::Revision(revision) => {
                use kiln_model::revision::RevisionContent;
                let image = match revision.content {
                    RevisionContent::Image(image) => Some(image.image_digest),
                    RevisionContent::Removed { .. } => None,
                };
                BuildOutcome { build: None, image_digest: image_of(image), unchanged: false }
            }
        };
        Ok((edit.finish(), answer))
    }

    async fn decide_verify(&self, name: &str, cause: &Cause) -> Result<(Batch, BuildOutcome), ApiError> {
        let Read { version, value } = self.live_server(name).await?;
        let now = self.builder.now();
        let (server, build) = plan::verify(value, cause.clone(), now).map_err(Error::from)?;
        let mut edit = Edit::new(now);
        edit.put_server(version, &server, &[])?;
        edit.put_build(0, &build, Some(Told::BuildQueued))?;
        let record = AuditRecord::new(now, &cause.actor, "verify_build", name).of_server(&server.name);
        let after = serde_json::json!({ "build": build.id });
        edit.audit(record.asked(&cause.id).changed(serde_json::Value::Null, after));
        let image_digest = server.in_force.map(|in_force| in_force.image.to_string()).unwrap_or_default();
        let answer = BuildOutcome { build: Some(wire::build(&build, 1)), image_digest, unchanged: false };
        Ok((edit.finish(), answer))
    }
}

/// In one word.
fn made_of(made: &Made) -> &'static str {
    match made {
        Made::Unchanged => "unchanged",
        Made::Held { .. } => "held",
        Made::Revision(_) => "revision",
        Made::Joined(_) => "joined",
        Made::Queued(_) => "queued",
    }
}

fn refuse_busy(server: &Server) -> Result<(), ApiError> {
    match &server.building {
        None => Ok(()),
        Some(building) => {
            let reason = format!("{} of {} is under way", building.build, server.name);
            let todo = format!("wait for it, or end it with `kiln build --cancel {}`", building.build);
            Err(ApiError::precondition(reason, todo))
        }
    }
}

/// Over all release files, whatever their order; empty where there are none.
fn release_file_digest(files: &[ReleaseFile]) -> String {
    if files.is_empty() {
        return String::new();
    }
    let mut lines: Vec<_> = files.iter().map(|file| format!("{} {}\n", file.url, file.digest)).collect();
    lines.sort();
    Digest::of(lines.concat().as_bytes()).to_string()
}
