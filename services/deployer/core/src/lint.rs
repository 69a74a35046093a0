//! Judges a decision by what must always hold, without looking at how it was come by.

use std::collections::BTreeSet;
use std::fmt;

use kiln_model::name::InstanceId;
use kiln_model::signal::HealthState;

use crate::effect::{Effect, Event};
use crate::fleet::{Fleet, Instance, InstanceState};
use crate::next::Decision;
use crate::nodes;
use crate::release::{Release, Releases};
use crate::rollout::{Rollout, RolloutState};
use crate::view::{Seen, SeenState, View};

/// An invariant that a decision breaks, with its number where it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: u32,
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invariant {}: {}", self.invariant, self.what)
    }
}

struct Lint<'a> {
    before: &'a Fleet,
    after: &'a Fleet,
    releases: &'a Releases,
    violations: Vec<Violation>,
}

/// Everything that is wrong with a decision. `releases` are those that it was made with.
pub fn lint(before: &Fleet, decision: &Decision, releases: &Releases, view: &View) -> Vec<Violation> {
    let mut lint = Lint { before, after: &decision.fleet, releases, violations: Vec::new() };
    lint.counts();
    lint.numbers();
    lint.edge(&decision.effects, view);
    lint.launches(&decision.effects);
    for event in &decision.events {
        if let Event::Rollout(_, rollout) = event {
            lint.ended(rollout);
        }
    }
    lint.violations
}

impl Lint<'_> {
    fn wrong(&mut self, invariant: u32, what: String) {
        self.violations.push(Violation { invariant, what });
    }

    /// Releases that the fleet is between, after the decision.
    fn between(&self) -> Vec<&Release> {
        let rollout = self.after.rollout.iter().flat_map(|r| [Some(r.from), Some(r.to), r.back_to]);
        let numbers = rollout.chain([Some(self.after.release)]).flatten();
        numbers.filter_map(|number| self.releases.get(&number)).collect()
    }

    fn target(&self) -> Option<&Release> {
        let rollout = self.after.rollout.as_ref();
        self.releases.get(&rollout.map_or(self.after.release, |r| r.back_to.unwrap_or(r.to)))
    }

    /// 1: what is launched fits under the roof, and what serves well leaves only as long as enough do. A fleet that
    /// was given up, or removed, has no floor.
    fn counts(&mut self) {
        let Some(target) = self.target() else { return };
        let (surge, unavailable) = (target.surge(), target.unavailable());
        let replicas: Vec<u32> = self.between().iter().map(|release| release.replicas()).collect();
        let most = replicas.iter().max().copied().unwrap_or(0) as usize + surge as usize;
        let least = replicas.iter().min().copied().unwrap_or(0).saturating_sub(unavailable) as usize;

        let total = self.after.instances.values().filter(|i| i.takes_room()).count();
        let launched = self.after.instances.keys().any(|id| !self.before.instances.contains_key(id));
        if launched && total > most {
            self.wrong(1, format!("{total} instances after a launch, at most {most} allowed"));
        }
        let given_up = self.after.removed || self.gave_up();
        let left = self.before.instances.iter().filter(|(id, _)| {
            self.after.instances.get(*id).is_some_and(|i| i.state == InstanceState::Draining)
        });
        // Judged by what was known when the decision was made: an instance that is found unhealthy in the same look
        // was free to go.
        let served: Vec<&InstanceId> = left
            .filter(|(id, i)| i.state != InstanceState::Draining && self.well(id))
            .map(|(id, _)| id)
            .collect();
        let healthy = self.after.instances.values().filter(|i| i.is_up() && i.served).count();
        if !served.is_empty() && healthy < least && !given_up {
            let what = format!("{} left, {healthy} healthy remain, {least} needed", served[0]);
            self.wrong(1, what);
        }
    }

    fn well(&self, id: &InstanceId) -> bool {
        self.after.instances.get(id).is_some_and(|i| i.served && i.health == HealthState::Healthy)
    }

    fn gave_up(&self) -> bool {
        self.after.rollout.is_none()
            && self.after.finished.as_ref().is_some_and(|r| r.state == RolloutState::Failed)
            && self.after.last_good == 0
    }

    /// 7 and 12: what only grows, grows; the release goes back only by a rollback that is on record.
    fn numbers(&mut self) {
        let (before, after) = (self.before, self.after);
        let growing = [
            ("next release", before.next_release, after.next_release),
            ("next attempt", before.next_attempt, after.next_attempt),
            ("generation", before.generation, after.generation),
            ("revision", before.revision, after.revision),
        ];
        for (what, was, is) in growing {
            if is < was {
                self.wrong(7, format!("{what} went from {was} to {is}"));
            }
        }
        if before.edge != after.edge && after.generation == before.generation {
            self.wrong(7, "the edge changed under the same generation".to_owned());
        }
        for id in after.instances.keys().filter(|id| !before.instances.contains_key(*id)) {
            if id.attempt < before.next_attempt || id.attempt >= after.next_attempt {
                self.wrong(7, format!("{id} takes an attempt that was used before"));
            }
        }
        let back = after.rollout.iter().chain(&after.finished).any(|r| r.back_to == Some(after.release));
        if after.release < before.release && !back && !after.removed {
            self.wrong(12, format!("release went from {} to {} unrecorded", before.release, after.release));
        }
    }

    /// The edge holds only what runs and passed its gate, and nobody ends who is on it, or may still be.
    fn edge(&mut self, effects: &[Effect], view: &View) {
        let backends = self.after.edge.iter().flat_map(|l| &l.backends).map(|b| &b.instance);
        let on_edge: BTreeSet<&InstanceId> = backends.collect();
        for id in &on_edge {
            let fit = |i: &Instance| i.state == InstanceState::Running && i.passed;
            // One that the fleet has forgotten stays where it was found.
            let runs = |seen: &Seen| seen.state == SeenState::Running;
            let found = view.edge.iter().flat_map(|l| &l.backends).any(|backend| backend.instance == **id);
            let stranger = || found && view.engine.as_ref().and_then(|e| e.get(*id)).is_some_and(runs);
            if !self.after.instances.get(*id).map_or_else(stranger, fit) {
                self.wrong(1, format!("{id} is on the edge and has not passed its gate, or does not run"));
            }
        }
        let acknowledged = nodes::behind(self.after, view).is_empty();
        for effect in effects {
            let Effect::Retire { id, .. } = effect else { continue };
            let alive = self.after.instances.get(id).is_none_or(|i| !i.is_broken());
            if on_edge.contains(id) || alive && !acknowledged {
                self.wrong(1, format!("{id} is retired while it may be on the edge"));
            }
        }
    }

    /// 11 and 13: nothing is launched for a release that is not verified, or that was convicted.
    fn launches(&mut self, effects: &[Effect]) {
        let Some(rollout) = self.after.rollout.as_ref().filter(|r| r.is_forward()) else { return };
        let Some(target) = self.releases.get(&rollout.to) else { return };
        let content = target.content();
        let new = |id: &InstanceId| {
            id.attempt >= rollout.first_attempt
                && self.after.instances.get(id).is_some_and(|i| i.content == content)
        };
        let unverified = !rollout.verified
            && effects.iter().any(|effect| matches!(effect, Effect::Launch { id, .. } if new(id)));
        let convicted = self.after.quarantine.iter().any(|conviction| conviction.matches(target));
        if unverified {
            self.wrong(11, format!("r{} is launched before it was verified", rollout.to));
        }
        if convicted {
            self.wrong(13, format!("r{} is rolled out although it was convicted", rollout.to));
        }
    }

    /// 5 and 15: how a rollout may end.
    fn ended(&mut self, rollout: &Rollout) {
        match rollout.state {
            RolloutState::Succeeded => self.succeeded(rollout),
            RolloutState::RolledBack => {
                let good = rollout.back_to == Some(self.after.last_good);
                let there = rollout.back_to == Some(self.after.release) || self.after.rollout.is_some();
                if !good || !there {
                    self.wrong(5, format!("{} rolled back to what is not the last good release", rollout.id));
                }
            }
            RolloutState::Failed if rollout.problem.is_empty() => {
                self.wrong(5, format!("{} failed without a word", rollout.id));
            }
            _ => {}
        }
    }

    fn succeeded(&mut self, rollout: &Rollout) {
        let Some(target) = self.releases.get(&rollout.to) else { return };
        for ordinal in 0..target.replicas() {
            let through = self.after.instances.iter().any(|(id, i)| {
                id.ordinal == ordinal
                    && i.content == target.content()
                    && i.is_up()
                    && i.soaked >= target.soak()
            });
            if !through {
                self.wrong(15, format!("{} succeeded, and ordinal {ordinal} had no soak", rollout.id));
            }
        }
        if self.after.last_good != rollout.to {
            self.wrong(15, format!("{} succeeded without being the last good release", rollout.id));
        }
    }
}
