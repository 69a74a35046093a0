//! Whatever happens in whatever order, no decision breaks an invariant, and when the accidents stop the fleet comes to
//! rest: on a release with every instance serving, or halted with words.

use proptest::prelude::*;

use kiln_model::cause::CauseKind;
use kiln_model::definition::Mode;
use kiln_model::run::Strategy as RolloutStrategy;
use kiln_model::time::Millis;

use crate::world::{Behaviour, Made, World};

#[derive(Debug, Clone)]
enum Accident {
    Revise {
        definition: usize,
        image: usize,
        replicas: u32,
        surge: u32,
        unavailable: u32,
        soak: u64,
        health: bool,
        elsewhere: bool,
    },
    Pass {
        millis: u64,
    },
    Exit {
        nth: usize,
    },
    Signal {
        nth: usize,
    },
    MonitorGoes,
    MonitorComes,
    Crash,
    Rollback,
    Abort,
    Remove,
}

const DEFINITIONS: [&str; 4] = ["first", "second", "third", "fourth"];
const IMAGES: [(&str, Behaviour); 6] = [
    ("good", Behaviour::Good),
    ("good too", Behaviour::Good),
    ("never healthy", Behaviour::NeverHealthy),
    ("exits", Behaviour::Exits { after: 700 }),
    ("sickens", Behaviour::Sickens { after: 4000 }),
    ("refused", Behaviour::Refused),
];

fn accident() -> impl Strategy<Value = Accident> {
    prop_oneof![
        4 => (0..4usize, 0..6usize, 1..4u32, 0..3u32, 0..3u32, 0..3u64, any::<[bool; 2]>()).prop_map(
            |(definition, image, replicas, surge, unavailable, soak, [health, elsewhere])| Accident::Revise {
                definition,
                image,
                replicas,
                // Never both zero: the schema refuses it.
                surge: if unavailable == 0 { surge.max(1) } else { surge },
                unavailable,
                soak: soak * 1500,
                health,
                elsewhere,
            }
        ),
        8 => (1..8000u64).prop_map(|millis| Accident::Pass { millis }),
        2 => (0..6usize).prop_map(|nth| Accident::Exit { nth }),
        2 => (0..6usize).prop_map(|nth| Accident::Signal { nth }),
        1 => Just(Accident::MonitorGoes),
        1 => Just(Accident::MonitorComes),
        2 => Just(Accident::Crash),
        1 => Just(Accident::Rollback),
        1 => Just(Accident::Abort),
        1 => Just(Accident::Remove),
    ]
}

fn strike(world: &mut World, accident: &Accident) {
    match accident {
        Accident::Revise { definition, image, replicas, surge, unavailable, soak, health, elsewhere } => {
            let mut made = Made::new(DEFINITIONS[*definition], IMAGES[*image].0).with(|run| {
                run.replicas = *replicas;
                run.rollout.strategy =
                    RolloutStrategy::Rolling { max_surge: *surge, max_unavailable: *unavailable };
                run.rollout.soak = Millis(*soak);
                run.rollout.deadline = Millis::from_secs(30);
                if !health {
                    run.health = None;
                }
                run.node = elsewhere.then(|| "edge-2".parse().unwrap());
            });
            made.unhealthy = Mode::Auto;
            world.revise(&made);
        }
        Accident::Pass { millis } => world.play(*millis),
        Accident::Exit { nth } => {
            if let Some(id) = world.running().get(*nth).cloned() {
                world.say(format!("> {id} is killed"));
                world.exit(&id, 137);
            }
        }
        Accident::Signal { nth } => {
            if let Some(id) = world.running().get(*nth).cloned() {
                world.signal(&id, CauseKind::Unhealthy);
            }
        }
        Accident::MonitorGoes => {
            world.say("> the monitor dies");
            world.monitor_up = false;
        }
        Accident::MonitorComes => {
            world.say("> the monitor is back");
            world.monitor_up = true;
        }
        Accident::Crash => world.crash(),
        // Refused where there is nothing to go back to.
        Accident::Rollback => drop(world.rollback(None)),
        Accident::Abort => drop(world.abort()),
        Accident::Remove => world.remove(),
    }
}

proptest! {
    #[test]
    fn no_accident_breaks_an_invariant(
        accidents in proptest::collection::vec(accident(), 1..30),
        lost in proptest::collection::vec(0..8u8, 1..50),
    ) {
        let mut world = World::new();
        for (image, behaviour) in IMAGES {
            world.behave(image, behaviour);
        }
        // Effects are lost on their way there, and their results on their way back.
        let mut dice = lost.into_iter().cycle();
        world.luck = Box::new(move || match dice.next() {
            Some(0) => (false, false),
            Some(1) => (true, false),
            _ => (true, true),
        });
        for accident in &accidents {
            strike(&mut world, accident);
        }
        world.say("> the accidents end");
        world.luck = Box::new(|| (true, true));
        world.monitor_up = true;
        // What sickens or exits by nature would go on for ever.
        for (image, _) in IMAGES {
            world.behave(image, Behaviour::Good);
        }
        world.crash();
        world.play(1_200_000);

        let story = world.told();
        let fleet = &world.fleet;
        prop_assert!(fleet.rollout.is_none(), "a rollout never ends\n{story}");
        prop_assert!(fleet.pending.is_none(), "a release waits for ever\n{story}");
        if fleet.is_halted() {
            prop_assert!(!fleet.problem.is_empty(), "halted without a word\n{story}");
            return Ok(());
        }
        let running = world.running();
        let wanted = world.releases.get(&fleet.release).filter(|_| !fleet.removed);
        let replicas = wanted.map_or(0, |release| release.replicas() as usize);
        prop_assert_eq!(running.len(), replicas, "\n{}", story);
        let on_edge = running.iter().filter(|id| fleet.on_edge(id)).count();
        prop_assert_eq!(on_edge, replicas, "\n{}", story);
        let contents = running.iter().map(|id| fleet.instances[id].content);
        prop_assert!(contents.into_iter().all(|c| wanted.is_some_and(|w| w.content() == c)), "mixed\n{}", story);
    }
}
