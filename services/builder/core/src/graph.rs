//! Which server starts from which.

use std::collections::BTreeMap;

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::definition::order_by_parent;
use kiln_model::name::ServerName;

use crate::Illegal;
use crate::server::Server;
use crate::time::after;

/// Chains longer than this are refused: each link is a build that waits for the one before.
const MAX_DEPTH: usize = 16;

/// Checks that every server among `changed` ends, by way of its parents, at something that is no server.
///
/// # Errors
/// The server at fault with [`Illegal::Refused`], for a parent that is not there, a circle, or a chain too long.
pub fn check(
    parents: &BTreeMap<ServerName, Option<ServerName>>,
    changed: &[ServerName],
) -> Result<(), (ServerName, Illegal)> {
    if let Err(cycle) = order_by_parent(parents) {
        let at_fault =
            cycle.servers().iter().find(|server| changed.contains(server)).or(cycle.servers().first());
        if let Some(server) = at_fault {
            return Err((server.clone(), Illegal::Refused { reason: cycle.to_string() }));
        }
    }
    for start in changed {
        let refused = |reason: String| Err((start.clone(), Illegal::Refused { reason }));
        let (mut at, mut above) = (start, 0);
        while let Some(Some(parent)) = parents.get(at) {
            if !parents.contains_key(parent) {
                return refused(format!(
                    "`image.from.server` of {at} names {parent}, and there is no such server: apply it first, or with \
                     this one"
                ));
            }
            above += 1;
            if above > MAX_DEPTH {
                return refused(format!("{start} has more than {MAX_DEPTH} servers above it"));
            }
            at = parent;
        }
    }
    Ok(())
}

/// A parent has an image that its child does not stand on yet: a plan is wanted, unless one for this image was.
///
/// The id of the cause is the parent's revision, so it asks once however often it is noticed.
pub fn follow_parent(child: &mut Server, parent: &Server, cause: &Cause, now: Timestamp) -> bool {
    let stands_on = child.in_force.as_ref().and_then(|in_force| in_force.parent_image);
    let awaits = child.building.as_ref().and_then(|building| building.parent_image);
    let Some(in_force) = &parent.in_force else { return false };
    let is_child = child.effective().is_some_and(|effective| effective.parent.as_ref() == Some(&parent.name));
    if child.removed || !is_child || stands_on == Some(in_force.image) || awaits == Some(in_force.image) {
        return false;
    }
    let id = format!("{}-g{}", parent.name, in_force.generation);
    // A plan for this image that failed, or was held, waits for its inputs to change, as any other.
    if child.is_following(&id) || child.parent_followed.as_deref() == Some(&id) {
        return false;
    }
    let due = after(now, child.head.update.debounce.as_duration());
    let summary = format!("{} has a new image: {}", parent.name, cause.summary);
    child.want(Cause { id: id.clone(), summary, ..cause.clone() }, due);
    child.parent_followed = Some(id);
    true
}
