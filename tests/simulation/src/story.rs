//! A story: what people, repositories, archives and faults do to a site, until all is quiet; then the site has to come to
//! rest where it should.

mod more;
mod people;
mod trouble;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use kiln_builder_core::build::LEASE;
use kiln_model::event::Service;
use tokio::time::Instant;

use crate::heard;
use crate::nature::Nature;
use crate::outside::Definition;
use crate::settled::{Unjudged, look};
use crate::site::{RESYNC, Site};
use crate::world::{Extras, Faults, World};

/// Rollouts with bad releases, their deadlines and the waits between replacements: all of it is over by then.
const REST: Duration = Duration::from_secs(45 * 60);
/// It has to stay as it came to be.
const QUIET: Duration = Duration::from_secs(70);
/// An archive that flapped holds builds back until the hour is over.
const FLAPPED: Duration = Duration::from_secs(3_600);
/// By then whatever was away, stood still or died is there again: 120 s, and up to 8 s for a new process.
const BACK: Duration = Duration::from_secs(130);
/// A lease of a process that died ends, and is looked at then.
const TAKEN: Duration = LEASE.saturating_add(Duration::from_secs(5));
/// What one service commits the next one knows by a resync of its own, which begins 30 s after the end of the one before;
/// 5 s are for the calls of both. So in two of them a signal becomes a build's order and a revision becomes a release,
/// and between the two lies only the work itself: debounce (1 s), plan, bake (8 s at most).
const HEARD: Duration = RESYNC.saturating_add(Duration::from_secs(5));

/// Tells the story of a seed.
///
/// # Errors
/// What does not hold.
pub(crate) async fn tell(world: &World, folder: PathBuf) -> Result<Unjudged, Vec<String>> {
    world.set_extras(Extras::of(world));
    tell_as_found(world, folder).await
}

/// The same without what was added to stories later, as it was when a mistake was found by it.
///
/// # Errors
/// What does not hold.
pub(crate) async fn tell_as_found(world: &World, folder: PathBuf) -> Result<Unjudged, Vec<String>> {
    let site = Site::new(world, folder);
    let story = Story {
        site: site.clone(),
        calls: 0,
        images: 0,
        runs: 0,
        former: Vec::new(),
        cancelled: false,
        poison: Vec::new(),
    };
    let told = go_on(story, world).await;
    site.directory.close();
    told
}

async fn go_on(mut story: Story, world: &World) -> Result<Unjudged, Vec<String>> {
    story.begin().await;
    if world.extras().flaps {
        story.flap_packages().await;
    }
    let acts = world.between(1, 8);
    for _ in 0..acts {
        story.wait().await;
        if world.extras().more_acts && world.more().chance(0.6) {
            story.act_more().await;
            story.wait().await;
        }
        if world.extras().fills && world.more().chance(0.4) {
            story.fill_disk();
        }
        story.act().await;
        if !world.broken().is_empty() {
            return Err(world.broken());
        }
    }
    story.wait().await;
    let deaf = world.extras().deaf;
    world.set_faults(Faults { event_lost: if deaf { 1.0 } else { 0.0 }, ..Faults::default() });
    world.tell(if deaf { "from here on only events are lost" } else { "from here on nothing is disturbed" });
    if story.cancelled {
        // What somebody cancelled is tried again by who applies it again.
        story.apply().await;
    }
    story.rest().await
}

/// Since when things are as they are.
#[derive(Default)]
struct Since(BTreeMap<String, Instant>);

impl Since {
    /// What is so now, and has been for longer.
    fn longer_than(&mut self, limit: Duration, now: BTreeSet<String>) -> Vec<String> {
        self.0.retain(|what, _| now.contains(what));
        for what in now {
            self.0.entry(what).or_insert_with(Instant::now);
        }
        self.0.iter().filter(|(_, since)| since.elapsed() > limit).map(|(what, _)| what.clone()).collect()
    }
}

struct Story {
    site: Site,
    calls: u64,
    images: u64,
    runs: u64,
    /// Definitions that were committed before.
    former: Vec<Definition>,
    /// Somebody cancelled a build.
    cancelled: bool,
    /// What no handler can take, with how often the broker's data had been deleted before.
    poison: Vec<(u64, Vec<u8>)>,
}

impl Story {
    fn world(&self) -> &World {
        &self.site.world
    }

    async fn begin(&mut self) {
        let world = self.world().clone();
        let faults = Faults::of(&world);
        let calm = world.chance(0.5);
        if !calm {
            world.set_faults(faults);
        }
        world.tell(format!("{faults:?}"));
        let replicas = world.between(1, 3);
        self.site.outside.publish(Nature::Good);
        let nature = self.good();
        let tested = world.chance(0.3);
        self.commit(Definition { image: 0, nature, run: 0, replicas, tested });
        self.apply().await;
        if calm {
            tokio::time::sleep(Duration::from_secs(60)).await;
            world.set_faults(faults);
        }
    }

    /// Short mostly, so that what happens happens at the same time.
    async fn wait(&self) {
        let most = *self.world().pick(&[500, 5_000, 20_000, 90_000]).unwrap();
        tokio::time::sleep(Duration::from_millis(self.world().between(0, most))).await;
    }

    fn good(&self) -> Nature {
        if self.world().chance(0.2) { Nature::Slow } else { Nature::Good }
    }

    fn any(&self) -> Nature {
        if self.world().chance(0.4) { *self.world().pick(&Nature::BAD).unwrap() } else { self.good() }
    }

    fn commit(&mut self, definition: Definition) {
        self.world().tell(format!("somebody commits: {definition}"));
        self.former.push(definition.clone());
        self.site.outside.commit(Some(definition));
    }

    async fn act(&mut self) {
        let world = self.world().clone();
        let now = self.former.last().cloned().unwrap();
        match world.between(0, 22) {
            0..=2 => {
                self.images += 1;
                let (image, nature) = (self.images, self.any());
                self.commit(Definition { image, nature, ..now });
            }
            3 => {
                self.runs += 1;
                let run = self.runs;
                self.commit(Definition { run, ..now });
            }
            4 => {
                (self.images, self.runs) = (self.images + 1, self.runs + 1);
                let (image, run, nature, replicas) =
                    (self.images, self.runs, self.any(), world.between(1, 3));
                self.commit(Definition { image, nature, run, replicas, ..now });
            }
            5 => {
                let former = world.pick(&self.former).cloned().unwrap();
                self.commit(former);
            }
            6 => {
                world.tell("somebody commits what can't be read");
                self.site.outside.commit(None);
            }
            7..=9 => {
                let nature =
                    if world.chance(0.3) { *world.pick(&Nature::BAD).unwrap() } else { Nature::Good };
                self.site.outside.publish(nature);
                let (version, _) = self.site.outside.packages();
                world.tell(format!("the archive has packages {version}: {}", nature.word()));
            }
            10 => self.roll_back().await,
            11 => self.abort().await,
            12 => self.report().await,
            13 => self.apply().await,
            14..=16 => self.strike_instance(),
            17 => self.kill(),
            18 => self.freeze(),
            19 => self.reboot(),
            20 => self.trouble_broker(),
            21 => self.trouble_outside(),
            _ => self.jump(),
        }
    }

    /// Comes to rest, and stays there.
    async fn rest(&mut self) -> Result<Unjudged, Vec<String>> {
        let world = self.world().clone();
        let began = world.elapsed();
        let give_up = began + REST + if world.extras().flaps { FLAPPED } else { Duration::ZERO };
        let mut quiet = Duration::ZERO;
        let (mut unheard, mut ownerless) = (Since::default(), Since::default());
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if world.extras().deaf && world.elapsed() > began + BACK {
                for what in unheard.longer_than(HEARD, heard::not_yet(&self.site).await) {
                    world.wrong(9, format!("{what} is not known within a resync"));
                }
            }
            for what in ownerless.longer_than(TAKEN, self.ownerless()) {
                world.wrong(19, format!("{what} runs, its owner is dead, and nobody takes it"));
            }
            if !world.broken().is_empty() {
                return Err(world.broken());
            }
            match look(&self.site).await {
                // What it was sent is known to nobody until it goes on.
                Ok(_) if self.stands_still() => quiet = Duration::ZERO,
                Ok(_) if quiet < QUIET => quiet += Duration::from_secs(1),
                Ok(unjudged) => {
                    self.dead_letters().map_err(|wrong| vec![wrong])?;
                    return Ok(unjudged);
                }
                Err(why) if world.elapsed() > give_up => {
                    return Err(vec![format!("it does not come to rest: {why}")]);
                }
                Err(_) => {
                    quiet = Duration::ZERO;
                    if world.extras().approve && world.elapsed().as_secs().is_multiple_of(10) {
                        self.approve().await;
                    }
                }
            }
        }
    }

    fn stands_still(&self) -> bool {
        self.site.lives().iter().any(|life| !life.is_alive() && !life.is_dead())
    }

    /// Builds of dead processes, where a builder is there to take them.
    fn ownerless(&self) -> BTreeSet<String> {
        let lives = self.site.lives();
        if !lives.iter().any(|life| life.service == Service::Builder && life.is_alive()) {
            return BTreeSet::new();
        }
        let is_dead = |owner: &str| self.site.process(owner).is_none_or(|life| life.is_dead());
        let running = self.site.invariants.running().into_iter();
        running.filter(|(_, owner)| is_dead(owner)).map(|(build, _)| build).collect()
    }

    /// 14: each poison lies there once, as far as nobody deleted it, and nobody waits for it.
    fn dead_letters(&self) -> Result<(), String> {
        if let [service, ..] = self.site.invariants.blocked().as_slice() {
            return Err(format!("invariant 14: {service} takes nothing any more, for poison"));
        }
        let letters = self.site.broker.now().dead_letters();
        for (wipes, payload) in &self.poison {
            let count = letters.iter().filter(|letter| letter.payload == *payload).count();
            if *wipes == self.site.broker.wipes() && count != 1 {
                return Err(format!(
                    "invariant 14: poison {payload:?} lies {count} times in the dead letters"
                ));
            }
        }
        Ok(())
    }
}
