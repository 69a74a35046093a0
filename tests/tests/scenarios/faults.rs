//! Services are killed, stopped and taken away at any moment: traffic flows, work goes on, nothing is left over.

use std::collections::BTreeMap;
use std::time::Duration;

use kiln_api::builder::{BuildState, ListBuildsRequest};
use kiln_api::monitor::ListSignalsRequest;
use kiln_tests::Result;
use kiln_tests::load::{Load, fetch};
use kiln_tests::netns::{Neighbour, NeighbourLoad};
use kiln_tests::random::Random;
use kiln_tests::server::Web;
use kiln_tests::site::{Site, full};
use kiln_tests::wait::until;
use rustix::process::{Pid, Signal, kill_process};

const SERVICES: [&str; 4] = ["builder", "deployer", "monitor", "node"];

#[tokio::test(flavor = "multi_thread")]
async fn traffic_flows_while_everything_of_kiln_is_down() -> Result<()> {
    let web = Web::start(Site::up("down")?).await?;
    let neighbour = Neighbour::new(2)?;
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

/// SIGKILL of each service, and of the broker, at a random moment of the way from a commit to the replaced fleet.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_killed_at_any_moment_goes_on_where_it_was() -> Result<()> {
    let mut rounds = Rounds::start(Site::up("kills")?, 3).await?;
    rounds
        .each_in_turn(if full() { 50 } else { 5 }, "killed", async |web, victim| {
            web.site.signal(victim, Signal::KILL)
        })
        .await?;
    rounds.stop().await
}

/// With the state in PostgreSQL, whose server is a victim as well.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_killed_on_postgresql_goes_on_where_it_was() -> Result<()> {
    let mut rounds = Rounds::start(Site::up_on_postgres("pgkills")?, 7).await?;
    for _ in 0..if full() { 10 } else { 1 } {
        rounds.each_in_turn(2, "killed", async |web, victim| web.site.signal(victim, Signal::KILL)).await?;
        // Longer than a service waits for a connection.
        rounds
            .round("the database killed", async |web| web.site.kill_database(Duration::from_secs(6)))
            .await?;
    }
    rounds.stop().await
}

/// One that stands still is not dead: it wakes up with its timers over, its calls given up and its leases lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_frozen_for_a_while_does_no_harm_when_it_wakes() -> Result<()> {
    let (frozen, count) = if full() { (Duration::from_secs(60), 20) } else { (Duration::from_secs(8), 3) };
    let mut rounds = Rounds::start(Site::up("frozen")?, 5).await?;
    rounds
        .each_in_turn(count, "frozen", async |web, victim| {
            web.site.signal(victim, Signal::STOP)?;
            tokio::time::sleep(frozen).await;
            web.site.signal(victim, Signal::CONT)
        })
        .await?;
    rounds.stop().await
}

/// The broker's data are gone from one moment to the next: events are hints, and the stores know what is to be done.
#[tokio::test(flavor = "multi_thread")]
async fn with_the_brokers_data_deleted_all_work_is_found_again() -> Result<()> {
    let count: u64 = if full() { 10 } else { 2 };
    let mut rounds = Rounds::start(Site::up("wiped")?, 6).await?;
    for round in 1..=count {
        rounds
            .round("the broker's data deleted", async |web| {
                // At once, as it makes and removes files itself; it writes on into what it has open, until it is killed.
                let nats = web.site.home().join("nats");
                // One that ended often in a short time is not started again at once.
                until("the broker's data", Duration::from_secs(30), async || {
                    std::fs::rename(nats.join("jetstream"), nats.join(format!("deleted-{round}")))
                        .map_err(Into::into)
                })
                .await?;
                web.site.signal("nats", Signal::KILL)
            })
            .await?;
    }
    rounds.stop().await
}

/// Everything that runs is killed at once, the instances and what holds them too, as when a machine goes down.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_killed_all_at_once_is_there_again_after_up() -> Result<()> {
    let web = Web::start(Site::up("reboot")?).await?;
    let mut random = Random::seeded();
    let rounds: u64 = if full() { 10 } else { 2 };
    for release in 2..2 + rounds {
        let delay = moment(&mut random);
        let told = |error| format!("{random}: all killed after {delay:?}: {error}");
        let said = format!("release {release}");
        web.say(&said)?;
        tokio::time::sleep(delay).await;
        // First the one that would start the others again.
        for process in ["supervisor"].iter().chain(&VICTIMS) {
            web.site.signal(process, Signal::KILL)?;
        }
        until("the end of every process", Duration::from_secs(30), async || {
            let left: Vec<_> = processes(&web.site)?;
            for pid in &left {
                // It may end by itself meanwhile.
                let _ = kill_process(*pid, Signal::KILL);
            }
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}").into()) }
        })
        .await?;
        web.site.kiln(&["up"]).map_err(&told)?;
        web.site.settled("web", release, Duration::from_secs(90)).await.map_err(told)?;
        // A deployer that was killed when all was well says so until it has asked the node.
        until("the new page", Duration::from_secs(30), async || {
            let page = fetch(web.address(), "/").await?;
            if page.contains(&format!("Hello {said}")) { Ok(()) } else { Err(page.into()) }
        })
        .await
        .map_err(told)?;
        web.site.settled("web", release, Duration::from_secs(90)).await.map_err(told)?;
        let builds = web.site.builder().list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
        assert_eq!(builds.len() as u64, release, "{random}: one for each cause: {builds:?}");
    }
    web.site.down()
}

fn processes(site: &Site) -> Result<Vec<Pid>> {
    let lines = site.on_machine()?;
    let pids =
        lines.iter().filter_map(|line| line.strip_prefix("process: ")?.split(' ').next()?.parse().ok());
    Ok(pids.filter_map(Pid::from_raw).collect())
}

/// On the way from a commit to the replaced fleet.
fn moment(random: &mut Random) -> Duration {
    Duration::from_millis(random.below(6000))
}

/// In their turn, so that few rounds meet all of them.
const VICTIMS: [&str; 5] = ["builder", "deployer", "monitor", "node", "nats"];

/// Commits under load, with something that happens on the way of each, and what must hold after it.
struct Rounds {
    web: Web,
    load: Load,
    beside: NeighbourLoad,
    random: Random,
    /// What the site has on the machine when nothing is under way.
    usual: BTreeMap<String, usize>,
    release: u64,
    _neighbour: Neighbour,
}

impl Rounds {
    async fn start(site: Site, neighbour: u8) -> Result<Self> {
        let web = Web::start(site).await?;
        let usual = until("the node's spare namespaces", Duration::from_secs(30), async || {
            let kinds = kinds(&web.site)?;
            if kinds.get("netns") > Some(&3) { Ok(kinds) } else { Err(format!("{kinds:?}").into()) }
        })
        .await?;
        let neighbour = Neighbour::new(neighbour)?;
        let beside = neighbour.load(web.port, "Hello")?;
        let load = web.load();
        Ok(Self { web, load, beside, random: Random::seeded(), usual, release: 1, _neighbour: neighbour })
    }

    /// The same happens to each of the victims in its turn.
    async fn each_in_turn(
        &mut self,
        count: u64,
        done: &str,
        happens: impl AsyncFn(&Web, &'static str) -> Result<()>,
    ) -> Result<()> {
        let first = self.random.below(VICTIMS.len() as u64);
        for round in 1..=count {
            let victim = VICTIMS[usize::try_from((first + round) % VICTIMS.len() as u64)?];
            self.round(&format!("{victim} {done}"), async |web| happens(web, victim).await).await?;
        }
        Ok(())
    }

    /// A commit, what happens on its way, and what must hold after both.
    async fn round(&mut self, what: &str, happens: impl AsyncFnOnce(&Web) -> Result<()>) -> Result<()> {
        let delay = moment(&mut self.random);
        let (web, random) = (&self.web, &self.random);
        let what = format!("{what} after {delay:?}");
        let said = format!("round {}", self.release);
        self.release += 1;
        let release = self.release;
        let told = |error| format!("{said}, {random}: {what}: {error}");
        web.say(&said)?;
        tokio::time::sleep(delay).await;
        happens(web).await.map_err(told)?;
        web.site.settled("web", release, Duration::from_secs(90)).await.map_err(told)?;
        assert!(fetch(web.address(), "/").await?.contains(&format!("Hello {said}")), "{said}: {what}");
        // The victim may be on its way up still.
        until("one build for each cause, and nothing but the fleet", Duration::from_secs(30), async || {
            let builds =
                web.site.builder().list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
            let succeeded = builds.iter().filter(|build| build.state() == BuildState::Succeeded).count();
            if u64::try_from(succeeded)? != release || builds.len() != succeeded {
                return Err(format!("{builds:?}").into());
            }
            let kinds = kinds(&web.site)?;
            if kinds == self.usual {
                Ok(())
            } else {
                Err(format!("{kinds:?}, usual is {:?}", self.usual).into())
            }
        })
        .await
        .map_err(told)?;
        // Nothing happened to an instance: a service that came back must not think so.
        let signals = web.site.monitor().list_signals(ListSignalsRequest::default()).await;
        let signals = signals.map_or_else(|_| Vec::new(), |answer| answer.into_inner().signals);
        let wrong: Vec<_> =
            signals.iter().filter(|s| ["gone", "unhealthy"].contains(&s.cause.as_str())).collect();
        assert!(wrong.is_empty(), "{said}, {random}: {what}: {wrong:?}");
        Ok(())
    }

    async fn stop(self) -> Result<()> {
        self.load.stop().await.unfailing(1000)?;
        self.beside.stop()?.unfailing(1000)?;
        self.web.site.down()
    }
}

/// How many of each kind of thing the site has on the machine: cgroups, mounts, namespaces, leases and so on.
fn kinds(site: &Site) -> Result<BTreeMap<String, usize>> {
    let mut kinds = BTreeMap::new();
    for thing in site.on_machine()? {
        let kind = thing.split([':', ' ']).next().unwrap_or_default();
        // An instance's workers come and go.
        if kind != "process" {
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
    }
    Ok(kinds)
}
