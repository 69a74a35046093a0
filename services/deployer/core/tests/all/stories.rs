//! Scripts that read like stories: what a person, a commit or an accident does is marked `>`.

use std::time::Duration;

use insta::assert_snapshot;
use kiln_deployer_core::{Instance, Refused, RolloutState, SeenState, View, next};
use kiln_model::cause::CauseKind;
use kiln_model::definition::Mode;
use kiln_model::name::InstanceId;
use kiln_model::run::{RunSpec, Strategy};
use kiln_model::time::Millis;

use crate::world::{Behaviour, Made, World, run};

fn id(text: &str) -> InstanceId {
    text.parse().unwrap()
}

/// Three healthy instances of `image one`.
fn standing() -> World {
    let mut world = World::new();
    world.revise(&Made::new("first", "one"));
    world.play(60_000);
    assert_eq!((world.fleet.release, world.fleet.last_good), (1, 1));
    world.story.clear();
    world
}

#[test]
fn a_first_release_launches_everything_at_once() {
    let mut world = World::new();
    world.revise(&Made::new("first", "one"));
    world.play(60_000);
    assert_snapshot!(world.told());
}

#[test]
fn a_new_image_replaces_one_after_the_other_and_start_first() {
    let mut world = standing();
    let began = world.now;
    world.revise(&Made::new("second", "two"));
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.outages, 0);
    // Three times the first probe of a new instance, and not a moment of waiting for a poll.
    let ended = world.fleet.finished.as_ref().unwrap().ended.unwrap();
    let took = ended.as_millisecond() - 1_700_000_000_000 - began as i64;
    assert_eq!(took, 300);
}

#[test]
fn a_server_that_is_placed_on_another_node_moves_there_one_after_the_other() {
    let mut world = standing();
    world.revise(&Made::new("second", "one").with(|run| run.node = Some("edge-2".parse().unwrap())));
    world.play(60_000);
    world.say("> back, in the middle of which the deployer is killed");
    world.rollback(None).unwrap();
    world.play(150);
    world.crash();
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.target(), world.outages), (1, 0));
    let nodes: Vec<_> = world.fleet.nodes().into_iter().map(ToString::to_string).collect();
    assert_eq!(nodes, ["local"]);
}

#[test]
fn an_image_whose_health_never_comes_is_rolled_back_and_does_not_come_back() {
    let mut world = standing();
    world.behave("bad", Behaviour::NeverHealthy);
    world.revise(&Made::new("second", "bad"));
    world.play(120_000);
    world.say("the same definition, baked again");
    world.revise(&Made::new("second", "bad with newer packages"));
    world.play(120_000);
    world.say("a package update on the last good definition still goes out");
    world.revise(&Made::new("first", "one with newer packages"));
    world.play(120_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.release, world.outages), (4, 0));
}

#[test]
fn an_instance_that_exits_turns_the_rollout_back() {
    let mut world = standing();
    world.behave("crashes", Behaviour::Exits { after: 40 });
    world.revise(&Made::new("second", "crashes"));
    world.play(120_000);
    assert_snapshot!(world.told());
    let failure = world.fleet.finished.as_ref().unwrap().failure.clone().unwrap();
    assert_eq!((failure.exit_code, failure.last_log.is_some()), (Some(1), true));
}

#[test]
fn what_can_not_be_launched_or_verified_turns_back() {
    let mut world = standing();
    world.behave("refused", Behaviour::Refused);
    world.revise(&Made::new("second", "refused"));
    world.play(120_000);
    world.behave("tampered", Behaviour::Tampered);
    world.revise(&Made::new("third", "tampered"));
    world.play(120_000);
    assert_snapshot!(world.told());
}

#[test]
fn a_launch_that_was_cut_off_is_tried_again() {
    let mut world = standing();
    world.behave("two", Behaviour::Refused);
    world.revise(&Made::new("second", "two"));
    world.look();
    world.look();
    world.say("> the node is killed in the middle of the launch, and starts again");
    world.behave("two", Behaviour::Good);
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.last_good, world.outages), (2, 0));
}

#[test]
fn however_often_a_launch_is_cut_off_its_release_is_not_to_blame() {
    let mut world = standing();
    world.behave("two", Behaviour::CutOff);
    world.revise(&Made::new("second", "two"));
    for _ in 0..12 {
        world.look();
    }
    let launches = world.story.iter().filter(|line| line.contains("launch web-r2-")).count();
    assert!(launches > 4, "{}", world.told());
    world.say("> the node stays");
    world.behave("two", Behaviour::Good);
    world.play(60_000);
    assert_eq!((world.fleet.last_good, world.outages), (2, 0), "{}", world.told());
    assert!(world.fleet.quarantine.is_empty());
}

#[test]
fn a_machine_that_goes_down_in_the_middle_of_a_rollout_convicts_nobody() {
    for looks in [1, 2, 3, 5, 8, 13, 21] {
        let mut world = standing();
        world.revise(&Made::new("second", "two"));
        for _ in 0..looks {
            world.look();
        }
        world.say("> the machine goes down, and comes back");
        world.lose_all();
        world.play(60_000);
        assert_eq!((world.fleet.last_good, world.running().len()), (2, 3), "{}", world.told());
        assert!(world.fleet.quarantine.is_empty(), "{}", world.told());
        assert!(world.fleet.rollout.is_none(), "{}", world.told());
    }
}

#[test]
fn what_the_monitor_holds_for_gone_does_not_hold_up_a_rollout() {
    let mut world = World::new();
    // Nobody is to replace it, so it stays.
    let patient = |definition, image| Made { unhealthy: Mode::Never, ..Made::new(definition, image) };
    world.revise(&patient("first", "one"));
    world.play(60_000);
    world.story.clear();
    let old = world.running()[2].clone();
    world.hold_for_gone(&old);
    world.play(60_000);
    // Long after it was said.
    world.now += 60_000;
    world.revise(&patient("second", "two"));
    world.play(120_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.last_good, world.outages), (2, 0));
}

#[test]
fn a_new_instance_that_the_monitor_holds_for_gone_turns_back() {
    let mut world = standing();
    world.revise(&Made::new("second", "two").with(|run| run.rollout.soak = Millis::from_secs(8)));
    world.play(200);
    let new = world.running().into_iter().find(|id| id.release == 2).unwrap();
    world.hold_for_gone(&new);
    world.play(120_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.last_good, world.outages), (1, 0));
}

#[test]
fn a_deadline_turns_back() {
    let mut world = standing();
    world.behave("slow", Behaviour::NeverHealthy);
    let slow = Made::new("second", "slow").with(|run| {
        run.health.as_mut().unwrap().start = Millis::from_secs(600);
        run.rollout.deadline = Millis::from_secs(5);
    });
    world.revise(&slow);
    world.play(120_000);
    assert_snapshot!(world.told());
}

#[test]
fn what_sickens_half_way_is_replaced_by_what_was_good() {
    let mut world = standing();
    world.behave("sickens", Behaviour::Sickens { after: 2500 });
    let made = Made::new("second", "sickens").with(|run| run.rollout.soak = Millis::from_secs(1));
    world.revise(&made);
    world.play(120_000);
    assert_snapshot!(world.told());
    assert_eq!(world.outages, 0);
}

#[test]
fn the_way_back_fails_too() {
    let mut world = standing();
    world.behave("sickens", Behaviour::Sickens { after: 2500 });
    let made = Made::new("second", "sickens").with(|run| run.rollout.soak = Millis::from_secs(1));
    world.revise(&made);
    world.play(2200);
    world.say("> image one is broken now");
    world.behave("one", Behaviour::Refused);
    world.play(120_000);
    let halted = world.fleet.finished.as_ref().map(|r| r.state);
    assert_eq!(halted, Some(RolloutState::Failed));
    assert!(!world.running().is_empty());
    world.say("a newer revision starts afresh");
    world.revise(&Made::new("third", "three"));
    world.play(120_000);
    assert_snapshot!(world.told());
}

#[test]
fn a_first_release_that_fails_has_nowhere_to_go() {
    let mut world = World::new();
    world.behave("bad", Behaviour::Exits { after: 10 });
    world.revise(&Made::new("first", "bad"));
    world.play(120_000);
    assert!(world.running().is_empty());
    world.revise(&Made::new("second", "good"));
    world.play(120_000);
    assert_snapshot!(world.told());
}

#[test]
fn a_silent_monitor_holds_a_rollout() {
    let mut world = standing();
    world.monitor_up = false;
    world.say("> the monitor dies");
    world.play(10_000);
    world.now += 10_000;
    world.revise(&Made::new("second", "two"));
    world.play(300_000);
    world.say("> the monitor is back");
    world.monitor_up = true;
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.fleet.last_good, 2);
}

/// Another one, which has the fleet for its own for a moment longer, may have heard more.
#[test]
fn a_deployer_that_is_new_holds_nothing_by_what_it_was_told_first() {
    let mut world = standing();
    world.revise(&Made::new("second", "two").with(|run| run.rollout.soak = Millis::from_secs(8)));
    world.play(2_000);
    let mut view = world.view.clone();
    view.health.values_mut().for_each(|told| told.age = Duration::from_secs(60));
    let state = |view: &View| {
        let decision = next(&world.fleet, &world.releases, view, world.time());
        decision.fleet.rollout.unwrap().state
    };
    assert_eq!(state(&view), RolloutState::Held);
    view.watching = Duration::from_millis(500);
    assert_eq!(state(&view), RolloutState::Running);
}

#[test]
fn a_rollback_needs_nobody_but_the_node() {
    let mut world = standing();
    world.revise(&Made::new("second", "two"));
    world.play(60_000);
    world.story.clear();
    world.monitor_up = false;
    world.say("> monitor and builder die");
    world.now += 60_000;
    world.rollback(None).unwrap();
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.release, world.outages), (1, 0));
    assert_eq!(world.rollback(None), Err(Refused::NoGood("web".parse().unwrap())));
}

#[test]
fn a_newer_revision_takes_over_and_the_last_good_release_stays() {
    let mut world = standing();
    world.revise(&Made::new("second", "two").with(|run| run.rollout.soak = Millis::from_secs(5)));
    world.play(7000);
    world.revise(&Made::new("third", "three"));
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.fleet.last_good, 3);
}

#[test]
fn a_revision_waits_for_the_way_back_to_end() {
    let mut world = standing();
    world.behave("bad", Behaviour::Exits { after: 50 });
    world.behave("one", Behaviour::Good);
    world.revise(&Made::new("second", "bad").with(|run| {
        run.rollout.strategy = Strategy::Rolling { max_surge: 0, max_unavailable: 1 };
    }));
    world.play(60);
    world.revise(&Made::new("third", "three"));
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.fleet.last_good, 3);
}

#[test]
fn without_surge_an_old_one_leaves_first() {
    let mut world = standing();
    world.revise(&Made::new("second", "two").with(|run| {
        run.rollout.strategy = Strategy::Rolling { max_surge: 0, max_unavailable: 1 };
    }));
    world.play(60_000);
    assert_snapshot!(world.told());
}

#[test]
fn replicas_and_ports_change_within_a_rollout() {
    let mut world = standing();
    world.revise(&Made::new("second", "one").with(|run| {
        run.replicas = 5;
        run.ports[0].target = 81;
    }));
    world.play(60_000);
    world.revise(&Made::new("third", "one").with(|run| run.replicas = 1));
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.running().len(), 1);
}

#[test]
fn the_same_image_and_run_only_moves_the_number() {
    let mut world = standing();
    world.revise(&Made::new("a comment was added", "one"));
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.release, world.fleet.last_good), (2, 2));
}

#[test]
fn a_killed_instance_is_replaced_when_the_monitor_says_so() {
    let mut world = standing();
    world.say("> web-r1-1-a2 is killed");
    world.exit(&id("web-r1-1-a2"), 137);
    world.play(200);
    world.signal(&id("web-r1-1-a2"), CauseKind::Gone);
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.running().len(), 3);
}

#[test]
fn a_killed_instance_is_replaced_though_the_monitor_is_dead() {
    let mut world = standing();
    world.monitor_up = false;
    world.say("> the monitor dies, then web-r1-1-a2 is killed");
    world.exit(&id("web-r1-1-a2"), 137);
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.running().len(), 3);
}

#[test]
fn where_a_person_decides_nothing_is_replaced_unasked() {
    let mut world = World::new();
    let made = Made { unhealthy: Mode::Approve, ..Made::new("first", "one") };
    world.revise(&made);
    world.play(60_000);
    world.story.clear();
    world.exit(&id("web-r1-1-a2"), 137);
    world.play(600_000);
    assert_eq!(world.running().len(), 2);
    world.say(world.fleet.problem.clone());
    world.signal(&id("web-r1-1-a2"), CauseKind::Gone);
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.running().len(), 3);
}

#[test]
fn an_unhealthy_instance_leaves_after_another_took_its_place() {
    let mut world = standing();
    world.behave("one", Behaviour::Sickens { after: world.now + 1000 });
    world.now += 1000;
    world.look();
    // For those who ask later: the monitor forgets what is retired.
    let sick = &world.fleet.instances[&id("web-r1-0-a1")];
    assert!(sick.last_checks.iter().any(|check| check.detail.contains("502")), "{:?}", sick.last_checks);
    world.behave("one", Behaviour::Good);
    world.signal(&id("web-r1-0-a1"), CauseKind::Unhealthy);
    world.play(60_000);
    assert!(world.fleet.instances.values().all(|instance| instance.last_checks.is_empty()));
    assert_snapshot!(world.told());
    assert_eq!((world.running().len(), world.outages), (3, 0));
}

#[test]
fn a_crash_loop_is_bounded() {
    let mut world = standing();
    world.behave("one", Behaviour::Exits { after: 300 });
    world.play(3_600_000);
    let launches = world.story.iter().filter(|line| line.contains("launch web")).count();
    assert!((5..=30).contains(&launches), "{launches} launches in an hour");
}

#[test]
fn a_release_that_came_through_its_gates_does_not_pay_for_what_ended_before_it() {
    let mut world = standing();
    for (definition, image) in [("second", "two"), ("third", "three"), ("fourth", "four"), ("fifth", "five")]
    {
        world.lose_all();
        world.play(10_000);
        let told = world.told();
        assert_eq!(world.running().len(), 3, "at once: {told}");
        world.revise(&Made::new(definition, image));
        world.play(20_000);
        assert_eq!(world.fleet.rollout, None);
    }
}

#[test]
fn a_removed_server_leaves_its_numbers() {
    let mut world = standing();
    world.remove();
    world.play(60_000);
    assert!(world.running().is_empty());
    world.revise(&Made::new("first", "one"));
    world.play(60_000);
    assert_snapshot!(world.told());
}

#[test]
fn bad_packages_are_convicted_under_their_definition_only() {
    let mut world = World::new();
    world.revise(&Made::new("first", "one").packages(&[("nginx", "1"), ("curl", "1")]));
    world.play(60_000);
    world.behave("two", Behaviour::NeverHealthy);
    world.revise(&Made::new("first", "two").packages(&[("nginx", "2"), ("curl", "1")]));
    world.play(60_000);
    world.revise(&Made::new("first", "three").packages(&[("nginx", "2"), ("curl", "2")]));
    world.play(60_000);
    assert_eq!(world.fleet.release, 1, "nginx 2 is what failed");
    world.revise(&Made::new("first", "four").packages(&[("nginx", "3"), ("curl", "2")]));
    world.play(60_000);
    assert_eq!(world.fleet.release, 4);
    world.revise(&Made::new("mended for nginx 2", "five").packages(&[("nginx", "2"), ("curl", "2")]));
    world.play(60_000);
    assert_eq!(world.fleet.release, 5);
}

#[test]
fn an_aborted_rollout_goes_back_without_a_verdict() {
    let mut world = standing();
    world.revise(&Made::new("second", "two").with(|run| run.rollout.soak = Millis::from_secs(5)));
    world.play(7000);
    world.abort().unwrap();
    world.play(60_000);
    assert!(world.fleet.quarantine.is_empty());
    world.revise(&Made::new("again", "two"));
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!(world.fleet.last_good, 3);
}

#[test]
fn without_a_policy_running_for_a_second_is_what_counts() {
    let mut world = standing();
    world.behave("ends", Behaviour::Exits { after: 900 });
    world.revise(&Made::new("second", "ends").with(|run| run.health = None));
    world.play(60_000);
    world.revise(&Made::new("third", "stays").with(|run| run.health = None));
    world.play(60_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.release, world.outages), (3, 0));
}

#[test]
fn an_answer_that_fails_ends_no_soak_of_what_is_held_for_healthy_still() {
    let mut world = standing();
    world.behave("falters", Behaviour::Falters { after: 2500 });
    world.revise(&Made::new("second", "falters").with(|run| run.rollout.soak = Millis::from_secs(5)));
    world.play(70_000);
    let ended = world.fleet.finished.as_ref().map(|rollout| rollout.state);
    assert_eq!((ended, world.fleet.last_good), (Some(RolloutState::RolledBack), 1));
}

#[test]
fn that_it_is_gone_adds_nothing_to_a_soak() {
    for after in (3000..6000).step_by(100) {
        let mut world = standing();
        world.revise(&Made::new("second", "two").with(|run| run.rollout.soak = Millis::from_secs(5)));
        world.play(200);
        let new = world.running().into_iter().find(|id| id.release == 2).unwrap();
        world.play(after);
        world.hold_for_gone(&new);
        world.play(900);
        let (first, last) = world.answered[&new];
        let soaked = world.fleet.instances[&new].soaked.0;
        assert!(soaked <= last - first, "{soaked} ms, with answers from {first} to {last} ({after})");
    }
}

#[test]
fn soak_is_counted_across_a_crash() {
    let mut world = standing();
    world.revise(&Made::new("second", "two").with(|run| run.rollout.soak = Millis::from_secs(10)));
    let began = world.now;
    for _ in 0..20 {
        world.play(2000);
        world.crash();
    }
    world.play(60_000);
    let ended = world.fleet.finished.as_ref().unwrap().ended.unwrap();
    let took = ended.as_millisecond() - 1_700_000_000_000 - began as i64;
    assert!((30_000..60_000).contains(&took), "{took} ms for three soaks of ten seconds");
    assert_eq!(world.outages, 0);
}

#[test]
fn a_refused_edge_is_a_problem_outside_of_a_rollout_too() {
    let mut world = standing();
    world.refuse_edge_with = Some(8080);
    let victim = world.running()[0].clone();
    world.exit(&victim, 1);
    world.signal(&victim, CauseKind::Gone);
    world.play(10_000);
    assert!(world.fleet.rollout.is_none());
    assert!(world.fleet.problem.contains("port 8080 is held by sshd"), "{:?}", world.fleet.problem);
    world.refuse_edge_with = None;
    world.play(10_000);
    assert_eq!(world.fleet.problem, "");
}

#[test]
fn a_port_that_somebody_else_holds_turns_back() {
    let mut world = standing();
    world.refuse_edge_with = Some(9090);
    world.revise(&Made::new("second", "two").with(|run| run.ports[0].listen = 9090));
    world.play(120_000);
    assert_snapshot!(world.told());
    assert_eq!((world.fleet.release, world.outages), (1, 0));
}

#[test]
fn a_fleet_that_was_restored_goes_on_above_the_numbers_that_it_forgot() {
    let mut world = standing();
    let (fleet, releases) = (world.fleet.clone(), world.releases.clone());
    world.revise(&Made::new("second", "two"));
    world.play(60_000);
    // Those of the second release run, and their numbers were given out.
    (world.fleet, world.releases) = (fleet.numbered_above(50), releases);
    world.revise(&Made::new("third", "three"));
    world.play(60_000);
    assert_eq!((world.fleet.release, world.fleet.last_good), (51, 51));
    let running = world.running();
    assert_eq!(running.len(), 3, "{running:?}");
    assert!(running.iter().all(|id| id.release == 51 && id.attempt > 50), "{running:?}");
}

#[test]
fn a_release_is_not_blamed_for_what_a_restored_node_has_forgotten() {
    for looks in 0..20 {
        let mut world = standing();
        world.revise(&Made::new("second", "two"));
        for _ in 0..looks {
            world.look();
        }
        world.forget_all();
        world.play(60_000);
        assert_eq!((world.fleet.last_good, world.running().len()), (2, 3), "{}", world.told());
        assert!(world.fleet.quarantine.is_empty(), "{}", world.told());
    }
}

/// Put back as it was before the second release: what runs of that is unknown, and what is known is retired.
fn restored(change: fn(&mut RunSpec)) -> World {
    let mut world = World::new();
    world.revise(&Made::new("first", "one").with(change));
    world.play(60_000);
    let (fleet, releases) = (world.fleet.clone(), world.releases.clone());
    world.revise(&Made::new("second", "two").with(change));
    world.play(60_000);
    (world.fleet, world.releases) = (fleet.numbered_above(50), releases);
    world.crash();
    world
}

#[test]
fn users_are_served_by_what_a_restored_fleet_has_forgotten_until_its_own_serve() {
    let mut world = restored(|_| ());
    let forgotten = world.running();
    world.revise(&Made::new("third", "three"));
    world.play(60_000);
    assert_eq!((world.outages, world.fleet.release), (0, 51), "{}", world.told());
    let running = world.running();
    assert!(running.len() == 3 && running.iter().all(|id| id.release == 51), "{running:?}");
    assert!(forgotten.iter().all(|id| world.drains[id] == run().drain), "{:?}", world.drains);
}

#[test]
fn a_restored_fleet_takes_no_more_room_together_with_what_it_has_forgotten() {
    for change in [|_: &mut RunSpec| (), |run: &mut RunSpec| run.ports.clear()] {
        let mut world = restored(change);
        for _ in 0..200 {
            world.look();
            world.now += 20;
            let running = world.running();
            assert!((3..=4).contains(&running.len()), "{running:?}\n{}", world.told());
        }
        let running = world.running();
        assert!(running.iter().all(|id| id.release == 1 && id.attempt > 50), "{running:?}");
    }
}

#[test]
fn what_left_on_an_order_that_is_forgotten_did_not_end_by_itself() {
    for state in [SeenState::Retiring, SeenState::Retired] {
        let mut world = restored(|_| ());
        for seen in world.view.engine.iter_mut().flatten().filter(|(id, _)| id.release == 1) {
            seen.1.state = state;
        }
        world.story.clear();
        for _ in 0..5 {
            world.look();
            assert!(!world.fleet.instances.values().any(Instance::is_broken), "{:?}", world.fleet.instances);
        }
        let told = world.told();
        assert!(told.contains("web-r1-0-a1 retired") && !told.contains("exited"), "{told}");
    }
}

#[test]
fn what_a_restored_builder_makes_again_is_no_other_release() {
    for looks in [0, 1, 5, 10_000] {
        let mut world = standing();
        let second = Made::new("second", "two");
        world.revise(&second);
        for _ in 0..looks {
            world.look();
        }
        let moving = world.fleet.rollout.clone();
        world.revise(&second);
        assert_eq!((&world.fleet.rollout, world.fleet.revision), (&moving, 3));
        assert_eq!(world.releases[&2].generation, 3, "for whoever looks for that of the newest revision");
        world.play(60_000);
        assert_eq!((world.fleet.release, world.fleet.last_good, world.releases.len()), (2, 2, 2));
        world.revise(&Made::new("first", "one"));
        assert_eq!(world.fleet.release, 3, "one that comes back after another one is");
    }
}
