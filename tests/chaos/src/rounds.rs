//! Rounds: something is asked of the site, something happens to it, and it has to come to what was asked.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kiln_api::builder::{Build, BuildState, ListBuildsRequest};
use kiln_api::types::ListOptions;
use kiln_tests::Result;
use kiln_tests::load::fetch;
use kiln_tests::netns::Neighbour;
use kiln_tests::random::Random;
use kiln_tests::server::Web;
use kiln_tests::site::{Site, settled};
use kiln_tests::wait::until;

use crate::calls::{self, Calls, signals};
use crate::deck::Deck;
use crate::disk::Disk;
use crate::happening::{Happening, Kind};

/// From the end of what happened to the whole fleets, and to all else that must be.
const WHOLE: Duration = Duration::from_secs(120);
const REST: Duration = Duration::from_secs(60);

/// Of three instances and one, and four that are made ahead.
const NAMESPACES: usize = 8;

pub(crate) struct Rounds<'a> {
    web: Web,
    disk: &'a Disk,
    calls: Calls,
    random: Random,
    deck: Deck<'a, Kind>,
    neighbour: Neighbour,
    /// What the site has on the machine when nothing is under way.
    usual: BTreeMap<String, usize>,
    round: u64,
    release: u64,
    /// Of the signals that were there before.
    heard: BTreeSet<String>,
}

/// What a round does, all of it from the seed.
#[derive(Debug)]
struct Plan {
    happening: Happening,
    /// From the commit to what happens, on the way to the replaced fleet.
    after: Duration,
    /// From the commit to the calls.
    calls_after: Duration,
}

impl<'a> Rounds<'a> {
    /// Two servers that run, and what they have on the machine.
    ///
    /// # Errors
    /// What keeps them from running.
    pub(crate) async fn start(site: Site, disk: &'a Disk, kinds: &'a [Kind]) -> Result<Self> {
        let web = Web::start(site).await?;
        let calls = Calls::begin(&web.site).await?;
        until("the other server", WHOLE, async || {
            shows(&web.site, calls::SERVER, calls.address(), calls.page()).await
        })
        .await?;
        let usual = until("the node's spare namespaces", REST, async || {
            let kinds = kinds_of(&web.site)?;
            if kinds.get("netns") == Some(&NAMESPACES) { Ok(kinds) } else { Err(format!("{kinds:?}").into()) }
        })
        .await?;
        let neighbour = Neighbour::new()?;
        let (random, deck) = (Random::seeded(), Deck::of(kinds));
        let heard = BTreeSet::new();
        Ok(Self { web, disk, calls, random, deck, neighbour, usual, round: 0, release: 1, heard })
    }

    /// # Errors
    /// The first round that did not end well, with the seed and what it did.
    pub(crate) async fn play(mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let plan = self.plan()?;
            self.round += 1;
            let told = format!("{}, round {}: {plan:?}", self.random, self.round);
            let began = Instant::now();
            self.one(&plan).await.map_err(|error| format!("{told}: {error}"))?;
            println!("{told}: {:?}", began.elapsed());
        }
        self.web.site.down()
    }

    fn plan(&mut self) -> Result<Plan> {
        let random = &mut self.random;
        let kind = self.deck.deal(random).ok_or("there is no kind")?;
        let mut moment = || Duration::from_millis(random.below(6000));
        let (after, calls_after) = (moment(), moment());
        Ok(Plan { happening: Happening::of(kind, random), after, calls_after })
    }

    async fn one(&mut self, plan: &Plan) -> Result<()> {
        let Plan { happening, after, calls_after } = plan;
        let kept = happening.keep(&self.web.site).await?;
        let load = self.web.load();
        let beside = self.neighbour.load(self.web.port, "Hello")?;
        let said = format!("round {}", self.round);
        self.web.say(&said)?;

        let (site, disk, calls, round) = (&self.web.site, self.disk, &mut self.calls, self.round);
        let address = self.web.address();
        let happen = async {
            tokio::time::sleep(*after).await;
            if happening.comes_late() {
                until(&said, WHOLE, async || shows(site, "web", address, &said).await).await?;
            }
            happening.happen(site, disk, kept.as_ref()).await
        };
        if happening.forgets() {
            // What is acknowledged before a restore is forgotten with good reason.
            happen.await?;
            calls.make(site, round).await?;
        } else {
            let call = async {
                tokio::time::sleep(*calls_after).await;
                calls.make(site, round).await
            };
            tokio::try_join!(happen, call)?;
        }
        self.web_shows(&said, happening).await?;
        self.all_is_well(happening).await?;
        let (load, beside) = (load.stop().await, beside.stop()?);
        if !happening.ends_instances() {
            load.unfailing(500)?;
            beside.unfailing(300)?;
        }
        Ok(())
    }

    /// The release of the commit serves, and its number is the next one.
    async fn web_shows(&mut self, said: &str, happening: &Happening) -> Result<()> {
        let (site, address) = (&self.web.site, self.web.address());
        let (wanted, jumps) = (self.release + 1, happening.forgets_releases());
        let other = |release| format!("release {release} serves, wanted {wanted}");
        let release = until(said, WHOLE, async || {
            let release = shows(site, "web", address, said).await?;
            // A restored deployer takes the fleet of the copy for what runs, until it has heard from the node.
            if jumps && release < wanted {
                return Err(other(release).into());
            }
            Ok(release)
        })
        .await?;
        if release != wanted && !jumps {
            return Err(other(release).into());
        }
        self.release = release;
        let (address, page) = (self.calls.address(), self.calls.page());
        until(page, WHOLE, async || shows(site, calls::SERVER, address, page).await.map(drop)).await
    }

    async fn all_is_well(&mut self, happening: &Happening) -> Result<()> {
        let (site, calls, usual) = (&self.web.site, &self.calls, &self.usual);
        // The victim may be on its way up still.
        until("one build for each cause, and nothing but the fleets", REST, async || {
            calls.are_remembered(site).await?;
            one_for_each(&builds(site).await?, happening)?;
            let kinds = kinds_of(site)?;
            if kinds == *usual { Ok(()) } else { Err(format!("{kinds:?}, usual is {usual:?}").into()) }
        })
        .await?;
        // Nothing happened to an instance: a service that came back must not think so.
        let all = signals(site).await?;
        let is_wrong = |cause: &str| ["gone", "unhealthy"].contains(&cause) && !happening.ends_instances();
        let news = all.iter().filter(|signal| !self.heard.contains(&signal.id));
        let wrong: Vec<_> = news.filter(|signal| is_wrong(&signal.cause)).collect();
        if !wrong.is_empty() {
            return Err(format!("{wrong:?}").into());
        }
        self.heard = all.into_iter().map(|signal| signal.id).collect();
        Ok(())
    }
}

/// Gives the release that a fleet runs, whole and with a page.
async fn shows(site: &Site, server: &str, address: SocketAddr, page: &str) -> Result<u64> {
    let fleet = site.fleet(server).await?;
    settled(&fleet, fleet.release)?;
    let shown = fetch(address, "/").await?;
    if shown.contains(&format!("<h1>Hello {page}</h1>")) {
        return Ok(fleet.release);
    }
    Err(format!("release {} shows {shown}; {}", fleet.release, fleet.problem).into())
}

async fn builds(site: &Site) -> Result<Vec<Build>> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let options = Some(ListOptions { page_token, ..ListOptions::default() });
        let answer = site.builder().list_builds(ListBuildsRequest { options, server: String::new() }).await?;
        let answer = answer.into_inner();
        all.extend(answer.builds);
        page_token = answer.info.map(|info| info.next_page_token).unwrap_or_default();
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

/// Each definition is a cause of its own here: it was built once.
fn one_for_each(builds: &[Build], happening: &Happening) -> Result<()> {
    let (succeeded, others): (Vec<_>, Vec<_>) =
        builds.iter().partition(|build| build.state() == BuildState::Succeeded);
    let causes: BTreeSet<_> = succeeded.iter().map(|build| &build.definition_digest).collect();
    if causes.len() != succeeded.len() {
        return Err(format!("built more than once: {succeeded:?}").into());
    }
    let unfinished = others.iter().any(|build| build.state() != BuildState::Failed);
    if unfinished || (!others.is_empty() && !happening.fails_builds()) {
        return Err(format!("{others:?}").into());
    }
    Ok(())
}

/// How many of each kind of thing the node has on the machine: cgroups, mounts, namespaces, leases and so on.
///
/// # Errors
/// Where there is anything of a build: one is under way, or left something.
fn kinds_of(site: &Site) -> Result<BTreeMap<String, usize>> {
    // The builder carries the mark of what it starts.
    let itself = format!("process: {} ", site.pid("builder")?);
    let mut of_builds = site.made_by("kiln-builder")?;
    of_builds.retain(|line| !line.starts_with(&itself));
    if !of_builds.is_empty() {
        return Err(format!("of builds there is {of_builds:?}").into());
    }
    let mut kinds = BTreeMap::new();
    for thing in site.made_by("kiln-node")? {
        let kind = thing.split([':', ' ']).next().unwrap_or_default();
        // An instance's workers come and go.
        if kind != "process" {
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
    }
    Ok(kinds)
}
