//! What of a decision goes into the audit records.

use std::collections::BTreeSet;

use kiln_deployer_core::{Event, Fleet};
use kiln_model::name::InstanceId;
use kiln_store::AuditRecord;
use serde_json::{Value, json};

use crate::store::Outcome;

/// As whom the deployer decides.
const ACTOR: &str = "deployer";

/// What a decision can change of a fleet.
pub(crate) fn standing(fleet: &Fleet) -> Value {
    let rollout = fleet.rollout.as_ref().map(|rollout| json!({ "id": rollout.id, "state": rollout.state }));
    json!({
        "release": fleet.release,
        "last_good": fleet.last_good,
        "rollout": rollout,
        "live": live(fleet).len(),
        "removed": fleet.removed,
    })
}

fn live(fleet: &Fleet) -> BTreeSet<&InstanceId> {
    fleet.instances.iter().filter(|(_, instance)| instance.is_live()).map(|(id, _)| id).collect()
}

/// Records of what the deployer decided: releases, steps of a rollout, and which instances are to be there.
pub(crate) fn decisions(before: &Fleet, outcome: &Outcome<'_>) -> Vec<AuditRecord> {
    let after = outcome.fleet;
    let record = |action: &str, more: Value| {
        let mut now = standing(after);
        if let (Some(now), Value::Object(more)) = (now.as_object_mut(), more) {
            now.extend(more);
        }
        let record = AuditRecord::new(outcome.now, ACTOR, action, after.server.as_str());
        record.of_server(&after.server).changed(standing(before), now)
    };
    let mut records = Vec::new();
    for event in outcome.events {
        match event {
            Event::Release(release) => {
                let revision = &release.revision;
                let more = json!({
                    "created": release.number, "image": revision.image_digest,
                    "cause": { "kind": revision.cause.kind, "id": revision.cause.id, "actor": revision.cause.actor },
                });
                records.push(record("release.created", more));
            }
            Event::Rollout(verb, rollout) => {
                let more = json!({
                    "of": rollout.id, "from": rollout.from, "to": rollout.target(), "problem": rollout.problem,
                    "convicted": rollout.convicted.is_some(),
                });
                records.push(record(&format!("rollout.{}", verb.as_str()), more));
            }
            // What an instance does by itself is no decision.
            Event::Instance(..) => {}
        }
    }
    let (was, is) = (live(before), live(after));
    let names = |ids: Vec<&&InstanceId>| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
    let launch = names(is.difference(&was).collect());
    // One that ended by itself was not taken out by anybody.
    let stays_known = |id: &&&InstanceId| !after.instances.get(**id).is_some_and(|it| it.is_broken());
    let retire = names(was.difference(&is).filter(stays_known).collect());
    if !launch.is_empty() || !retire.is_empty() {
        records.push(record("instances.changed", json!({ "launch": launch, "retire": retire })));
    }
    records
}
