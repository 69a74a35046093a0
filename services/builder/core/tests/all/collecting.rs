use std::collections::BTreeSet;
use std::time::Duration;

use kiln_builder_core::collect::garbage;
use kiln_builder_core::head::By;
use kiln_model::cause::CauseKind;

use crate::world::{Content, World, digest, name};

#[test]
fn only_what_nobody_needs_and_is_older_than_a_day_goes() {
    let mut world = World::new();
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
    world.apply(&name("web"), &Content::new("a", 3), By::Hand, cause);
    world.work();
    let born = world.now;
    let in_force = world.servers[&name("web")].in_force.as_ref().unwrap().image;
    let [held, old, young] = ["held", "old", "young"].map(digest);
    world.advance(24 * 3600);
    let images = [(in_force, born), (held, born), (old, born), (young, world.now)];
    let servers: Vec<_> = world.servers.values().cloned().collect();
    let held = BTreeSet::from([held]);
    assert_eq!(garbage(&images, &held, &servers, Some(world.now), world.now), [old]);

    let long_ago = world.now.checked_sub(Duration::from_secs(600)).unwrap();
    for silent in [None, Some(long_ago)] {
        assert!(garbage(&images, &held, &servers, silent, world.now).is_empty(), "{silent:?}");
    }
}
