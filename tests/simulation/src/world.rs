//! What a seed decides, the clocks, and the story so far.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use kiln_model::event::Service;
use kiln_model::time::Now;
use kiln_service::clock::Clock;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::Instant;

/// Makes another seed out of a story's.
const MORE: u64 = 0x6d6f_7265;

/// How often each fault strikes where it can, from 0 to 1.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    /// A process dies before or after a commit, a publish, an acknowledgement, or a call.
    pub(crate) crash: f64,
    pub(crate) store_refuses: f64,
    /// The commit is done, and the answer is an error.
    pub(crate) commit_unknown: f64,
    pub(crate) stale_read: f64,
    pub(crate) event_lost: f64,
    pub(crate) event_doubled: f64,
    /// It comes again after others, or late.
    pub(crate) event_late: f64,
    /// The event is stored, and the answer is an error.
    pub(crate) publish_unknown: f64,
    /// A call fails before it is carried out.
    pub(crate) call_lost: f64,
    /// A call is carried out, and the answer is lost.
    pub(crate) answer_lost: f64,
    /// Everything takes its time.
    pub(crate) slow: f64,
    /// A bake fails of something that passes.
    pub(crate) bake_fails: f64,
}

impl Faults {
    /// Each kind strikes in about half of the stories: where all strike at once, each hides what the others would show.
    pub(crate) fn of(world: &World) -> Self {
        let some = |most: f64| if world.chance(0.5) { world.share() * most } else { 0.0 };
        let mut faults = Self {
            crash: some(0.02),
            store_refuses: some(0.05),
            commit_unknown: some(0.05),
            stale_read: some(0.1),
            event_lost: some(0.5),
            event_doubled: some(0.5),
            event_late: some(0.5),
            publish_unknown: some(0.2),
            call_lost: some(0.1),
            answer_lost: some(0.1),
            slow: some(0.3),
            bake_fails: some(0.3),
        };
        if world.chance(0.15) {
            faults.event_lost = 1.0;
        }
        faults
    }
}

/// How many more instances there may be than a server wants, and how many fewer may answer, while they are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Policy {
    pub(crate) surge: u64,
    pub(crate) unavailable: u64,
}

impl Policy {
    const ALL: [Self; 4] = [
        Self { surge: 2, unavailable: 1 },
        Self { surge: 0, unavailable: 1 },
        Self { surge: 3, unavailable: 0 },
        Self { surge: 1, unavailable: 2 },
    ];
}

impl Default for Policy {
    fn default() -> Self {
        Self { surge: 1, unavailable: 0 }
    }
}

/// What a share of the stories has beside all others. A story without any of it is told as it was before it was thought
/// of, so that named seeds go on to tell of what they found.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Extras {
    /// A process dies right after an acknowledgement too.
    pub(crate) dies_acked: bool,
    /// A process dies when a call of its own is answered too.
    pub(crate) dies_answered: bool,
    /// Not only single documents are read late.
    pub(crate) late_lists: bool,
    /// That a commit's answer is lost is found out later, and what was committed is noticed before.
    pub(crate) late_answers: bool,
    /// No event ever comes, after the faults neither.
    pub(crate) deaf: bool,
    /// People cancel, remove and approve; what comes in is poison; a definition flaps; images are collected.
    pub(crate) more_acts: bool,
    /// The archive flaps, which takes as long as a hundred other stories.
    pub(crate) flaps: bool,
    /// Updates of packages wait for a person.
    pub(crate) approve: bool,
    /// Another server, beside the one that the story is about.
    pub(crate) second: bool,
    /// The disk is full for a while.
    pub(crate) fills: bool,
    pub(crate) policy: Policy,
}

impl Extras {
    pub(crate) fn of(world: &World) -> Self {
        let more = world.more();
        let policy = if more.chance(0.2) { *more.pick(&Policy::ALL).unwrap() } else { Policy::default() };
        Self {
            dies_acked: more.chance(0.25),
            // By the seed alone, and the next but one: one more number drawn here would change those that the stories with
            // extras go on with, and one of them is named.
            dies_answered: world.inner.seed % 5 == 4,
            late_lists: more.chance(0.25),
            late_answers: more.chance(0.25),
            deaf: more.chance(0.08),
            more_acts: more.chance(0.25),
            flaps: more.chance(0.005),
            approve: more.chance(0.1),
            second: more.chance(0.15),
            fills: world.inner.seed % 6 == 2,
            policy,
        }
    }
}

/// A stream of random numbers.
struct Random(Mutex<StdRng>);

impl Random {
    fn new(seed: u64) -> Self {
        Self(Mutex::new(StdRng::seed_from_u64(seed)))
    }

    /// From 0 to 1.
    fn share(&self) -> f64 {
        held(&self.0).random()
    }

    fn between(&self, least: u64, most: u64) -> u64 {
        held(&self.0).random_range(least..=most)
    }
}

/// Chance that is drawn apart from all that stories had before: what asks it changes nothing of what the others ask.
pub(crate) struct More<'a>(&'a Random);

impl More<'_> {
    pub(crate) fn chance(&self, probability: f64) -> bool {
        probability > 0.0 && self.0.share() < probability
    }

    pub(crate) fn between(&self, least: u64, most: u64) -> u64 {
        self.0.between(least, most)
    }

    pub(crate) fn pick<'a, T>(&self, choices: &'a [T]) -> Option<&'a T> {
        let last = choices.len().checked_sub(1)? as u64;
        choices.get(usize::try_from(self.between(0, last)).unwrap())
    }
}

#[derive(Clone)]
pub(crate) struct World {
    inner: Arc<Inner>,
}

struct Inner {
    seed: u64,
    random: Random,
    more: Random,
    extras: Mutex<Extras>,
    faults: Mutex<Faults>,
    /// Each line is printed at once: for a story that never ends.
    aloud: bool,
    start: Instant,
    /// What the wall clock was set forward or back by.
    shift: Mutex<SignedDuration>,
    lines: Mutex<Vec<String>>,
    broken: Mutex<Vec<String>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let inner = Inner {
            seed,
            random: Random::new(seed),
            more: Random::new(seed ^ MORE),
            extras: Mutex::default(),
            faults: Mutex::default(),
            aloud: std::env::var_os("KILN_ALOUD").is_some(),
            start: Instant::now(),
            shift: Mutex::new(SignedDuration::ZERO),
            lines: Mutex::default(),
            broken: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// In every fourth story each service but the node is shared by two or three processes for good.
    pub(crate) fn replicas(&self) -> BTreeMap<Service, u64> {
        if self.inner.seed % 4 != 3 {
            return BTreeMap::new();
        }
        [Service::Builder, Service::Deployer, Service::Monitor]
            .map(|service| (service, self.between(2, 3)))
            .into()
    }

    pub(crate) fn chance(&self, probability: f64) -> bool {
        probability > 0.0 && self.share() < probability
    }

    /// From 0 to 1.
    pub(crate) fn share(&self) -> f64 {
        self.inner.random.share()
    }

    pub(crate) fn between(&self, least: u64, most: u64) -> u64 {
        self.inner.random.between(least, most)
    }

    pub(crate) fn pick<'a, T>(&self, choices: &'a [T]) -> Option<&'a T> {
        let last = choices.len().checked_sub(1)? as u64;
        choices.get(usize::try_from(self.between(0, last)).unwrap())
    }

    pub(crate) fn more(&self) -> More<'_> {
        More(&self.inner.more)
    }

    pub(crate) fn extras(&self) -> Extras {
        *held(&self.inner.extras)
    }

    pub(crate) fn set_extras(&self, extras: Extras) {
        *held(&self.inner.extras) = extras;
    }

    pub(crate) fn faults(&self) -> Faults {
        *held(&self.inner.faults)
    }

    pub(crate) fn set_faults(&self, faults: Faults) {
        *held(&self.inner.faults) = faults;
    }

    /// Some time goes by, where this story is one in which things take time.
    pub(crate) async fn slowly(&self) {
        if self.chance(self.faults().slow) {
            tokio::time::sleep(Duration::from_millis(self.between(1, 400))).await;
        }
    }

    /// Since the beginning.
    pub(crate) fn elapsed(&self) -> Duration {
        self.inner.start.elapsed()
    }

    pub(crate) fn wall(&self) -> Timestamp {
        let begin = Timestamp::from_second(1_800_000_000).unwrap();
        begin + SignedDuration::try_from(self.elapsed()).unwrap() + *held(&self.inner.shift)
    }

    pub(crate) fn shift(&self) -> SignedDuration {
        *held(&self.inner.shift)
    }

    pub(crate) fn shift_wall(&self, by: SignedDuration) {
        *held(&self.inner.shift) += by;
    }

    pub(crate) fn clock(&self) -> SimClock {
        SimClock { world: self.clone(), start: Instant::now() }
    }

    /// One more line of the story.
    pub(crate) fn tell(&self, line: impl Display) {
        let line = format!("{:9.3}  {line}", self.elapsed().as_secs_f64());
        if self.inner.aloud {
            eprintln!("{line}");
        }
        held(&self.inner.lines).push(line);
    }

    pub(crate) fn story(&self) -> String {
        held(&self.inner.lines).join("\n")
    }

    /// An invariant does not hold.
    pub(crate) fn wrong(&self, invariant: u32, what: impl Display) {
        let line = format!("invariant {invariant}: {what}");
        self.tell(format!("!! {line}"));
        held(&self.inner.broken).push(line);
    }

    /// Somebody does without an end what nothing has changed for.
    pub(crate) fn goes_round(&self, who: &str, what: &str) {
        let line = format!("{who} goes round: {what}");
        self.tell(format!("!! {line}"));
        held(&self.inner.broken).push(line);
    }

    pub(crate) fn broken(&self) -> Vec<String> {
        held(&self.inner.broken).clone()
    }
}

/// One process's clocks.
#[derive(Clone)]
pub(crate) struct SimClock {
    world: World,
    start: Instant,
}

impl Clock for SimClock {
    fn now(&self) -> Now {
        Now { wall: self.world.wall(), monotonic: self.start.elapsed() }
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}
