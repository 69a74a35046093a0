//! Mistakes that chance found once in many thousand stories, told on purpose.

use std::time::Duration;

use jiff::SignedDuration;
use kiln_builder_core::build::State;
use kiln_builder_core::server::Server;
use kiln_model::event::Service;
use kiln_store::{Store as _, decode};

use crate::nature::Nature;
use crate::settled::look;
use crate::site::Site;
use crate::takeover::{ALONE, apply, commit, each_holds, rests, until};
use crate::world::{Extras, Faults};

/// Where nothing is away and nobody dies.
const SOON: Duration = Duration::from_secs(300);

/// It rests, and runs what was committed last.
async fn runs_the_newest(site: &Site) -> Result<(), String> {
    rests(site).await?;
    look(site).await.map(drop)
}

async fn taken(site: &Site) -> Option<String> {
    let server = site.disk(Service::Builder).store.get("server", "web").await.unwrap()?;
    Some(decode::<Server>(&server, u32::MAX).unwrap().head.digest.to_string())
}

/// It was committed and noticed, and its answer was an error: the builder fetched the repository as fast as it could.
#[test]
fn a_look_whose_answer_was_lost_ends() {
    each_holds(&ALONE, async |site| {
        apply(site).await?;
        rests(site).await?;
        site.world.set_extras(Extras { late_answers: true, ..Extras::default() });
        site.world.set_faults(Faults { commit_unknown: 0.5, ..Faults::default() });
        for image in 1..6 {
            commit(site, image);
            tokio::time::sleep(Duration::from_secs(20)).await;
        }
        site.world.set_faults(Faults::default());
        runs_the_newest(site).await
    });
}

/// It is a signal that was followed before: by a clock that was set back it seemed to be old.
#[test]
fn a_definition_that_comes_back_is_followed_whatever_the_clock_says() {
    each_holds(&ALONE, async |site| {
        apply(site).await?;
        for image in [1, 0, 1] {
            runs_the_newest(site).await?;
            commit(site, image);
        }
        runs_the_newest(site).await?;
        site.world.shift_wall(SignedDuration::from_hours(-2));
        commit(site, 0);
        tokio::time::sleep(Duration::from_secs(60)).await;
        runs_the_newest(site).await
    });
}

/// For reasons of its own: what it builds is nothing that ends builders.
#[test]
fn a_build_whose_builder_was_killed_five_times_is_tried_again() {
    each_holds(&ALONE, async |site| {
        apply(site).await?;
        rests(site).await?;
        site.outside.publish(Nature::Good);
        for _ in 0..5 {
            let owner = until("a build", SOON, async || {
                let builds = site.invariants.builds();
                builds.into_iter().find_map(|build| match build.state {
                    State::Running { lease } => site.process(&lease.owner).filter(|life| !life.is_dead()),
                    _ => None,
                })
            });
            owner.await?.kill("while it bakes");
        }
        until("the build is tried again", SOON * 6, async || look(site).await.is_ok().then_some(())).await
    });
}

/// The monitor has not heard of the definition in between, and takes the former one for the one in force.
#[test]
fn a_commit_back_to_what_the_monitor_knows_is_followed() {
    each_holds(&ALONE, async |site| {
        apply(site).await?;
        rests(site).await?;
        site.world.set_faults(Faults { event_lost: 1.0, ..Faults::default() });
        // At other moments between two lists of the builder's servers each time. A fourth time in an hour it would be left
        // alone.
        for wait in [0, 4, 9] {
            tokio::time::sleep(Duration::from_secs(wait)).await;
            let before = taken(site).await;
            commit(site, 1);
            until("it is taken", SOON, async || (taken(site).await != before).then_some(())).await?;
            commit(site, 0);
            until("it is taken back", SOON, async || (taken(site).await == before).then_some(())).await?;
            runs_the_newest(site).await?;
        }
        Ok(())
    });
}
