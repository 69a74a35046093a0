//! Replicas that die or stand still: another one goes on with their work within five seconds, and one that goes on later
//! than that does no harm.

use std::path::PathBuf;
use std::time::Duration;

use kiln_api::builder::apply_request::Source;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::builder::{ApplyRequest, GitSource};
use kiln_builder_core::build::State;
use kiln_deployer_core::{Instance, InstanceState};
use kiln_model::event::Service;
use kiln_store::Store as _;
use tokio::time::Instant;

use crate::life::Life;
use crate::nature::Nature;
use crate::outside::{Definition, URL};
use crate::settled::{unsettled, web};
use crate::site::Site;
use crate::tests::played;
use crate::world::{Faults, World};

const WITHIN: Duration = Duration::from_secs(5);
/// Of a rollout in the definitions here.
const DEADLINE: Duration = Duration::from_secs(600);
/// Of a probe in the definitions here, with its timeout.
const A_LOOK: Duration = Duration::from_secs(3);
/// Longer than an instance may take to come up, and than a member of a service is waited for.
const AWAY: Duration = Duration::from_secs(60);
/// Stories with these numbers have two or three processes of each service.
const SHARED: [u64; 6] = [3, 7, 11, 15, 19, 23];
/// In these each service has a process for itself.
pub(crate) const ALONE: [u64; 6] = [0, 1, 2, 4, 5, 6];

pub(crate) fn each_holds(seeds: &[u64], tell: impl AsyncFn(&Site) -> Result<(), String>) {
    for &seed in seeds {
        let told = played(seed, async |world: &World, folder: PathBuf| {
            let site = Site::new(world, folder);
            let told = tell(&site).await;
            site.directory.close();
            told.map_err(|broken| vec![broken])?;
            if world.broken().is_empty() { Ok(None) } else { Err(world.broken()) }
        });
        if let Err((broken, story)) = told {
            panic!("seed {seed}\n{story}\n\nseed {seed}: {}", broken.join("\n"));
        }
    }
}

/// How long it took.
pub(crate) async fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> Result<T, String> {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return Ok(found);
        }
        if began.elapsed() > limit {
            return Err(format!("not within {limit:?}: {what}"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn commit(site: &Site, image: u64) {
    let definition = Definition { image, nature: Nature::Good, run: 0, replicas: 3, tested: false };
    site.outside.commit(Some(definition));
}

pub(crate) async fn rests(site: &Site) -> Result<(), String> {
    until("rest", Duration::from_secs(300), async || unsettled(site).await.is_none().then_some(())).await
}

pub(crate) async fn apply(site: &Site) -> Result<(), String> {
    site.outside.publish(Nature::Good);
    commit(site, 0);
    let git = GitSource { url: URL.to_owned(), branch: "main".to_owned() };
    let request = ApplyRequest { request_id: "call-1".to_owned(), source: Some(Source::Git(git)) };
    let mut client = BuilderServiceClient::new(site.channel(Service::Builder));
    // They start at the same time as this.
    until("an answer", Duration::from_secs(60), async || client.apply(request.clone()).await.ok()).await?;
    Ok(())
}

fn lives_of(site: &Site, service: Service) -> Vec<Life> {
    site.lives().into_iter().filter(|life| life.service == service).collect()
}

/// Stops all processes of a service but one. Which one has the work differs from seed to seed.
fn stand_still(site: &Site, service: Service) {
    lives_of(site, service).iter().skip(1).for_each(Life::freeze);
}

#[test]
fn a_build_goes_on_where_its_builder_died() {
    each_holds(&SHARED, async |site| {
        apply(site).await?;
        let (id, token, owner) = until("a build", Duration::from_secs(60), async || {
            site.invariants.builds().into_iter().find_map(|build| match &build.state {
                State::Running { lease } => Some((build.id, build.token, lease.owner.clone())),
                _ => None,
            })
        })
        .await?;
        let lives = site.lives();
        lives.iter().find(|life| life.name() == owner).ok_or("nobody builds it")?.kill("while it bakes");
        until("the build is another's", WITHIN, async || {
            site.invariants.builds().into_iter().find(|build| build.id == id && build.token > token)
        })
        .await?;
        Ok(())
    });
}

#[test]
fn a_rollout_goes_on_where_its_deployer_stands_still() {
    each_holds(&SHARED, async |site| {
        apply(site).await?;
        let fleet = || async { site.disk(Service::Deployer).store.get("fleet", "web").await.unwrap() };
        until("a rollout", Duration::from_secs(120), async || {
            let fleet = site.invariants.fleet(&web())?;
            (fleet.rollout.is_some() && !fleet.instances.is_empty()).then_some(())
        })
        .await?;
        stand_still(site, Service::Deployer);
        let before = fleet().await.map(|document| document.version);
        until("the fleet goes on", WITHIN, async || {
            (fleet().await.map(|document| document.version) > before).then_some(())
        })
        .await?;
        rests(site).await
    });
}

#[test]
fn an_instance_that_hangs_is_seen_where_its_monitor_stands_still() {
    each_holds(&SHARED, async |site| {
        apply(site).await?;
        rests(site).await?;
        stand_still(site, Service::Monitor);
        let stood = Instant::now();
        let hung = {
            let mut machine = site.invariants.machine.lock().unwrap();
            let running = machine.instances.iter_mut().filter(|(_, held)| held.takes_room());
            running
                .map(|(id, held)| {
                    site.invariants.excuse(&id.server, id.release);
                    held.course.hangs = true;
                    id.to_string()
                })
                .collect::<Vec<_>>()
        };
        // By then somebody else looks at it, and from then on it takes as many looks as the definition says.
        for id in &hung {
            until(&format!("somebody looks at {id}"), WITHIN, async || {
                let machine = site.invariants.machine.lock().unwrap();
                let held = machine.instances.get(&id.parse().unwrap())?;
                held.looked_at.is_some_and(|at| at > stood).then_some(())
            })
            .await?;
        }
        for id in hung {
            until(&format!("{id} is unhealthy"), A_LOOK * 2, async || {
                let document = site.disk(Service::Monitor).store.get("health", &id).await.unwrap();
                // Forgotten: another one has taken its place already.
                document.is_none_or(|document| document.body["state"] != "healthy").then_some(())
            })
            .await?;
        }
        Ok(())
    });
}

/// It reads of an instance that another process has launched meanwhile, before its node tells of it.
#[test]
fn a_deployer_that_stood_still_convicts_nothing_that_it_was_not_told_of() {
    each_holds(&ALONE, async |site| {
        site.world.set_faults(Faults { slow: 0.5, ..Faults::default() });
        apply(site).await?;
        for image in 1..5 {
            rests(site).await?;
            let still = site.life(Service::Deployer, 0).ok_or("no deployer runs")?;
            commit(site, image);
            let release = until("a rollout", Duration::from_secs(120), async || {
                site.invariants.fleet(&web())?.rollout.map(|rollout| rollout.to)
            })
            .await?;
            still.freeze();
            site.start(Service::Deployer, 0);
            until("an instance that another deployer launched", Duration::from_secs(15), async || {
                let fleet = site.invariants.fleet(&web())?;
                let running = |i: &Instance| i.state == InstanceState::Running;
                fleet.instances.iter().any(|(id, i)| id.release == release && running(i)).then_some(())
            })
            .await?;
            still.thaw();
            rests(site).await?;
            still.kill("since it was replaced");
        }
        Ok(())
    });
}

/// Nobody looks at what the rollout launched: it holds, and its deadline stands still.
#[test]
fn a_monitor_that_stands_still_for_longer_than_a_deadline_convicts_nothing() {
    each_holds(&[ALONE[0], ALONE[1], SHARED[0]], async |site| {
        apply(site).await?;
        rests(site).await?;
        commit(site, 1);
        until("a rollout", Duration::from_secs(120), async || site.invariants.fleet(&web())?.rollout).await?;
        let monitors = lives_of(site, Service::Monitor);
        monitors.iter().for_each(Life::freeze);
        tokio::time::sleep(DEADLINE + Duration::from_secs(60)).await;
        monitors.iter().for_each(Life::thaw);
        rests(site).await
    });
}

/// Each process dies as soon as it is there, and the broker is away: who serves goes on to, then and when all are back.
#[test]
fn the_edge_stays_as_it_is_while_all_of_kiln_is_away_and_when_it_is_back() {
    each_holds(&[ALONE[0], ALONE[1], SHARED[0]], async |site| {
        apply(site).await?;
        rests(site).await?;
        let edge = || site.invariants.machine.lock().unwrap().on_edge("web");
        let (before, began) = (edge(), Instant::now());
        site.broker.set_away(true);
        while began.elapsed() < AWAY * 2 {
            if began.elapsed() < AWAY {
                site.lives().iter().for_each(|life| life.kill("as soon as it is there"));
            } else {
                site.broker.set_away(false);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
            let now = edge();
            if now != before {
                return Err(format!(
                    "{now:?} are on the edge, {before:?} were, and nothing happened to them"
                ));
            }
        }
        rests(site).await
    });
}
