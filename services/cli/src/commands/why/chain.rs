//! The links between a cause and what came of it: signal or commit, build, revision, release, rollout, instance.

use kiln_api::builder::{Build, BuildState, Server};
use kiln_api::deployer::{Fleet, Instance, Release, Rollout};
use kiln_api::monitor::Health;
use kiln_api::types::{Cause, Revision, Signal};
use prost_types::Timestamp;
use serde_json::{Value, json};

use crate::clients::Services;
use crate::failure::Outcome;
use crate::words::{
    build_state, health, instance_state, moment, or_dash, plural, release, rollout_state, short,
};
use crate::words::{signal_state, timestamp, took, went_back_by_hand, whole_way};

/// One step of the chain.
pub(super) struct Link {
    pub(super) kind: &'static str,
    id: String,
    time: Option<Timestamp>,
    pub(super) text: String,
}

impl Link {
    fn new(kind: &'static str, id: &str, time: Option<Timestamp>, text: String) -> Self {
        Self { kind, id: id.to_owned(), time, text }
    }

    pub(super) fn moment(&self) -> String {
        moment(self.time.as_ref())
    }

    pub(super) fn document(&self) -> Value {
        json!({
            "kind": self.kind,
            "id": self.id,
            "time": timestamp(self.time.as_ref()).map(|time| time.to_string()),
            "text": self.text,
        })
    }
}

/// Everything known of one server. What a service that is away knows is left out: the chain is as long as it can be.
pub(super) struct Facts {
    name: String,
    pub(super) server: Option<Server>,
    pub(super) fleet: Option<Fleet>,
    pub(super) builds: Vec<Build>,
    revisions: Vec<Revision>,
    releases: Vec<Release>,
    pub(super) rollouts: Vec<Rollout>,
    instances: Vec<Instance>,
    signals: Vec<Signal>,
    pub(super) health: Vec<Health>,
}

fn known<T: Default>(answer: Outcome<T>) -> Outcome<T> {
    match answer {
        Err(failure) if failure.is_unavailable() || failure.is_not_found() => Ok(T::default()),
        other => other,
    }
}

impl Facts {
    pub(super) async fn gather(name: &str, services: &Services) -> Outcome<Self> {
        let fleet = services.fleet_if_any(name).await;
        let server = match (services.server(name).await, &fleet) {
            // With both away there is nothing to tell, and that is what is said.
            (Err(failure), Err(other)) if failure.is_unavailable() && other.is_unavailable() => {
                return Err(failure);
            }
            (server, _) => server,
        };
        Ok(Self {
            name: name.to_owned(),
            server: known(server.map(Some))?,
            fleet: known(fleet)?,
            builds: known(services.builds(name).await)?,
            revisions: known(services.revisions(name).await)?,
            releases: known(services.releases(name).await)?,
            rollouts: known(services.rollouts(name).await)?,
            instances: known(services.instances(name, true).await)?,
            signals: known(services.signals(name).await)?,
            health: known(services.health(name).await)?,
        })
    }

    pub(super) fn instance(&self, id: &str) -> Option<&Instance> {
        self.instances.iter().find(|it| it.id == id)
    }

    pub(super) fn build(&self, id: &str) -> Option<&Build> {
        self.builds.iter().find(|it| it.id == id)
    }

    pub(super) fn release(&self, number: u64) -> Option<&Release> {
        self.releases.iter().find(|it| it.number == number)
    }

    pub(super) fn rollouts_to(&self, number: u64) -> impl Iterator<Item = &Rollout> {
        self.rollouts.iter().filter(move |it| it.to_release == number)
    }

    pub(super) fn of_instance(&self, it: &Instance) -> Vec<Link> {
        let mut chain = self.of_release(it.release);
        // What happened to its release after it was launched has not led to it.
        let later = |link: &Link| timestamp(link.time.as_ref()) > timestamp(it.launched.as_ref());
        chain.retain(|link| link.kind != "rollout" || it.launched.is_none() || !later(link));
        // A replacement has a cause of its own, beside that of its release.
        let own = it
            .cause
            .as_ref()
            .filter(|cause| matches!(cause.kind.as_str(), "unhealthy" | "gone" | "reported"));
        chain.extend(own.map(|cause| self.cause(cause)));
        let text = match it.address.as_str() {
            "" => it.id.clone(),
            address => format!("{} at {address}", it.id),
        };
        chain.push(Link::new("instance", &it.id, it.launched, text));
        if it.ended.is_some() {
            let mut text = instance_headline(it);
            if !it.detail.is_empty() {
                text.push_str(&format!(": {}", it.detail));
            }
            chain.push(Link::new("end", &it.id, it.ended, text));
        }
        chain
    }

    pub(super) fn of_release(&self, number: u64) -> Vec<Link> {
        let Some(made) = self.release(number) else { return Vec::new() };
        let mut chain = Vec::new();
        if let Some(revision) = &made.revision {
            chain = self.of_revision(revision);
        }
        let text = format!("{} {}", self.name, release(number));
        chain.push(Link::new("release", &format!("{}-r{number}", self.name), made.created, text));
        let left_by_hand = |it: &&Rollout| went_back_by_hand(it) && it.from_release == number;
        let of_it = self.rollouts.iter().filter(|it| it.to_release == number || left_by_hand(it));
        chain.extend(of_it.map(rollout));
        chain
    }

    /// A rollout by its id: who or what asked for it, and how it went.
    pub(super) fn of_rollout(&self, it: &Rollout) -> Vec<Link> {
        let mut chain: Vec<Link> = it.cause.iter().map(|cause| self.cause(cause)).collect();
        chain.push(rollout(it));
        chain
    }

    fn of_revision(&self, revision: &Revision) -> Vec<Link> {
        let mut chain: Vec<Link> = revision.cause.iter().map(|cause| self.cause(cause)).collect();
        match self.build(&revision.build) {
            // A revision that changes `run` alone names the build that made its image, which was made before.
            Some(build)
                if build.cause.as_ref().map(|it| &it.id) == revision.cause.as_ref().map(|it| &it.id) =>
            {
                chain.push(build_link(build));
            }
            Some(build) => {
                let text = format!("{} made the image before; only how it runs changed", build.id);
                chain.insert(0, Link::new("build", &build.id, build.ended, text));
            }
            None if revision.build.is_empty() => {}
            None => chain.push(Link::new("build", &revision.build, None, revision.build.clone())),
        }
        let mut text = format!(
            "{} g{}: image {}, definition {}",
            self.name,
            revision.generation,
            short(&revision.image_digest),
            short(&revision.definition_digest)
        );
        if !revision.commit.is_empty() {
            text.push_str(&format!(", commit {}", short(&revision.commit)));
        }
        let id = format!("{}-g{}", self.name, revision.generation);
        chain.push(Link::new("revision", &id, revision.created, text));
        chain
    }

    /// What led to a build, and what came of it.
    pub(super) fn of_build(&self, build: &Build) -> Vec<Link> {
        let mut chain: Vec<Link> = build.cause.iter().map(|cause| self.cause(cause)).collect();
        chain.push(build_link(build));
        for revision in self.revisions.iter().filter(|it| it.build == build.id) {
            let made = self
                .releases
                .iter()
                .find(|it| it.revision.as_ref().is_some_and(|of| of.generation == revision.generation));
            match made {
                Some(made) => chain.extend(
                    self.of_release(made.number)
                        .into_iter()
                        .filter(|link| matches!(link.kind, "release" | "rollout")),
                ),
                None => {
                    let id = format!("{}-g{}", self.name, revision.generation);
                    chain.push(Link::new("revision", &id, revision.created, format!("{id}: no release yet")));
                }
            }
        }
        chain
    }

    pub(super) fn of_server(&self) -> Vec<Link> {
        match self.fleet.as_ref().filter(|fleet| fleet.release > 0) {
            Some(fleet) => self.of_release(fleet.release),
            None => self.builds.last().map(|build| self.of_build(build)).unwrap_or_default(),
        }
    }

    /// What came of a signal.
    pub(super) fn after_signal(&self, signal: &Signal) -> Vec<Link> {
        let caused = |cause: Option<&Cause>| cause.is_some_and(|cause| cause.id == signal.id);
        let mut chain = vec![signal_link(signal)];
        for build in self.builds.iter().filter(|it| caused(it.cause.as_ref())) {
            chain.extend(self.of_build(build).into_iter().skip(usize::from(build.cause.is_some())));
        }
        for instance in self.instances.iter().filter(|it| caused(it.cause.as_ref())) {
            chain.push(Link::new("instance", &instance.id, instance.launched, instance_headline(instance)));
        }
        chain
    }

    fn cause(&self, cause: &Cause) -> Link {
        if let Some(signal) = self.signals.iter().find(|it| it.id == cause.id) {
            return signal_link(signal);
        }
        let mut text = cause.kind.replace('_', " ");
        if !cause.summary.is_empty() {
            text.push_str(&format!(": {}", cause.summary));
        }
        if !cause.actor.is_empty() && !cause.summary.contains(&cause.actor) {
            text.push_str(&format!(" (by {})", cause.actor));
        }
        Link::new("cause", &cause.id, cause.time, text)
    }

    pub(super) fn release_headline(&self, number: u64) -> String {
        let Some(made) = self.release(number) else { return release(number) };
        let current = self.fleet.as_ref().is_some_and(|fleet| fleet.release == number);
        let moving = self.fleet.as_ref().is_some_and(|fleet| fleet.rollout.is_some());
        let word = match (made.quarantined, current, made.good) {
            (true, ..) => "is quarantined",
            (false, true, _) if moving => "is what the fleet is being moved to",
            (false, true, _) => "is what the fleet runs",
            (false, false, true) => "was good, and was replaced",
            (false, false, false) => "never was proven good",
        };
        format!("{} {} {word}", self.name, release(number))
    }

    pub(super) fn server_headline(&self) -> String {
        let name = &self.name;
        let Some(fleet) = self.fleet.as_ref().filter(|fleet| fleet.release > 0) else {
            return format!("{name} has no release yet");
        };
        if fleet.removed {
            return format!("{name} was removed");
        }
        format!("{name} runs {}: {} of {} healthy", release(fleet.release), fleet.healthy, fleet.replicas)
    }
}

fn rollout(it: &Rollout) -> Link {
    let mut text =
        format!("{}: {}", whole_way(it.from_release, it.to_release, it.back_to), rollout_state(it.state()));
    if it.ended.is_some() {
        text.push_str(&format!(" after {}", took(it.started.as_ref(), it.ended.as_ref())));
    }
    if let Some(line) = it.problem.lines().next() {
        text.push_str(&format!(": {line}"));
    }
    Link::new("rollout", &it.id, it.started, text)
}

fn build_link(it: &Build) -> Link {
    let mut text = format!("{} {}", it.id, build_state(it.state()));
    if it.ended.is_some() {
        text.push_str(&format!(" after {}", took(it.started.as_ref(), it.ended.as_ref())));
    }
    if it.state() == BuildState::Succeeded {
        let cached = it.steps.iter().filter(|step| step.cached).count();
        text.push_str(&format!(
            ": image {}, {} ({cached} cached), {} passed",
            short(&it.image_digest),
            plural(it.steps.len(), "step"),
            plural(it.tests.iter().filter(|test| test.passed).count(), "test"),
        ));
    }
    // The first build has every package as new, which says nothing.
    let changed = || it.packages.iter().filter(|change| !change.from.is_empty());
    for change in changed().take(3) {
        text.push_str(&format!("; {} {} -> {}", change.name, change.from, or_dash(&change.to)));
    }
    let more = changed().count().saturating_sub(3);
    if more > 0 {
        text.push_str(&format!("; {more} more"));
    }
    if it.security {
        text.push_str("; security updates");
    }
    Link::new("build", &it.id, it.created, text)
}

fn signal_link(it: &Signal) -> Link {
    let mut text = it.cause.replace('_', " ");
    if !it.evidence.is_empty() {
        text.push_str(&format!(": {}", it.evidence.join("; ")));
    }
    text.push_str(&format!(" (signal {} by {})", short(&it.id), or_dash(&it.reporter)));
    Link::new("signal", &it.id, it.raised, text)
}

pub(super) fn signal_headline(it: &Signal) -> String {
    format!("signal {} for {} is {}", short(&it.id), it.server, signal_state(it.state()))
}

pub(super) fn instance_headline(it: &Instance) -> String {
    let state = instance_state(it.state());
    match it.exit_code {
        Some(code) => format!("{} is {state}, exit code {code}", it.id),
        None if it.ended.is_some() => format!("{} is {state}", it.id),
        None => format!("{} is {state}, {}", it.id, health(it.health())),
    }
}

pub(super) fn rollout_headline(it: &Rollout) -> String {
    let way = whole_way(it.from_release, it.to_release, it.back_to);
    format!("{} ({way}) is {}", it.id, rollout_state(it.state()))
}

pub(super) fn build_headline(it: &Build) -> String {
    format!("{} {}", it.id, build_state(it.state()))
}
