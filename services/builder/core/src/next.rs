//! What a server needs next.

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::revision::PackageVersions;

use crate::build::Build;
use crate::definition::DefinitionRef;
use crate::server::{Building, Server};

/// What a decision about a server rests on.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot<'a> {
    pub server: &'a Server,
    /// The build that it awaits.
    pub build: Option<&'a Build>,
    /// The server that its effective definition starts from.
    pub parent: Option<&'a Server>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Nothing,
    /// Look again then, unless something changes before.
    Wait(Timestamp),
    /// Its parent's next image comes first.
    AwaitParent,
    /// Resolve a lock and compare it.
    Plan(Box<Order>),
    /// The awaited build has ended.
    Adopt,
    /// The awaited build is not there: its document was lost with a restored store. Plan anew.
    Forget,
    /// The awaited build waits for its next try, and a newer definition is due: end it, and plan anew.
    Supersede,
}

/// A plan that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub definition: DefinitionRef,
    pub parent: Option<ParentImage>,
    pub causes: Vec<Cause>,
}

/// The image that a child starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentImage {
    pub image: Digest,
    pub lock_key: Digest,
    pub packages: PackageVersions,
    /// Those of them that an archive for security updates has.
    pub security: PackageVersions,
}

pub fn next(snapshot: Snapshot<'_>, now: Timestamp) -> Next {
    let Snapshot { server, build, parent } = snapshot;
    if server.removed {
        return Next::Nothing;
    }
    if let Some(building) = &server.building {
        return match build {
            Some(build) if build.state.has_ended() => Next::Adopt,
            Some(build) if build.is_tried_again() => superseded(server, building, now),
            Some(_) => Next::Nothing,
            None => Next::Forget,
        };
    }
    let (Some(wanted), Some(definition)) = (&server.wanted, server.effective()) else {
        return Next::Nothing;
    };
    let throttled = if wanted.is_automatic() { server.throttled_until(now) } else { None };
    let due = server.plan_due(wanted, now);
    let due = throttled.map_or(due, |until| due.max(until));
    if due > now {
        return Next::Wait(due);
    }
    let parent = match (&definition.parent, parent) {
        (None, _) => None,
        (Some(_), Some(parent)) if is_settled(parent) => match parent_image(parent) {
            Some(image) => Some(image),
            None => return Next::AwaitParent,
        },
        (Some(_), _) => return Next::AwaitParent,
    };
    Next::Plan(Box::new(Order { definition: definition.clone(), parent, causes: wanted.causes.clone() }))
}

/// Whether a build that was put off gives way. An archive may be away for hours; what mends a definition does not wait
/// for what it mends.
fn superseded(server: &Server, building: &Building, now: Timestamp) -> Next {
    let (Some(wanted), Some(effective)) = (&server.wanted, server.effective()) else { return Next::Nothing };
    if effective.digest == building.definition.digest {
        return Next::Nothing;
    }
    let due = server.plan_due(wanted, now);
    if due > now { Next::Wait(due) } else { Next::Supersede }
}

/// Whether no newer image of this server is on its way. A cascade so goes from parents to children, and a child is
/// built once for all that moved above it. A parent that can't be planned for now holds nobody back.
fn is_settled(server: &Server) -> bool {
    let plans = server.wanted.as_ref().is_some_and(|wanted| wanted.attempts == 0);
    server.building.is_none() && (!plans || server.effective().is_none())
}

/// What a child of this server starts from; none while it has no image.
pub fn parent_image(parent: &Server) -> Option<ParentImage> {
    let in_force = parent.in_force.as_ref().filter(|_| !parent.removed)?;
    Some(ParentImage {
        image: in_force.image,
        lock_key: in_force.lock_key,
        packages: in_force.packages.clone(),
        security: in_force.security.clone(),
    })
}

/// The awaited build is lost or gives way: what it was for is wanted again.
pub fn forget(server: &mut Server, now: Timestamp) {
    if let Some(building) = server.building.take() {
        for cause in building.causes {
            server.want(cause, now);
        }
    }
}
