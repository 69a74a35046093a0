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
    let in_force = servers.iter().filter_map(|server| server.in_force.as_ref());
    let needed: BTreeSet<_> =
        in_force.flat_map(|in_force| [Some(in_force.image), in_force.parent_image]).flatten().collect();
    let building: BTreeSet<_> =
        servers.iter().filter_map(|server| server.building.as_ref()?.parent_image).collect();
    images
        .iter()
        .filter(|(digest, created)| {
            age(*created, now) >= MIN_AGE
                && !held.contains(digest)
                && !needed.contains(digest)
                && !building.contains(digest)
        })
        .map(|(digest, _)| *digest)
        .collect()
}
