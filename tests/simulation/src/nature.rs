//! How the instances of an image behave.

use std::time::Duration;

use tokio::time::Instant;

use crate::world::World;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nature {
    Good,
    /// As good, and takes most of the time that it may take to come up.
    Slow,
    NeverAnswers,
    /// Ends by itself a while after its launch.
    Exits,
    /// Answers at first, and no longer before its soak is over.
    Worsens,
}

impl Nature {
    pub(crate) const BAD: [Self; 3] = [Self::NeverAnswers, Self::Exits, Self::Worsens];

    pub(crate) fn is_bad(self) -> bool {
        Self::BAD.contains(&self)
    }

    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Slow => "slow",
            Self::NeverAnswers => "never-answers",
            Self::Exits => "exits",
            Self::Worsens => "worsens",
        }
    }

    pub(crate) fn of(word: &str) -> Self {
        let all = [Self::Good, Self::Slow, Self::NeverAnswers, Self::Exits, Self::Worsens];
        all.into_iter().find(|nature| nature.word() == word).unwrap()
    }
}

/// One instance's life, as it was meant at its launch and as faults changed it.
#[derive(Debug, Clone)]
pub(crate) struct Course {
    pub(crate) ready: Option<Instant>,
    /// From then on it does not answer.
    pub(crate) worsens: Option<Instant>,
    /// It ends by itself.
    pub(crate) ends: Option<Instant>,
    /// A fault: it runs and does not answer.
    pub(crate) hangs: bool,
    /// A fault: it answers every other while.
    pub(crate) flaps: Option<Duration>,
}

impl Course {
    pub(crate) fn new(nature: Nature, now: Instant, world: &World) -> Self {
        let after = |least, most| Some(now + Duration::from_millis(world.between(least, most)));
        let ready = match nature {
            Nature::NeverAnswers => None,
            Nature::Slow => after(5_000, 6_500),
            _ => after(50, 1_000),
        };
        let ends = if nature == Nature::Exits { after(10, 4_000) } else { None };
        let worsens = if nature == Nature::Worsens { after(1_100, 3_000) } else { None };
        Self { ready, worsens, ends, hangs: false, flaps: None }
    }

    pub(crate) fn answers(&self, now: Instant) -> bool {
        let is_past = |moment: Option<Instant>| moment.is_some_and(|moment| moment <= now);
        let down = self.flaps.is_some_and(|period| {
            let since = self.ready.map(|ready| now.saturating_duration_since(ready)).unwrap_or_default();
            (since.as_millis() / period.as_millis()) % 2 == 1
        });
        is_past(self.ready) && !is_past(self.worsens) && !self.hangs && !down
    }
}
