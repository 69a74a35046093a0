//! Applying, removing and inspecting.

use kiln_api::builder::apply_request::Source as From;
use kiln_api::builder::{
    AppliedServer, ApplyOutcome, ApplyRequest, ApplyResponse, FolderSource, InspectSourceRequest,
    InspectSourceResponse, InspectedServer, RemoveRequest, RemoveResponse,
};
use kiln_builder_core::build::{self, Build};
use kiln_builder_core::head::{self, Outcome};
use kiln_builder_core::server::{self, Server};
use kiln_builder_core::source::Place;
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::digest::Digest;
use kiln_model::name::ServerName;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_service::requests;
use kiln_store::{AuditRecord, Store};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::Api;
use crate::audit::standing;
use crate::bakery::Bakery;
use crate::builder::TRIES;
use crate::sources::{Error, Look, apply_cause};
use crate::store::{Edit, Read};
use crate::wire;

/// Faults that one answer tells.
const MAX_FAULTS: usize = 50;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    pub(super) async fn apply_source(
        &self,
        mut request: ApplyRequest,
        by: String,
    ) -> Result<ApplyResponse, Status> {
        // A repeated call is told by what was asked, not by what was found: a branch may have moved in between. A packed
        // folder is what is asked, and its digest says the same in fewer bytes.
        let (place, archive) = match &mut request.source {
            Some(From::Git(git)) => {
                (Place::Git { url: git.url.clone(), branch: git.branch.clone() }, Vec::new())
            }
            Some(From::Folder(FolderSource { archive, origin })) => {
                let digest = Digest::of(archive).to_string().into_bytes();
                (Place::Folder { origin: origin.clone() }, std::mem::replace(archive, digest))
            }
            None => {
                let todo = "give a Git repository with its branch, or a packed folder";
                return Err(ApiError::invalid("source", "is missing", todo).into());
            }
        };
        let (store, id) = (self.builder.documents.store(), request.request_id.clone());
        // One that was answered is answered again, with Git away too.
        if let Some(answer) = requests::answered(store, &id, &request).await? {
            return Ok(answer);
        }
        let look = match &place {
            Place::Git { .. } => self.builder.sources.look(&place).await,
            Place::Folder { origin } => self.builder.sources.unpack(origin, archive).await,
        };
        let look = look.map_err(refused)?;
        // Faults are told before anything is written, also to disk.
        let cause = apply_cause(&request.request_id, &by, &look, self.builder.now());
        self.builder.sources.apply(&look, &cause, self.builder.now()).await.map_err(refused)?;
        self.builder.sources.keep(&look, self.builder.now()).await.map_err(refused)?;
        Ok(requests::once(store, &id, &request, || self.decide(&look, &cause)).await?)
    }

    async fn decide(
        &self,
        look: &Look,
        cause: &Cause,
    ) -> Result<(kiln_store::Batch, ApplyResponse), ApiError> {
        let taken = self.builder.sources.apply(look, cause, self.builder.now()).await;
        let (mut edit, applied) = taken.map_err(|error| match error {
            Error::Store(error) => error.into(),
            // Another apply took the parent away since the first look.
            other => ApiError::Conflict(other.to_string()),
        })?;
        let mut servers = Vec::new();
        for one in applied {
            let outcome = match one.outcome {
                Outcome::Created => ApplyOutcome::Created,
                Outcome::Changed => ApplyOutcome::Changed,
                Outcome::Unchanged => ApplyOutcome::Unchanged,
            };
            if one.outcome != Outcome::Unchanged {
                let after = serde_json::json!({ "definition": one.digest, "commit": look.commit });
                let before = self.builder.documents.server(&one.name).await?;
                let before = before.map(|read| {
                    let head = read.value.head;
                    serde_json::json!({ "definition": head.digest, "commit": head.commit })
                });
                let record = AuditRecord::new(edit.now(), &cause.actor, "apply", one.name.as_str());
                let record = record.of_server(&one.name).asked(&cause.id);
                edit.audit(record.changed(before.unwrap_or_default(), after));
            }
            servers.push(AppliedServer {
                name: one.name.to_string(),
                definition_digest: one.digest.to_string(),
                outcome: outcome.into(),
                version: one.version,
                left: one.left.map(|source| wire::source(&source, 0)),
            });
        }
        let source = look.place.id().to_string();
        Ok((edit.finish(), ApplyResponse { servers, source, commit: look.commit.clone() }))
    }

    pub(super) async fn remove_server(
        &self,
        request: RemoveRequest,
        by: String,
    ) -> Result<RemoveResponse, ApiError> {
        let id = request.request_id.clone();
        let cause = Cause {
            kind: CauseKind::Manual,
            id: id.clone(),
            summary: format!("{by} removed {}", request.server),
            actor: by,
            time: self.builder.now(),
            traceparent: kiln_service::trace::current(),
        };
        let store = self.builder.documents.store();
        requests::once(store, &id, &request, || self.decide_removal(&request.server, &cause)).await
    }

    async fn decide_removal(
        &self,
        name: &str,
        cause: &Cause,
    ) -> Result<(kiln_store::Batch, RemoveResponse), ApiError> {
        let Read { version, value: before } = self.server(name).await?;
        let now = self.builder.now();
        let mut edit = Edit::new(now);
        if before.removed {
            return Ok((edit.finish(), RemoveResponse {}));
        }
        let children = self.children(&before.name).await?;
        if !children.is_empty() {
            let reason = format!("the images of {} begin with that of {name}", children.join(", "));
            return Err(ApiError::precondition(reason, "remove them first, or let them begin with another"));
        }
        let building = before.building.as_ref().map(|building| building.build.clone());
        let source = before.source.clone();
        let server_name = before.name.clone();
        let stood = standing(&before);
        let (after, _, told) =
            head::remove(before, cause.clone(), now).map_err(crate::builder::Error::from)?;
        let record = AuditRecord::new(now, &cause.actor, "remove", name).of_server(&server_name);
        edit.audit(record.asked(&cause.id).changed(stood.clone(), standing(&after)));
        edit.decided(stood, &after, &told);
        edit.put_server(version, &after, &told)?;
        if let Some(read) = self.builder.documents.source(source.as_str()).await? {
            let mut source = read.value;
            source.servers.remove(&server_name);
            if source.servers.is_empty() {
                edit.delete_source(read.version, &source.id);
            } else {
                edit.put_source(read.version, &source)?;
            }
        }
        // Its own build serves nobody any more, unless another server with the same lock awaits it: that one then
        // finds it cancelled, and queues its own.
        if let Some(id) = building.filter(|id| id.server == server_name)
            && let Some(read) = self.builder.documents.build(&id).await?
            && !read.value.state.has_ended()
        {
            self.cancel_within(&mut edit, read, &cause.actor).await?;
        }
        Ok((edit.finish(), RemoveResponse {}))
    }

    async fn cancel_within(&self, edit: &mut Edit, read: Read<Build>, by: &str) -> Result<(), ApiError> {
        let mut build = read.value;
        build.cancel(by, self.builder.now()).map_err(crate::builder::Error::from)?;
        edit.put_build(read.version, &build, Some(kiln_builder_core::Told::BuildCancelled))?;
        self.builder.free_slot_of(edit, &build).await?;
        Ok(())
    }

    async fn children(&self, parent: &ServerName) -> Result<Vec<String>, ApiError> {
        let servers: Vec<Read<Server>> = self.builder.documents.all(server::KIND, "").await?;
        let is_child = |server: &Server| !server.removed && server.head.parent.as_ref() == Some(parent);
        Ok(servers
            .iter()
            .filter(|read| is_child(&read.value))
            .map(|read| read.value.name.to_string())
            .collect())
    }

    pub(super) async fn inspect(
        &self,
        request: InspectSourceRequest,
    ) -> Result<InspectSourceResponse, Status> {
        let documents = &self.builder.documents;
        let source = documents.source(&request.source).await.map_err(ApiError::from)?;
        let source = source.ok_or_else(|| ApiError::not_found("source", request.source.clone()))?.value;
        let look = match &source.place {
            Place::Git { .. } => self.builder.sources.look(&source.place).await.map_err(refused)?,
            // A folder that was sent is nowhere to be looked at again: what was sent is what it is.
            Place::Folder { .. } => {
                Look { place: source.place.clone(), commit: String::new(), found: Vec::new() }
            }
        };
        if matches!(source.place, Place::Git { .. }) {
            self.note(&look).await?;
        }
        let mut response =
            InspectSourceResponse { commit: look.commit.clone(), ..InspectSourceResponse::default() };
        for found in &look.found {
            let known = match found.name() {
                Some(name) => documents.server(name).await.map_err(ApiError::from)?.map(|read| read.value),
                None => None,
            };
            // One that a person removed stays so until a person applies it again.
            if known.as_ref().is_some_and(|server| server.removed) {
                continue;
            }
            let problem = match &found.read {
                Err(faulty) => faulty.problem(),
                Ok(_) => match &known {
                    Some(server) if server.source != source.id => {
                        format!("server {} is taken from source {}", server.name, server.source)
                    }
                    // What only shows beside the other servers, such as a parent that is not there.
                    Some(server) => server
                        .refused
                        .as_ref()
                        .filter(|refused| refused.digest == found.digest())
                        .map(|refused| refused.problem.clone())
                        .unwrap_or_default(),
                    None => String::new(),
                },
            };
            response.servers.push(InspectedServer {
                name: found.name().map(ToString::to_string).unwrap_or_default(),
                folder: found.folder.clone(),
                definition_digest: found.digest().to_string(),
                current_digest: known.map(|server| server.head.digest.to_string()).unwrap_or_default(),
                problem,
            });
        }
        for name in &source.servers {
            if let Some(read) = documents.server(name).await.map_err(ApiError::from)?
                && read.value.orphaned
            {
                response.orphaned.push(name.to_string());
            }
        }
        Ok(response)
    }

    async fn note(&self, look: &Look) -> Result<(), Status> {
        for _ in 0..TRIES {
            let edit = self.builder.sources.observe(look, self.builder.now()).await.map_err(refused)?;
            if edit.is_empty() {
                return Ok(());
            }
            match self.builder.documents.store().commit(edit.finish()).await {
                Ok(_) => return Ok(()),
                Err(kiln_store::Error::Conflict { .. }) => {}
                Err(error) => return Err(ApiError::from(error).into()),
            }
        }
        Err(ApiError::Conflict("others kept changing the servers of this source".to_owned()).into())
    }

    pub(super) async fn build_of(&self, id: &str) -> Result<Read<Build>, ApiError> {
        let id = kiln_api::convert::text("build", id)?;
        let read = self.builder.documents.build(&id).await?;
        read.ok_or_else(|| ApiError::not_found(build::KIND, id.to_string()))
    }
}

/// A source that can't be taken, as a status: a violation for each fault, with its place.
fn refused(error: Error) -> Status {
    let message = error.to_string();
    let (field, todo) = match error {
        Error::Store(error) => return ApiError::from(error).into(),
        Error::Git(ref git) if git.is_transient() => {
            let what_to_do = "see that it is a Git repository that this machine reaches, and apply it again";
            return ApiError::OutsideAway { reason: message, what_to_do: what_to_do.to_owned() }.into();
        }
        Error::Disk(_) => return ApiError::Unavailable(message).into(),
        Error::Faulty(faults) => {
            let mut details = ErrorDetails::new();
            for (place, why) in faults.into_iter().take(MAX_FAULTS) {
                details.add_bad_request_violation(place, why);
            }
            details.set_error_info("DEFINITION", "kiln", std::collections::HashMap::new());
            return Status::with_error_details(Code::InvalidArgument, message, details);
        }
        Error::Git(_) => ("source.git", "give another repository or branch"),
        Error::Folder(_) | Error::TooMuch(_) => {
            ("source", "apply a folder that holds definitions and their files alone")
        }
        Error::Empty { .. } => ("source", "`kiln init` writes a server.yaml to begin with"),
    };
    ApiError::invalid(field, message, todo).into()
}
