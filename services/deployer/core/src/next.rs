//! One decision: the fleet and what is known of the outside in, the fleet as it is to be and what is to be done out.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::name::InstanceId;
use kiln_model::time::{Millis, Now};

use crate::effect::{Effect, Event, RolloutVerb};
use crate::fleet::{Fleet, InstanceState};
use crate::observe::{self, COUNT_EVERY, MAX_TICK};
use crate::release::{Release, Releases};
use crate::rollout::{Rollout, RolloutState};
use crate::strangers::{self, Strangers};
use crate::view::{SeenState, View};
use crate::{gate, nodes, plan};

/// A poll of the monitor, or a check of our own, is not asked for more often than this.
const MIN_ASK: Duration = Duration::from_millis(200);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// To be committed where it differs from the one that was given.
    pub fleet: Fleet,
    /// Releases that were marked good or quarantined.
    pub releases: Vec<Release>,
    pub events: Vec<Event>,
    /// Everything that is outstanding once the fleet is committed; what is under way already need not be begun again.
    pub effects: Vec<Effect>,
    /// Decide again after this time even where nothing happens.
    pub wake_in: Option<Duration>,
}

/// A decision in the making.
pub(crate) struct Work<'a> {
    pub(crate) fleet: Fleet,
    pub(crate) releases: &'a Releases,
    pub(crate) changed: Releases,
    pub(crate) events: Vec<Event>,
    pub(crate) now: Timestamp,
    pub(crate) strangers: Strangers,
}

impl<'a> Work<'a> {
    pub(crate) fn new(fleet: &Fleet, releases: &'a Releases, now: Timestamp) -> Self {
        Self {
            fleet: fleet.clone(),
            releases,
            changed: Releases::new(),
            events: Vec::new(),
            now,
            strangers: Strangers::default(),
        }
    }

    /// A release as it was before this decision; only its marks can differ from what it is after.
    pub(crate) fn release(&self, number: u64) -> Option<&'a Release> {
        self.releases.get(&number)
    }

    pub(crate) fn target(&self) -> Option<&'a Release> {
        self.release(self.fleet.target())
    }

    pub(crate) fn mark(&mut self, number: u64, mark: impl FnOnce(&mut Release)) {
        if let Some(release) = self.releases.get(&number) {
            mark(self.changed.entry(number).or_insert_with(|| release.clone()));
        }
    }

    pub(crate) fn tell_rollout(&mut self, verb: RolloutVerb, rollout: &Rollout) {
        self.events.push(Event::Rollout(verb, Box::new(rollout.record())));
    }

    /// Puts a rollout away as ended.
    pub(crate) fn end_rollout(&mut self, mut rollout: Rollout, state: RolloutState, verb: RolloutVerb) {
        rollout.state = state;
        rollout.ended = Some(self.now);
        self.tell_rollout(verb, &rollout);
        self.fleet.finished = Some(rollout);
    }

    /// Begins the move to a release that is not proven yet.
    pub(crate) fn start_rollout(&mut self, to: &Release, from: u64) {
        let fleet = &mut self.fleet;
        let rollout = Rollout {
            id: format!("{}-r{}", fleet.server, to.number),
            from,
            to: to.number,
            state: RolloutState::Running,
            cause: to.revision.cause.clone(),
            problem: String::new(),
            failure: None,
            convicted: None,
            started: self.now,
            ended: None,
            done: 0,
            total: to.replicas(),
            verified: false,
            first_attempt: fleet.next_attempt,
            failed_launches: 0,
            elapsed: Millis(0),
            back_to: None,
        };
        for instance in fleet.instances.values_mut() {
            instance.soaked = Millis(0);
            instance.unseen = Millis(0);
        }
        fleet.release = to.number;
        fleet.removed = false;
        fleet.refused = None;
        fleet.problem = String::new();
        self.tell_rollout(RolloutVerb::Started, &rollout);
        self.fleet.rollout = Some(rollout);
    }

    pub(crate) fn acknowledged(&self, view: &View) -> bool {
        nodes::behind(&self.fleet, view).is_empty()
    }
}

/// Decides. Pure: the same arguments give the same decision.
pub fn next(fleet: &Fleet, releases: &Releases, view: &View, now: Now) -> Decision {
    let Some(engine) = &view.engine else {
        // Nothing is known of what runs, so nothing can be right: neither counts any time meanwhile.
        let effects = hold(fleet, releases, view).into_iter().collect();
        return Decision {
            fleet: fleet.clone(),
            releases: Vec::new(),
            events: Vec::new(),
            effects,
            wake_in: None,
        };
    };

    let mut work = Work::new(fleet, releases, now.wall);
    work.strangers = Strangers::find(fleet, engine, view);
    observe::tick(&mut work, view, view.elapsed.min(MAX_TICK).into());
    let ticked = work.fleet.clone();

    observe::engine(&mut work, engine, view);
    observe::health(&mut work, view);
    let acknowledged = work.acknowledged(view);
    observe::edge(&mut work, acknowledged);
    observe::evidence(&mut work, view);
    if let Some(routed) = view.routed.values().max().filter(|routed| **routed > work.fleet.generation) {
        // Our store is older than what a node remembers (it was restored): step past it, or nothing is accepted.
        work.fleet.generation = routed + 1;
    }
    gate::judge(&mut work, view);
    gate::begin_pending(&mut work);
    plan::people(&mut work);
    let edge = plan::edge(&work);
    if edge != work.fleet.edge {
        work.fleet.edge = edge;
        work.fleet.generation += 1;
    }
    let acknowledged = work.acknowledged(view);
    gate::complete(&mut work, acknowledged);
    if acknowledged {
        work.fleet.left.clear();
    }
    plan::forget(&mut work, engine, view, acknowledged);
    gate::describe(&mut work, view);

    let effects = effects(&work, engine, view);
    let wake_in = observe::due(&work, view);
    // Sums alone are written once a second, not at every look. What has not been written is counted the next time.
    if work.fleet == ticked && view.elapsed < COUNT_EVERY {
        work.fleet = fleet.clone();
    }
    Decision {
        fleet: work.fleet,
        releases: work.changed.into_values().collect(),
        events: work.events,
        effects,
        wake_in,
    }
}

fn effects(
    work: &Work<'_>,
    engine: &std::collections::BTreeMap<InstanceId, crate::Seen>,
    view: &View,
) -> Vec<Effect> {
    let fleet = &work.fleet;
    let generation = fleet.generation;
    let behind = nodes::behind(fleet, view);
    let acknowledged = behind.is_empty();
    let mut effects = Vec::new();
    let trace = |cause: Option<&Cause>| cause.map(|c| c.traceparent.clone()).unwrap_or_default();
    let rollout_trace = trace(fleet.rollout.as_ref().or(fleet.finished.as_ref()).map(|r| &r.cause));

    if let (Some(rollout), Some(target)) = (&fleet.rollout, work.target())
        && rollout.is_forward()
        && !rollout.verified
    {
        let (node, image) = (target.revision.run.node(), target.revision.image_digest);
        effects.push(Effect::Verify { node, image, traceparent: rollout_trace.clone() });
    }
    effects.extend(behind.into_iter().map(|node| Effect::Route {
        node: node.clone(),
        listeners: nodes::edge_of(fleet, engine, node),
        generation,
        traceparent: rollout_trace.clone(),
    }));
    for (id, instance) in &fleet.instances {
        let Some(release) = work.release(id.release) else { continue };
        let traceparent = trace(Some(&instance.cause));
        let retire = |drain| Effect::Retire {
            node: instance.node.clone(),
            id: id.clone(),
            drain,
            generation,
            // An instance leaves because of what came after it.
            traceparent: rollout_trace.clone(),
        };
        match instance.state {
            InstanceState::Launching => effects.push(Effect::Launch {
                node: instance.node.clone(),
                id: id.clone(),
                image: instance.content.image,
                run: Box::new(release.revision.run.clone()),
                generation,
                traceparent,
            }),
            InstanceState::Draining if acknowledged => effects.push(retire(release.revision.run.drain)),
            InstanceState::Exited | InstanceState::Failed if !is_cleared(id, engine, view) => {
                effects.push(retire(Millis(0)));
            }
            _ => {}
        }
    }
    if acknowledged {
        // Users may have come to them a moment ago.
        let drain = work.target().map_or(Millis(0), |target| target.revision.run.drain);
        let leaving = strangers::leavers(work).filter_map(|id| Some((id, engine.get(id)?)));
        effects.extend(leaving.map(|(id, seen)| Effect::Retire {
            node: seen.node.clone(),
            id: id.clone(),
            drain,
            generation,
            traceparent: String::new(),
        }));
    }
    effects.extend(questions(work, view));
    effects.extend(hold(fleet, work.releases, view));
    effects
}

/// The node has nothing left of it.
pub(crate) fn is_cleared(
    id: &InstanceId,
    engine: &std::collections::BTreeMap<InstanceId, crate::Seen>,
    view: &View,
) -> bool {
    view.retired.contains(id) || engine.get(id).is_none_or(|seen| seen.state == SeenState::Retired)
}

/// What to ask of the monitor, of instances, and of their logs.
fn questions(work: &Work<'_>, view: &View) -> Vec<Effect> {
    let fleet = &work.fleet;
    let mut effects = Vec::new();
    for id in observe::to_check(work, view) {
        let Some(policy) = work.release(id.release).and_then(Release::health) else { continue };
        let interval = policy.interval.as_duration().max(MIN_ASK);
        if view.checks.get(&id).is_none_or(|own| own.age >= interval) {
            let Some(node) = fleet.instances.get(&id).map(|instance| instance.node.clone()) else { continue };
            effects.push(Effect::Check { node, id, check: policy.check.clone(), timeout: policy.timeout });
        }
    }
    if fleet.is_forward() {
        // While a rollout goes forward the monitor has to be seen alive, which its events alone do not show: they
        // tell of changes.
        let asked = observe::watched(work).filter_map(|(id, policy)| {
            let interval = policy.interval.as_duration().max(MIN_ASK);
            view.health.get(id).is_none_or(|told| told.age >= interval).then_some(interval)
        });
        if let Some(interval) = asked.min() {
            effects.push(Effect::Observe { interval });
        }
    }
    let failures = fleet.rollout.iter().chain(&fleet.finished).filter_map(|r| r.failure.as_ref());
    for failure in failures.filter(|failure| failure.last_log.is_none()) {
        if !view.evidence.contains_key(&failure.instance) {
            effects.push(Effect::Evidence { node: failure.node.clone(), id: failure.instance.clone() });
        }
    }
    effects
}

/// Images that a running instance, the rollout or a rollback could need.
fn hold(fleet: &Fleet, releases: &Releases, view: &View) -> Option<Effect> {
    let images: BTreeSet<Digest> = fleet
        .releases_needed()
        .filter_map(|number| releases.get(&number))
        .map(|release| release.revision.image_digest)
        .collect();
    (view.held.as_ref() != Some(&images)).then_some(Effect::Hold { images })
}
