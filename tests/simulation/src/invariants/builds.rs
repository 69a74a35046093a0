//! What must hold of builds.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_builder_core::build::{self, Build, State};
use kiln_model::cause::CauseKind;
use kiln_model::digest::Digest;
use kiln_store::Document;
use tokio::time::Instant;

use super::{Invariants, Seen, all};
use crate::life::Life;

/// So many builds of a server at most in an hour for what Kiln finds by itself or is told of by machines: 20, and as many
/// as a person asked for at the same time. No story has more than ten acts of people.
const AN_HOUR: usize = 20 + 10;
const HOUR: Duration = Duration::from_secs(3600);

impl Invariants {
    pub(super) fn builder(&self, life: &Life, seen: &mut Seen, before: &[Document], after: &[Document]) {
        for build in all::<Build>(after, build::KIND) {
            let was = seen.builds.insert(build.id.to_string(), build.clone());
            match &was {
                Some(was) => self.owned(life, was, &build),
                None => self.caused(seen, &build),
            }
        }
        let images = |documents: &[Document]| -> BTreeSet<Digest> {
            let images = documents.iter().filter(|document| document.kind == "image");
            images.map(|document| document.body["digest"].as_str().unwrap().parse().unwrap()).collect()
        };
        for image in images(before).difference(&images(after)) {
            self.collected(seen, image);
            // Its lock has none any more: the next plan for it is built.
            let made_it =
                |build: &Build| matches!(build.state, State::Succeeded { image: made } if made == *image);
            seen.builds.retain(|_, build| !made_it(build));
        }
        // 2 and 19, as the builder's own list has them.
        let builds: Vec<Build> = seen.builds.values().cloned().collect();
        for violation in kiln_builder_core::invariants::violations(&[], &builds) {
            self.world.wrong(2, violation);
        }
        for server in all::<kiln_builder_core::server::Server>(after, "server") {
            for violation in kiln_builder_core::invariants::violations(&[server], &[]) {
                self.world.wrong(13, violation);
            }
        }
    }

    /// 7: a build is brought to its end by who holds it, and what has ended stays so.
    fn owned(&self, life: &Life, was: &Build, is: &Build) {
        if is.token < was.token {
            self.world.wrong(7, format!("{}: its token went from {} to {}", is.id, was.token, is.token));
        }
        let ended = matches!(is.state, State::Succeeded { .. } | State::Failed);
        if let State::Running { lease } = &was.state
            && ended
            // Given up by the process that comes next, after it was interrupted too often.
            && is.interruptions == was.interruptions
            && lease.owner != life.name()
        {
            self.world.wrong(7, format!("{} ends {}, which {} holds", life.name(), is.id, lease.owner));
        }
        if was.state.has_ended() && was.state != is.state {
            self.world.wrong(2, format!("{} had ended as {:?}, and is {:?}", is.id, was.state, is.state));
        }
    }

    /// 13: what flaps outside does not keep Kiln building. What a person commits is built each time.
    fn caused(&self, seen: &mut Seen, build: &Build) {
        if !matches!(build.cause.kind, CauseKind::PackageUpdates | CauseKind::Reported) {
            return;
        }
        // Where the wall clock jumps, the hour by which the builder counts is another one.
        let (now, shift) = (Instant::now(), self.world.shift());
        let server = build.server().to_string();
        let times = seen.by_itself.entry(server.clone()).or_default();
        times.retain(|(time, at)| now.saturating_duration_since(*time) < HOUR && *at == shift);
        times.push((now, shift));
        if times.len() > AN_HOUR {
            let what = format!("{} builds of {server} in an hour that nobody asked for", times.len());
            self.world.wrong(13, what);
        }
    }
}
