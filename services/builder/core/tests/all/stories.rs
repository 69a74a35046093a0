//! Each story is told by the world's log; the snapshot is what a reader would expect to happen.

use insta::assert_snapshot;
use kiln_builder_core::build::{Build, State};
use kiln_builder_core::head::{By, Outcome};
use kiln_builder_core::next::Next;
use kiln_builder_core::signal::{self, Intake};
use kiln_builder_core::{Illegal, graph};
use kiln_model::cause::CauseKind;
use kiln_model::revision::RevisionContent;

use crate::world::{Content, OWNER, World, name};

fn applied(content: &Content) -> World {
    let mut world = World::new();
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
    world.apply(&name("web"), content, By::Hand, cause);
    world.work();
    world
}

fn commit(world: &mut World, content: &Content, id: &str) -> Outcome {
    let cause = world.cause(CauseKind::DefinitionChanged, id);
    world.apply(&name("web"), content, By::Signal, cause)
}

fn told(world: &World) -> String {
    assert_eq!(world.violations(), Vec::<String>::new(), "{}", world.log.join("\n"));
    world.log.join("\n")
}

#[test]
fn applied_twice_is_built_once() {
    let mut world = applied(&Content::new("a", 3));
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-2");
    world.apply(&name("web"), &Content::new("a", 3), By::Hand, cause);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn a_commit_of_image_and_run_is_one_revision() {
    let mut world = applied(&Content::new("a", 3));
    commit(&mut world, &Content::new("b", 5), "commit-1");
    world.work();
    world.advance(30);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn run_alone_needs_no_build_and_a_comment_needs_nothing() {
    let mut world = applied(&Content::new("a", 3));
    commit(&mut world, &Content::new("a", 5), "commit-1");
    world.advance(30);
    world.work();
    commit(&mut world, &Content { comment: "# why".to_owned(), ..Content::new("a", 5) }, "commit-2");
    world.advance(30);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn signals_within_the_debounce_are_one_plan() {
    let mut world = applied(&Content::new("a", 3));
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
    world.advance(10);
    world.signal(&name("web"), CauseKind::Reported, "ticket-7");
    world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
    world.work();
    world.advance(20);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn a_signal_during_a_build_is_one_more_plan() {
    let mut world = applied(&Content::new("a", 3));
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
    world.advance(30);
    world.settle();
    let (build, token) = world.claim().unwrap();
    for _ in 0..3 {
        world.signal(&name("web"), CauseKind::Reported, "ticket-7");
        world.settle();
        world.advance(15);
    }
    world.succeed(&build, token).unwrap();
    world.work();
    world.advance(30);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn a_bad_commit_is_not_built_again_and_holds_no_security_fix_back() {
    let mut world = applied(&Content::new("a", 3));
    commit(&mut world, &Content::new("bad", 3), "commit-1");
    world.advance(30);
    world.work();
    assert!(world.roll_back(&name("web"), 1, true));
    assert!(!world.roll_back(&name("web"), 1, true), "one verdict counts once");
    world.advance(30);
    world.work();
    // The same content in another commit, and a comment that gives the same outcome.
    commit(&mut world, &Content::new("bad", 3), "commit-2");
    world.advance(30);
    world.work();
    commit(&mut world, &Content { comment: "# try".to_owned(), ..Content::new("bad", 3) }, "commit-3");
    world.advance(30);
    world.work();
    // Back on the convicted content, a fix comes out.
    commit(&mut world, &Content::new("bad", 3), "commit-4");
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
    world.advance(30);
    world.work();
    // A mended commit goes out as any other.
    commit(&mut world, &Content::new("good", 3), "commit-5");
    world.advance(30);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn convicted_versions_are_not_shipped_until_one_of_them_moves_on() {
    let mut world = applied(&Content::new("a", 3));
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
    world.advance(30);
    world.work();
    world.roll_back(&name("web"), 1, false);
    world.advance(30);
    world.work();
    commit(&mut world, &Content::new("b", 3), "commit-1");
    world.advance(30);
    world.work();
    world.packages.insert("nginx".to_owned(), "3".to_owned());
    world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-3");
    world.advance(30);
    world.work();
    assert_snapshot!(told(&world));
}

/// The rollback is heard of when the same was applied anew already: it is not taken for good because it is newer.
#[test]
fn what_is_applied_after_a_removal_is_convicted_with_what_it_was_before() {
    let web = name("web");
    let mut world = applied(&Content::new("a", 3));
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    world.signal(&web, CauseKind::PackageUpdates, "release-file-2");
    world.advance(30);
    world.work();
    world.remove(&web);
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-2");
    world.apply(&web, &Content::new("a", 3), By::Hand, cause);
    world.work();
    world.rolled_back(&web, 2, 0, false);
    assert!(world.servers[&web].in_force.is_none(), "{:?}", world.servers[&web].in_force);
    world.advance(30);
    world.work();
    let failure = world.servers[&web].failure.as_ref().unwrap();
    assert!(
        !failure.transient && failure.problem.contains("what release 2 was rolled back from"),
        "{failure:?}"
    );
    // Once one of them has moved on, it goes out.
    world.packages.insert("nginx".to_owned(), "3".to_owned());
    world.signal(&web, CauseKind::PackageUpdates, "release-file-3");
    world.advance(30);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn a_first_revision_that_was_bad_leaves_nothing_to_go_on_with() {
    let mut world = applied(&Content::new("bad", 3));
    world.roll_back(&name("web"), 0, true);
    world.signal(&name("web"), CauseKind::Reported, "ticket-7");
    world.advance(60);
    world.work();
    assert_eq!(world.next(&name("web")), Next::Nothing);
    commit(&mut world, &Content::new("good", 3), "commit-1");
    world.advance(60);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn what_may_pass_is_tried_again_and_what_may_not_is_left() {
    let mut world = World::new();
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
    world.apply(&name("web"), &Content::new("a", 3), By::Hand, cause);
    world.settle();
    let (build, token) = world.claim().unwrap();
    world.fail(&build, token, true).unwrap();
    assert_eq!(world.claim(), None, "its backoff holds");
    world.advance(2);
    let (build, token) = world.claim().unwrap();
    world.fail(&build, token, false).unwrap();
    world.advance(3600);
    world.work();
    assert_eq!(world.servers[&name("web")].problem(), "web-b1 failed: step run: exit status 1");
    // A new cause is a new try at the same lock.
    let cause = world.cause(CauseKind::Manual, "build-1");
    let now = world.now;
    world.servers.get_mut(&name("web")).unwrap().want(cause, now);
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn an_archive_that_is_away_for_hours_holds_no_security_fix_back_for_good() {
    let mut world = applied(&Content::new("a", 3));
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
    world.advance(30);
    let (gone, mut seconds, mut tries) = (world.now, 0, 0);
    // Three hours, looked at every two seconds.
    while seconds < 3 * 3600 {
        world.settle();
        if let Some((build, token)) = world.claim() {
            world.fail(&build, token, true).unwrap();
            tries += 1;
            // The monitor says it again, and that is no further build.
            world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
        }
        seconds += 2;
        world.advance(2);
    }
    let first = &world.builds["web-b2"];
    let lasted = first.ended.unwrap().duration_since(gone).as_secs();
    assert!((1600..1700).contains(&lasted), "{lasted} s of tries at one lock");
    assert!((10..60).contains(&tries), "{tries}");
    assert!(world.servers[&name("web")].problem().contains("failed: step run"));
    // It is back; meanwhile the versions of the first lock left it.
    world.packages.insert("nginx".to_owned(), "3".to_owned());
    world.advance(1700);
    world.work();
    world.advance(600);
    world.work();
    let RevisionContent::Image(image) = &world.revisions.last().unwrap().content else { panic!("a removal") };
    assert!(image.packages["nginx"] != "1", "{}", world.log.join("\n"));
    assert_eq!(
        (image.cause.kind, world.servers[&name("web")].problem()),
        (CauseKind::PackageUpdates, String::new())
    );
    assert_eq!(world.violations(), Vec::<String>::new());
}

#[test]
fn a_mended_definition_does_not_wait_for_the_tries_of_the_one_before() {
    let mut world = applied(&Content::new("a", 3));
    commit(&mut world, &Content::new("b", 3), "commit-1");
    world.advance(30);
    world.settle();
    for _ in 0..6 {
        let (build, token) = world.claim().unwrap();
        world.fail(&build, token, true).unwrap();
        world.advance(64);
        world.settle();
    }
    commit(&mut world, &Content::new("c", 3), "commit-2");
    world.settle();
    assert_eq!(world.builds["web-b2"].state.as_str(), "queued", "the debounce holds");
    world.advance(30);
    world.work();
    assert_eq!(world.builds["web-b2"].state.as_str(), "cancelled");
    let in_force = world.servers[&name("web")].in_force.as_ref().unwrap();
    assert_eq!((in_force.generation, in_force.build.number), (2, 3));
    assert_eq!(world.violations(), Vec::<String>::new());
}

#[test]
fn a_build_that_ends_its_builder_again_and_again_says_so_and_is_left_alone_for_a_while() {
    let mut world = World::new();
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
    world.apply(&name("web"), &Content::new("a", 3), By::Hand, cause);
    world.settle();
    for round in 1..=5 {
        let (id, _) = world.claim().unwrap();
        let now = world.now;
        let build = world.builds.get_mut(&id).unwrap();
        assert!(!build.abandoned(|owner| owner == crate::world::OWNER, now), "its owner lives");
        assert!(build.abandoned(|owner| owner == format!("process-{round}"), now));
        assert_eq!(build.attempts, 0);
    }
    world.settle();
    assert_eq!(world.claim(), None);
    let problem = world.servers[&name("web")].problem();
    assert!(problem.contains("web-b1 failed: the builder ended in the middle of it 5 times"), "{problem}");
    world.advance(599);
    world.work();
    assert_eq!(world.revisions.len(), 0);
    // What ended it was something else.
    world.advance(1);
    world.work();
    assert_eq!((world.revisions.len(), world.servers[&name("web")].problem().as_str()), (1, ""));
    assert_eq!(world.violations(), Vec::<String>::new());
}

#[test]
fn a_builder_that_is_stopped_in_order_or_loses_a_worker_goes_on() {
    let mut world = World::new();
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
    world.apply(&name("web"), &Content::new("a", 3), By::Hand, cause);
    world.settle();
    let now = world.now;
    for _ in 0..10 {
        let (id, token) = world.claim().unwrap();
        let build = world.builds.get_mut(&id).unwrap();
        build.release(token, now).unwrap();
        assert!(build.release(token, now).is_err(), "given back once");
        assert_eq!((build.attempts, build.interruptions), (0, 0));
    }
    let (id, token) = world.claim().unwrap();
    world.builds.get_mut(&id).unwrap().broke_off(token, now).unwrap();
    assert_eq!(world.claim(), None, "its backoff holds");
    world.advance(2);
    world.work();
    assert_eq!(world.revisions.len(), 1);
}

#[test]
fn a_signal_that_flaps_trips_the_breaker() {
    let mut world = applied(&Content::new("a", 3));
    let mut intakes = Vec::new();
    for round in 0..5 {
        world.packages.insert("nginx".to_owned(), format!("flap-{round}"));
        intakes.push(world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2"));
        world.advance(60);
        world.work();
    }
    use Intake::{Tripped, Wanted};
    assert_eq!(intakes, [Wanted, Wanted, Wanted, Tripped, Tripped]);
    assert!(world.servers[&name("web")].problem().contains("came back 3 times"));
    world.advance(3600);
    assert_eq!(world.signal(&name("web"), CauseKind::PackageUpdates, "release-file-2"), Wanted);
    assert_eq!(world.servers[&name("web")].problem(), "");
}

#[test]
fn a_signal_that_persists_is_said_once() {
    let mut world = applied(&Content::new("a", 3));
    let signal = world.make_signal(&name("web"), CauseKind::Reported, "ticket-7");
    world.signal(&name("web"), CauseKind::Reported, "ticket-7");
    world.advance(30);
    world.work();
    let now = world.now;
    let web = world.servers.get_mut(&name("web")).unwrap();
    assert!(!signal::persists(web, &signal, now), "the monitor has time to see that it is gone");
    world.advance(600);
    let now = world.now;
    let web = world.servers.get_mut(&name("web")).unwrap();
    assert!(signal::persists(web, &signal, now));
    assert!(!signal::persists(web, &signal, now));
    assert!(web.problem().contains("`ticket-7` persists although it was followed"), "{}", web.problem());
    assert!(signal::resolved(web, signal.id));
    assert_eq!(web.problem(), "");
}

#[test]
fn a_parents_image_cascades_once() {
    let mut world = World::new();
    for (server, parent) in [("base", None), ("app", Some("base")), ("site", Some("app"))] {
        let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
        let content = Content { parent: parent.map(name), ..Content::new(server, 1) };
        world.apply(&name(server), &content, By::Hand, cause);
    }
    world.work();
    world.advance(60);
    world.work();
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    for server in ["site", "app", "base"] {
        world.signal(&name(server), CauseKind::PackageUpdates, "release-file-2");
    }
    for _ in 0..4 {
        world.advance(30);
        world.work();
    }
    assert_snapshot!(told(&world));
}

#[test]
fn builds_come_as_they_were_asked_for_but_for_security_updates() {
    let mut world = World::new();
    let base = name("base");
    for (server, parent) in [("base", None), ("zoo", Some(&base)), ("app", None)] {
        let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
        let content = Content { parent: parent.cloned(), ..Content::new(server, 1) };
        world.apply(&name(server), &content, By::Hand, cause);
    }
    world.work();
    world.advance(60);
    world.work();
    let queue = |world: &World| {
        let waits = |build: &&Build| matches!(build.state, State::Queued { .. });
        let mut waiting: Vec<_> = world.builds.values().filter(waits).collect();
        waiting.sort_by_key(|build| build.precedence());
        waiting.iter().map(|build| build.id.to_string()).collect::<Vec<_>>()
    };
    for (server, comment) in [("x", "first"), ("app", "second")] {
        let cause = world.cause(CauseKind::DefinitionApplied, comment);
        world.apply(&name(server), &Content::new(comment, 1), By::Hand, cause);
        world.settle();
        world.advance(1);
    }
    assert_eq!(queue(&world), ["x-b1", "app-b2"]);
    // One that x has from its first build on mends nothing in it.
    world.packages.insert("nginx".to_owned(), "2".to_owned());
    world.security.insert("nginx".to_owned(), "2".to_owned());
    world.signal(&base, CauseKind::PackageUpdates, "release-file-2");
    world.advance(30);
    world.settle();
    assert_eq!(queue(&world), ["base-b2", "x-b1", "app-b2"]);
    let now = world.now;
    let base = world.builds.get_mut("base-b2").unwrap();
    let token = base.claim(OWNER, now).unwrap();
    world.succeed("base-b2", token).unwrap();
    world.settle();
    world.advance(30);
    world.settle();
    assert_eq!(queue(&world), ["zoo-b2", "x-b1", "app-b2"], "what follows from it comes before the rest too");
}

#[test]
fn two_servers_with_one_lock_share_one_build() {
    let mut world = applied(&Content::new("a", 3));
    for server in ["twin", "triplet"] {
        let cause = world.cause(CauseKind::DefinitionApplied, "apply-2");
        world.apply(&name(server), &Content::new("b", 1), By::Hand, cause);
    }
    world.settle();
    let now = world.now;
    world.builds.get_mut("triplet-b1").unwrap().cancel("somebody", now).unwrap();
    world.work();
    assert_snapshot!(told(&world));
}

#[test]
fn what_is_applied_again_is_built_though_its_cancelled_build_is_not_taken_in_yet() {
    let mut world = applied(&Content::new("a", 3));
    commit(&mut world, &Content::new("b", 3), "commit-1");
    world.advance(30);
    world.settle();
    let now = world.now;
    world.builds.get_mut("web-b2").unwrap().cancel("somebody", now).unwrap();
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-2");
    world.apply(&name("web"), &Content::new("b", 3), By::Hand, cause);
    world.work();
    let in_force = world.servers[&name("web")].in_force.as_ref().unwrap();
    assert_eq!(in_force.build.to_string(), "web-b3");
}

/// The plan for it was still under way, as with an archive that is away.
#[test]
fn a_definition_that_comes_back_before_it_was_built_is_looked_at() {
    let mut world = applied(&Content::new("a", 3));
    let (web, one, other) = (name("web"), Content::new("b", 3), Content::new("c", 3));
    let fingerprint = world.define(&web, &one).digest.to_string();
    assert_eq!(world.signal(&web, CauseKind::DefinitionChanged, &fingerprint), Intake::LookAtSource);
    let cause = signal::cause(&world.make_signal(&web, CauseKind::DefinitionChanged, &fingerprint));
    world.apply(&web, &one, By::Signal, cause);
    commit(&mut world, &other, "commit-2");
    world.advance(1);
    assert_eq!(world.signal(&web, CauseKind::DefinitionChanged, &fingerprint), Intake::LookAtSource);
}

#[test]
fn a_plan_for_what_is_no_longer_there_counts_for_nothing() {
    let mut world = applied(&Content::new("a", 3));
    commit(&mut world, &Content::new("b", 3), "commit-1");
    world.advance(30);
    let Next::Plan(order) = world.next(&name("web")) else { panic!("a plan is due") };
    let planned = world.resolve(&order);
    commit(&mut world, &Content::new("c", 3), "commit-2");
    let refused = world.commit_plan(&name("web"), planned);
    assert!(matches!(refused, Err(Illegal::Stale { .. })), "{refused:?}");
    world.work();
    let newest = world.revisions.last().unwrap();
    assert_eq!(newest.generation, 2);
    assert_eq!(world.builds.len(), 2, "b was never built");
}

#[test]
fn circles_and_missing_parents_are_refused() {
    let problem = |parents: &[(&str, Option<&str>)]| {
        let map = parents.iter().map(|(child, parent)| (name(child), parent.map(name))).collect();
        graph::check(&map, &[name(parents[0].0)]).map_err(|(_, illegal)| illegal.to_string())
    };
    let circle = problem(&[("a", Some("b")), ("b", Some("c")), ("c", Some("a"))]).unwrap_err();
    assert!(circle.contains("a -> b -> c -> a"), "{circle}");
    let missing = problem(&[("d", Some("e"))]).unwrap_err();
    assert!(missing.contains("`image.from.server` of d names e, and there is no such server"), "{missing}");
    assert_eq!(problem(&[("d", Some("e")), ("e", None)]), Ok(()));
}

#[test]
fn a_server_that_was_restored_goes_on_above_the_numbers_that_it_forgot() {
    let mut world = applied(&Content::new("a", 3));
    let server = name("web");
    let restored = world.servers[&server].clone().numbered_above(50);
    world.servers.insert(server.clone(), restored);
    commit(&mut world, &Content::new("b", 3), "commit-1");
    world.advance(30);
    world.work();
    let in_force = world.servers[&server].in_force.as_ref().unwrap();
    assert_eq!((in_force.generation, in_force.build.number), (51, 51));
    assert_eq!(world.violations(), Vec::<String>::new());
}
