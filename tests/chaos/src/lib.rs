//! A site of real processes, and what happens to it while it is at work: kills, stops, lost data, a full disk, damaged
//! and restored stores. After each round it has come to what was asked of it.
//!
//! Which round does what comes from a seed that is printed; `KILN_TEST_SEED` gives it again.
#![cfg(test)]

mod backup;
mod calls;
mod deck;
mod disk;
mod happening;
mod kernel;
mod rounds;
mod stores;
mod wire;

use std::time::Duration;

use kiln_tests::Result;
use kiln_tests::load::fetch;
use kiln_tests::netns::Neighbour;
use kiln_tests::server::Web;
use kiln_tests::site::{Site, full};
use kiln_tests::wait::until;
use rustix::process::Signal;

use crate::disk::Disk;
use crate::happening::{Kind, SERVICES};
use crate::rounds::Rounds;

/// Each kind once, in the order of the seed; in full, again and again.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_a_site_comes_to_what_was_asked_of_it() -> Result<()> {
    let disk = Disk::new()?;
    let site = Site::up_in("chaos", disk.folder())?;
    let count = if full() { 160 } else { Kind::ON_FILES.len() };
    Rounds::start(site, &disk, &Kind::ON_FILES).await?.play(count).await
}

/// With the state in PostgreSQL, whose server is a victim as well.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_a_site_on_postgresql_comes_to_what_was_asked_of_it() -> Result<()> {
    let disk = Disk::new()?;
    let site = Site::up_on_postgres_in("pgchaos", disk.folder())?;
    let (kinds, count): (&[Kind], _) =
        if full() { (&Kind::ON_POSTGRES, 40) } else { (&Kind::OF_DATABASE, Kind::OF_DATABASE.len()) };
    Rounds::start(site, &disk, kinds).await?.play(count).await
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_flows_while_everything_of_kiln_is_down() -> Result<()> {
    let web = Web::start(Site::up("down")?).await?;
    let neighbour = Neighbour::new()?;
    let beside = neighbour.load(web.port, "Hello")?;
    let load = web.load();
    for process in SERVICES {
        web.site.signal(process, Signal::KILL)?;
        until("traffic", Duration::from_secs(10), async || {
            fetch(web.address(), "/").await.map(drop).map_err(Into::into)
        })
        .await?;
    }
    web.settled(1).await?;

    web.site.kiln(&["down", "--keep-instances"])?;
    let before = load.requests();
    until("traffic with nothing of Kiln running", Duration::from_secs(30), async || {
        let more = load.requests() - before;
        if more > 1000 { Ok(()) } else { Err(format!("{more} requests").into()) }
    })
    .await?;
    web.site.kiln(&["up"])?;
    let fleet = web.settled(1).await?;
    assert!(fleet.instances.iter().all(|i| i.attempt <= 3), "the same instances: {:?}", fleet.instances);
    load.stop().await.unfailing(1000)?;
    beside.stop()?.unfailing(300)?;
    web.site.down()
}
