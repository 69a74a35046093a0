//! Any order of facts keeps the invariants.

use std::collections::{BTreeMap, BTreeSet};

use kiln_builder_core::build::State;
use kiln_builder_core::head::By;
use kiln_model::cause::CauseKind;
use kiln_model::revision::RevisionContent;
use proptest::prelude::*;

use crate::world::{Content, World, name};

#[derive(Debug, Clone)]
enum Fact {
    Commit {
        image: u8,
        replicas: u32,
    },
    Signal {
        fingerprint: u8,
    },
    Archive {
        version: u8,
    },
    Advance {
        seconds: u64,
    },
    Claim,
    Succeed {
        stale: bool,
    },
    Fail {
        transient: bool,
        stale: bool,
    },
    Cancel,
    /// The process is killed and starts anew.
    Restart,
    RollBack {
        by_definition: bool,
    },
    Settle,
}

fn fact() -> impl Strategy<Value = Fact> {
    prop_oneof![
        (0u8..4, 1u32..3).prop_map(|(image, replicas)| Fact::Commit { image, replicas }),
        (0u8..4).prop_map(|fingerprint| Fact::Signal { fingerprint }),
        (0u8..4).prop_map(|version| Fact::Archive { version }),
        prop_oneof![Just(1), Just(30), Just(600)].prop_map(|seconds| Fact::Advance { seconds }),
        Just(Fact::Claim),
        prop::bool::weighted(0.2).prop_map(|stale| Fact::Succeed { stale }),
        (any::<bool>(), prop::bool::weighted(0.2))
            .prop_map(|(transient, stale)| Fact::Fail { transient, stale }),
        Just(Fact::Cancel),
        Just(Fact::Restart),
        any::<bool>().prop_map(|by_definition| Fact::RollBack { by_definition }),
        Just(Fact::Settle),
    ]
}

#[derive(Default)]
struct Run {
    commits: u64,
    claimed: BTreeMap<String, u64>,
    good: u64,
}

impl Run {
    fn take(&mut self, world: &mut World, fact: &Fact) {
        let web = name("web");
        let running = world.builds.values().find(|build| matches!(build.state, State::Running { .. }));
        let running = running.map(|build| build.id.to_string());
        let token = |stale: &bool, id: &str| self.claimed.get(id).copied().unwrap_or(0) - u64::from(*stale);
        match fact {
            Fact::Commit { image, replicas } => {
                self.commits += 1;
                let cause = world.cause(CauseKind::DefinitionChanged, &format!("commit-{}", self.commits));
                world.apply(&web, &Content::new(&format!("image-{image}"), *replicas), By::Signal, cause);
            }
            Fact::Signal { fingerprint } => {
                world.signal(&web, CauseKind::PackageUpdates, &format!("release-file-{fingerprint}"));
            }
            Fact::Archive { version } => {
                world.packages.insert("nginx".to_owned(), version.to_string());
            }
            Fact::Advance { seconds } => world.advance(*seconds),
            Fact::Claim => {
                if let Some((id, token)) = world.claim() {
                    self.claimed.insert(id, token);
                }
            }
            Fact::Succeed { stale } => {
                if let Some(id) = running {
                    let done = world.succeed(&id, token(stale, &id));
                    assert_eq!(done.is_err(), *stale, "a stale owner's write is refused: {done:?}");
                }
            }
            Fact::Fail { transient, stale } => {
                if let Some(id) = running {
                    let done = world.fail(&id, token(stale, &id), *transient);
                    assert_eq!(done.is_err(), *stale, "a stale owner's write is refused: {done:?}");
                }
            }
            Fact::Cancel => {
                let now = world.now;
                if let Some(build) = world.builds.values_mut().find(|build| !build.state.has_ended()) {
                    build.cancel("somebody", now).unwrap();
                    assert!(build.state.has_ended(), "cancel always ends");
                }
            }
            Fact::Restart => {
                let now = world.now;
                for build in world.builds.values_mut() {
                    build.abandoned(|owner| owner == "builder-2", now);
                    assert!(!matches!(build.state, State::Running { .. }), "nothing runs without an owner");
                }
            }
            Fact::RollBack { by_definition } => {
                let newest = world.revisions.last().map(|revision| revision.generation);
                // The deployer goes back from what it last was given to what was good before.
                if let Some(newest) = newest.filter(|newest| *newest > self.good) {
                    world.roll_back(&web, self.good, *by_definition);
                    let _ = newest;
                }
            }
            Fact::Settle => {
                world.settle();
                // What goes on running for a while proved good.
                if let Some(in_force) = &world.servers[&web].in_force {
                    self.good = in_force.generation;
                }
            }
        }
    }
}

fn start() -> World {
    let mut world = World::new();
    let cause = world.cause(CauseKind::DefinitionApplied, "apply-1");
    world.apply(&name("web"), &Content::new("image-0", 1), By::Hand, cause);
    world.work();
    world
}

proptest! {
    #[test]
    fn any_order_of_facts_keeps_the_invariants(facts in prop::collection::vec(fact(), 1..60)) {
        let mut world = start();
        let mut run = Run { good: 1, ..Run::default() };
        for fact in &facts {
            run.take(&mut world, fact);
            prop_assert_eq!(world.violations(), Vec::<String>::new(), "after {:?}:\n{}", fact, world.log.join("\n"));
        }
        // Generations only grow, by one each.
        let generations: Vec<_> = world.revisions.iter().map(|revision| revision.generation).collect();
        let wanted: Vec<_> = (1..=world.revisions.len() as u64).collect();
        prop_assert_eq!(generations, wanted);
    }

    #[test]
    fn left_alone_it_comes_to_rest_on_the_newest_content(facts in prop::collection::vec(fact(), 1..60)) {
        let mut world = start();
        let mut run = Run { good: 1, ..Run::default() };
        for fact in facts.iter().filter(|fact| !matches!(fact, Fact::RollBack { .. } | Fact::Cancel | Fact::Fail { .. })) {
            run.take(&mut world, fact);
        }
        // A dead worker's lease, the debounce and the breaker's hour lie behind.
        for _ in 0..4 {
            world.advance(1800);
            world.work();
        }
        let web = &world.servers[&name("web")];
        prop_assert!(web.wanted.is_none() && web.building.is_none(), "{}", world.log.join("\n"));
        let in_force = web.in_force.as_ref().unwrap();
        prop_assert_eq!(in_force.definition.digest, web.head.digest);
        let plans = world.plans;
        world.advance(1800);
        world.work();
        prop_assert_eq!(world.plans, plans, "nothing is planned without a cause");
    }

    #[test]
    fn one_cause_gives_one_build_however_often_it_comes(repeats in prop::collection::vec((0u64..40, any::<bool>()), 1..20)) {
        let mut world = start();
        let builds = world.builds.len();
        world.packages.insert("nginx".to_owned(), "2".to_owned());
        let signal = world.make_signal(&name("web"), CauseKind::PackageUpdates, "release-file-2");
        for (pause, work) in repeats {
            let now = world.now;
            kiln_builder_core::signal::receive(world.servers.get_mut(&name("web")).unwrap(), &signal, now);
            world.advance(pause);
            if work { world.work() } else { world.settle() }
        }
        world.advance(60);
        world.work();
        prop_assert_eq!(world.builds.len(), builds + 1, "{}", world.log.join("\n"));
        prop_assert_eq!(world.plans, 2, "{}", world.log.join("\n"));
    }

    #[test]
    fn what_was_convicted_does_not_come_back(facts in prop::collection::vec(fact(), 1..80)) {
        let mut world = start();
        let mut run = Run { good: 1, ..Run::default() };
        let mut convicted = BTreeSet::new();
        for fact in &facts {
            let before = world.revisions.len();
            run.take(&mut world, fact);
            for revision in &world.revisions[before..] {
                let RevisionContent::Image(image) = &revision.content else { continue };
                let outcome = (image.image_digest, image.run_digest);
                prop_assert!(!convicted.contains(&outcome), "came back:\n{}", world.log.join("\n"));
            }
            if matches!(fact, Fact::RollBack { .. })
                && let Some(newest) = world.revisions.last()
                && world.servers[&name("web")].quarantine.knows(newest.generation)
                && let RevisionContent::Image(image) = &newest.content
            {
                convicted.insert((image.image_digest, image.run_digest));
            }
        }
    }

    #[test]
    fn a_flapping_archive_gives_a_bounded_number_of_builds_an_hour(versions in prop::collection::vec(0u32..1000, 60..120)) {
        let mut world = start();
        let builds = world.builds.len();
        // A new fingerprint and new versions every half minute, for an hour at most.
        for (round, version) in versions.iter().enumerate() {
            world.packages.insert("nginx".to_owned(), format!("{version}-{round}"));
            world.signal(&name("web"), CauseKind::PackageUpdates, &format!("release-file-{round}"));
            world.advance(30);
            world.work();
        }
        prop_assert!(world.builds.len() - builds <= kiln_builder_core::server::AUTOMATIC_PER_HOUR);
    }
}
