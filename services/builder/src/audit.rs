//! What the audit records say of a server.

use kiln_builder_core::Told;
use kiln_builder_core::server::Server;
use kiln_model::revision::RevisionContent;
use kiln_store::AuditRecord;
use serde_json::{Value, json};

use crate::store::Edit;

/// As whom the builder decides.
const ACTOR: &str = "builder";

/// What a decision can change of a server.
pub fn standing(server: &Server) -> Value {
    let in_force = server.in_force.as_ref();
    json!({
        "definition": server.head.digest,
        "commit": server.head.commit,
        "generation": server.generation,
        "image": in_force.map(|in_force| in_force.image),
        "orphaned": server.orphaned,
        "removed": server.removed,
    })
}

impl Edit {
    /// Records what the builder decided of a server by itself, or following what somebody asked for.
    pub fn decided(&mut self, before: Value, after: &Server, told: &[Told]) {
        for told in told {
            let (action, of_it) = match told {
                Told::DefinitionApplied => ("definition.applied", Value::Null),
                Told::DefinitionOrphaned => ("definition.orphaned", Value::Null),
                Told::DefinitionRemoved => ("definition.removed", Value::Null),
                Told::DefinitionRefused { problem } => ("definition.refused", json!({ "problem": problem })),
                Told::RevisionCreated(revision) => {
                    let (image, cause) = match &revision.content {
                        RevisionContent::Image(image) => (Some(image.image_digest), &image.cause),
                        RevisionContent::Removed { cause } => (None, cause),
                    };
                    let cause = json!({ "kind": cause.kind, "id": cause.id, "actor": cause.actor });
                    ("revision.created", json!({ "image": image, "cause": cause }))
                }
                // No decision, or recorded with the build.
                Told::PlanUnchanged { .. }
                | Told::BuildQueued
                | Told::BuildStarted
                | Told::BuildSucceeded
                | Told::BuildFailed
                | Told::BuildCancelled => continue,
            };
            let mut now = standing(after);
            if let (Some(now), Value::Object(more)) = (now.as_object_mut(), of_it) {
                now.extend(more);
            }
            let record = AuditRecord::new(self.now(), ACTOR, action, after.name.as_str());
            self.audit(record.of_server(&after.name).changed(before.clone(), now));
        }
    }

    /// Records that a build is to run.
    pub(crate) fn queued(&mut self, build: &kiln_builder_core::build::Build) {
        let cause = &build.cause;
        let cause = json!({ "kind": cause.kind, "id": cause.id, "actor": cause.actor });
        let after = json!({ "lock": build.lock_key, "cause": cause });
        let record = AuditRecord::new(self.now(), ACTOR, "build.queued", build.id.to_string());
        self.audit(record.of_server(build.server()).changed(Value::Null, after));
    }
}
