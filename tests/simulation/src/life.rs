//! A process that can die after any of its steps, or stand still and go on later as if nothing had happened.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_model::event::Service;
use tokio::sync::watch;

use crate::world::World;

/// Within each such time a process does one and the same thing less than so often: the most that was seen in a thousand
/// stories is 454 reads of a store. One that goes round without an end does it more often.
const SPELL: Duration = Duration::from_secs(10);
const MOST: u32 = 1_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Being {
    Alive,
    Frozen,
    Dead,
}

#[derive(Default)]
struct Pace {
    spell: u64,
    done: BTreeMap<Box<str>, u32>,
}

#[derive(Clone)]
pub(crate) struct Life {
    pub(crate) service: Service,
    /// Which of the service's replicas it is a run of.
    pub(crate) replica: u64,
    /// `deployer 3`
    name: Arc<str>,
    being: Arc<watch::Sender<Being>>,
    pace: Arc<Mutex<Pace>>,
    world: World,
}

impl Life {
    pub(crate) fn new(service: Service, replica: u64, number: u64, world: &World) -> Self {
        let name = format!("{service} {number}").into();
        Self {
            service,
            replica,
            name,
            being: Arc::new(watch::Sender::new(Being::Alive)),
            pace: Arc::default(),
            world: world.clone(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn kill(&self, why: &str) {
        if self.set(Being::Dead) {
            self.world.tell(format!("{} dies {why}", self.name));
        }
    }

    pub(crate) fn freeze(&self) {
        if self.set(Being::Frozen) {
            self.world.tell(format!("{} stands still", self.name));
        }
    }

    pub(crate) fn thaw(&self) {
        if self.set(Being::Alive) {
            self.world.tell(format!("{} goes on", self.name));
        }
    }

    fn set(&self, to: Being) -> bool {
        self.being.send_if_modified(|being| {
            let changes = *being != Being::Dead && *being != to;
            if changes {
                *being = to;
            }
            changes
        })
    }

    pub(crate) fn is_dead(&self) -> bool {
        *self.being.borrow() == Being::Dead
    }

    /// Neither dead nor standing still.
    pub(crate) fn is_alive(&self) -> bool {
        *self.being.borrow() == Being::Alive
    }

    /// Comes back in a process that is alive, and never in a dead one.
    pub(crate) async fn here(&self) {
        let mut being = self.being.subscribe();
        // The sender lives in this value.
        let _ = being.wait_for(|being| *being == Being::Alive).await;
    }

    pub(crate) async fn died(&self) {
        let mut being = self.being.subscribe();
        let _ = being.wait_for(|being| *being == Being::Dead).await;
    }

    /// It asks somebody for something, or writes it down.
    pub(crate) fn does(&self, what: &str) {
        let spell = self.world.elapsed().as_secs() / SPELL.as_secs();
        let mut pace = self.pace.lock().unwrap();
        if pace.spell != spell {
            *pace = Pace { spell, done: BTreeMap::new() };
        }
        let count = pace.done.entry(what.into()).or_default();
        *count += 1;
        if *count == MOST {
            self.world.goes_round(&self.name, what);
            // Where no time passes nothing else would ever come to its turn.
            self.kill("since it goes round");
        }
    }

    /// A moment at which it may die.
    pub(crate) async fn step(&self, what: &str) {
        if self.world.chance(self.world.faults().crash) {
            self.kill(what);
        }
        self.here().await;
    }
}
