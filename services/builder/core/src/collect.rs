//! Which images can go.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::digest::Digest;

use crate::server::Server;
use crate::time::age;

/// An image is kept for this long whoever holds it: the deployer may be about to hold it.
const MIN_AGE: Duration = Duration::from_secs(24 * 3600);
/// A deployer that was not heard of for this long may hold something that it could not say.
pub const SILENT: Duration = Duration::from_secs(600);

/// Images that nobody needs: not held, not in force, not under anything in force, and older than a day. None while the
/// deployer is silent.
pub fn garbage(
    images: &[(Digest, Timestamp)],
    held: &BTreeSet<Digest>,
    servers: &[Server],
    deployer_heard: Option<Timestamp>,
    now: Timestamp,
) -> Vec<Digest> {
    if deployer_heard.is_none_or(|heard| age(heard, now) >= SILENT) {
        return Vec::new();
    }
    let needed = needed(held, servers);
    images
        .iter()
        .filter(|(digest, created)| age(*created, now) >= MIN_AGE && !needed.contains(digest))
        .map(|(digest, _)| *digest)
        .collect()
}

/// Images that a fleet, a rollout, a rollback or a build can come to need.
pub fn needed(held: &BTreeSet<Digest>, servers: &[Server]) -> BTreeSet<Digest> {
    let mut needed = held.clone();
    for server in servers {
        let in_force = server.in_force.iter().flat_map(|it| [Some(it.image), it.parent_image]);
        needed.extend(in_force.flatten());
        needed.extend(server.building.as_ref().and_then(|building| building.parent_image));
    }
    needed
}
