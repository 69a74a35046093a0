#![allow(clippy::unwrap_used)]

use std::time::Duration;

use kiln_model::signal::Remedy;
use kiln_model::time::Millis;
use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn at(second: u64) -> Timestamp {
    Timestamp::UNIX_EPOCH + SECOND * u32::try_from(second).unwrap()
}

fn policy(mode: Mode) -> UpdatePolicy {
    UpdatePolicy { definition: mode, packages: mode, unhealthy: mode, debounce: Millis::from_secs(30) }
}

fn seen(cause: CauseKind, fingerprint: &str) -> Observation {
    let remedy = match cause {
        CauseKind::Unhealthy | CauseKind::Gone => Remedy::Replace,
        _ => Remedy::Rebuild,
    };
    Observation {
        server: "web".parse().unwrap(),
        cause,
        fingerprint: fingerprint.to_owned(),
        remedy,
        evidence: vec![format!("saw {fingerprint}")],
        instance: None,
        since: at(0),
        reporter: "monitor".to_owned(),
        generation: 1,
    }
}

/// A little store: applies steps, and tells them in one line each.
#[derive(Default)]
struct World {
    records: Vec<Record>,
}

impl World {
    fn apply(&mut self, steps: Vec<Step>) -> Vec<String> {
        let mut said = Vec::new();
        for Step { record, announce, fresh } in steps {
            let announce = announce.map_or_else(|| "quietly".to_owned(), |said| format!("{said:?}"));
            let fresh = if fresh { " fresh" } else { "" };
            said.push(format!("{} {:?} {announce}{fresh}", record.signal.fingerprint, record.signal.state));
            match self.records.iter_mut().find(|known| known.signal.id == record.signal.id) {
                Some(known) => *known = record,
                None => self.records.push(record),
            }
        }
        said
    }

    fn see(&mut self, observed: &[Observation], policy: &UpdatePolicy, now: u64) -> Vec<String> {
        let steps = reconcile(&self.records, observed, policy, at(now));
        self.apply(steps)
    }

    fn tick(&mut self, now: u64) -> Vec<String> {
        let steps = self.records.iter().filter_map(|record| record.act(at(now))).collect();
        self.apply(steps)
    }
}

#[test]
fn a_cause_acts_once_however_often_it_is_seen() {
    let mut world = World::default();
    let auto = policy(Mode::Auto);
    let changed = [seen(CauseKind::DefinitionChanged, "a")];
    assert_eq!(world.see(&changed, &auto, 1), ["a Open NeedsUpdate fresh"]);
    assert_eq!(world.see(&changed, &auto, 2), [""; 0]);
    assert_eq!(world.see(&[changed[0].clone(), changed[0].clone()], &auto, 3), [""; 0]);
    assert_eq!(world.tick(1000), [""; 0]);
    assert_eq!(world.see(&[], &auto, 1001), ["a Resolved Settled"]);
    assert_eq!(world.see(&[], &auto, 1002), [""; 0]);
}

#[test]
fn a_second_commit_takes_the_place_of_the_first() {
    let mut world = World::default();
    let auto = policy(Mode::Auto);
    world.see(&[seen(CauseKind::DefinitionChanged, "a")], &auto, 0);
    let steps = world.see(&[seen(CauseKind::DefinitionChanged, "b")], &auto, 20);
    assert_eq!(steps, ["b Open NeedsUpdate fresh", "a Resolved Settled"]);
}

#[test]
fn policies() {
    let mut world = World::default();
    let packages = [seen(CauseKind::PackageUpdates, "p")];
    assert_eq!(world.see(&packages, &policy(Mode::Never), 0), [""; 0]);
    assert_eq!(world.see(&packages, &policy(Mode::Approve), 1), ["p Waiting WaitsForApproval fresh"]);
    assert_eq!(world.see(&packages, &policy(Mode::Approve), 2), [""; 0]);
    // A policy that changes while it waits is followed.
    assert_eq!(world.see(&packages, &policy(Mode::Auto), 3), ["p Open NeedsUpdate"]);
    // What acted has acted.
    assert_eq!(world.see(&packages, &policy(Mode::Approve), 4), [""; 0]);
    assert_eq!(world.see(&packages, &policy(Mode::Never), 5), [""; 0]);

    let gone = [seen(CauseKind::Gone, "i")];
    let mut world = World::default();
    assert_eq!(world.see(&gone, &policy(Mode::Never), 0), ["i Open NeedsUpdate fresh"]);
}

#[test]
fn an_approval_lets_it_act_once() {
    let mut world = World::default();
    world.see(&[seen(CauseKind::DefinitionChanged, "a")], &policy(Mode::Approve), 0);
    let step = world.records[0].approve("ann", at(5)).unwrap();
    assert_eq!(world.apply(vec![step]), ["a Open NeedsUpdate"]);
    assert_eq!(world.records[0].signal.evidence, ["saw a", "approved by ann"]);
    assert_eq!(world.records[0].approve("ann", at(6)), Err(Illegal::ActsByItself));
    assert_eq!(world.tick(100), [""; 0]);
    world.see(&[], &policy(Mode::Approve), 101);
    assert_eq!(world.records[0].approve("ann", at(102)), Err(Illegal::Resolved));
}

#[test]
fn what_comes_back_acts_again_only_after_the_breaker() {
    let mut world = World::default();
    let auto = policy(Mode::Auto);
    let sick = [seen(CauseKind::Unhealthy, "web-r1-0-a1")];
    assert_eq!(world.see(&sick, &auto, 0), ["web-r1-0-a1 Open NeedsUpdate fresh"]);
    assert_eq!(world.see(&[], &auto, 10), ["web-r1-0-a1 Resolved Settled"]);
    assert_eq!(world.see(&sick, &auto, 20), ["web-r1-0-a1 Open quietly fresh"]);
    assert_eq!(world.see(&sick, &auto, 30), [""; 0]);
    // Settled and back again: still counted from when it acted.
    world.see(&[], &auto, 40);
    assert_eq!(world.see(&sick, &auto, 50), ["web-r1-0-a1 Open quietly fresh"]);
    assert_eq!(world.tick(599), [""; 0]);
    // Who followed it knows it by the time that it was raised: until it acts anew, that stays.
    assert_eq!(world.records[0].signal.raised, at(0));
    assert_eq!(world.tick(600), ["web-r1-0-a1 Open NeedsUpdate"]);
    assert_eq!(world.records[0].signal.raised, at(600));
    assert_eq!(world.tick(601), [""; 0]);
    world.see(&[], &auto, 700);
    assert_eq!(world.see(&sick, &auto, 1300), ["web-r1-0-a1 Open NeedsUpdate fresh"]);
}

#[test]
fn a_definition_that_a_commit_brings_back_acts_at_once() {
    let mut world = World::default();
    let auto = policy(Mode::Auto);
    for (second, digest) in (0..).zip(["good", "bad", "good", "bad", "good"]) {
        let steps = world.see(&[seen(CauseKind::DefinitionChanged, digest)], &auto, second);
        assert_eq!(steps[0], format!("{digest} Open NeedsUpdate fresh"));
    }
}

/// Whoever followed it before tells by that time that it is news.
#[test]
fn what_is_raised_again_is_raised_later_also_by_a_clock_that_was_set_back() {
    let mut world = World::default();
    let auto = policy(Mode::Auto);
    let mut raised = Vec::new();
    for second in [50_000, 60_000, 100, 90] {
        world.see(&[seen(CauseKind::DefinitionChanged, "good")], &auto, second);
        raised.push(world.records[0].signal.raised);
        world.see(&[], &auto, second + 1);
    }
    assert!(raised.is_sorted_by(|one, next| one < next), "{raised:?}");
}

#[test]
fn a_repeated_report_is_one_signal_for_ever() {
    let mut world = World::default();
    let auto = policy(Mode::Auto);
    let report = [seen(CauseKind::Reported, "scanner\n17")];
    assert_eq!(world.see(&report, &auto, 0).len(), 1);
    world.see(&[], &auto, 1);
    assert_eq!(world.see(&report, &auto, 100_000), [""; 0]);
}

#[test]
fn the_fix_is_never_from_the_future_and_old_ones_are_forgotten() {
    let mut world = World::default();
    let auto = policy(Mode::Auto);
    let ahead = Observation { since: at(5000), ..seen(CauseKind::PackageUpdates, "p") };
    world.see(&[ahead], &auto, 10);
    assert_eq!(world.records[0].signal.since, at(10));
    assert!(!world.records[0].is_forgotten(at(90 * 24 * 3600)));
    world.see(&[], &auto, 20);
    assert!(!world.records[0].is_forgotten(at(20 + 29 * 24 * 3600)));
    assert!(world.records[0].is_forgotten(at(20 + 31 * 24 * 3600)));
}

fn any_mode() -> impl Strategy<Value = Mode> {
    prop_oneof![Just(Mode::Auto), Just(Mode::Approve), Just(Mode::Never)]
}

proptest! {
    /// Whatever is seen, when, and under which policy: one signal per id, what is not seen does not live, each act is
    /// announced once, and the same cause never acts twice within the breaker.
    #[test]
    fn signals_are_settled_and_never_spin(
        story in proptest::collection::vec(
            (1_u64..400, proptest::collection::vec(0_u8..3, 0..3), any_mode()),
            1..60,
        ),
    ) {
        let mut world = World::default();
        let mut now = 0;
        let mut acts: std::collections::BTreeMap<String, Vec<u64>> = std::collections::BTreeMap::new();
        for (pause, what, mode) in story {
            now += pause;
            let observed: Vec<_> =
                what.iter().map(|n| seen(CauseKind::PackageUpdates, &n.to_string())).collect();
            let mut said = world.see(&observed, &policy(mode), now);
            said.extend(world.tick(now));
            for line in said {
                let (fingerprint, rest) = line.split_once(' ').unwrap();
                if rest.contains("NeedsUpdate") {
                    acts.entry(fingerprint.to_owned()).or_default().push(now);
                }
            }
            for record in &world.records {
                let is_seen = observed.iter().any(|seen| seen.id() == record.signal.id);
                prop_assert!(is_seen || !record.is_live());
                let same = world.records.iter().filter(|other| other.signal.id == record.signal.id);
                prop_assert_eq!(same.count(), 1);
                // Nothing that is due is left undone.
                prop_assert!(record.due().is_none_or(|due| due > at(now)));
            }
            prop_assert!(reconcile(&world.records, &observed, &policy(mode), at(now)).is_empty());
        }
        for times in acts.values() {
            prop_assert!(times.windows(2).all(|pair| pair[1] - pair[0] >= BREAKER.as_secs()), "{:?}", times);
        }
    }
}
