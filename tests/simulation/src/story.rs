//! A story: what people, repositories, archives and faults do to a site, until all is quiet; then the site has to come to
//! rest where it should.

use std::path::PathBuf;
use std::time::Duration;

use jiff::SignedDuration;
use kiln_api::builder::apply_request::Source;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::builder::{ApplyRequest, GitSource};
use kiln_api::deployer::deployer_service_client::DeployerServiceClient;
use kiln_api::deployer::{AbortRolloutRequest, GetFleetRequest, RollbackRequest};
use kiln_api::monitor::ReportSignalRequest;
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::types;
use kiln_model::event::Service;
use kiln_model::name::InstanceId;
use tonic::{Code, Status};

use crate::nature::Nature;
use crate::outside::{Definition, URL};
use crate::settled::unsettled;
use crate::site::Site;
use crate::world::{Faults, World};

/// Rollouts with bad releases, their deadlines and the waits between replacements: all of it is over by then.
const REST: Duration = Duration::from_secs(45 * 60);
/// It has to stay as it came to be.
const QUIET: Duration = Duration::from_secs(70);
/// A person's patience with one call.
const PATIENCE: Duration = Duration::from_secs(180);

/// Tells the story of a seed.
///
/// # Errors
/// What does not hold.
pub(crate) async fn tell(world: &World, folder: PathBuf) -> Result<(), Vec<String>> {
    let site = Site::new(world, folder);
    let story = Story { site: site.clone(), calls: 0, images: 0, runs: 0, former: Vec::new() };
    let told = go_on(story, world).await;
    site.directory.close();
    told
}

async fn go_on(mut story: Story, world: &World) -> Result<(), Vec<String>> {
    story.begin().await;
    let acts = world.between(1, 8);
    for _ in 0..acts {
        story.wait().await;
        story.act().await;
        if !world.broken().is_empty() {
            return Err(world.broken());
        }
    }
    story.wait().await;
    world.set_faults(Faults::default());
    world.tell("from here on nothing is disturbed");
    story.rest().await
}

struct Story {
    site: Site,
    calls: u64,
    images: u64,
    runs: u64,
    /// Definitions that were committed before.
    former: Vec<Definition>,
}

impl Story {
    fn world(&self) -> &World {
        &self.site.world
    }

    async fn begin(&mut self) {
        let world = self.world().clone();
        let faults = Faults::of(&world);
        let calm = world.chance(0.5);
        if !calm {
            world.set_faults(faults);
        }
        world.tell(format!("{faults:?}"));
        let replicas = world.between(1, 3);
        self.site.outside.publish(Nature::Good);
        let nature = self.good();
        let tested = world.chance(0.3);
        self.commit(Definition { image: 0, nature, run: 0, replicas, tested });
        self.apply().await;
        if calm {
            tokio::time::sleep(Duration::from_secs(60)).await;
            world.set_faults(faults);
        }
    }

    /// Short mostly, so that what happens happens at the same time.
    async fn wait(&self) {
        let most = *self.world().pick(&[500, 5_000, 20_000, 90_000]).unwrap();
        tokio::time::sleep(Duration::from_millis(self.world().between(0, most))).await;
    }

    fn good(&self) -> Nature {
        if self.world().chance(0.2) { Nature::Slow } else { Nature::Good }
    }

    fn any(&self) -> Nature {
        if self.world().chance(0.4) { *self.world().pick(&Nature::BAD).unwrap() } else { self.good() }
    }

    fn commit(&mut self, definition: Definition) {
        self.world().tell(format!("somebody commits: {definition}"));
        self.former.push(definition.clone());
        self.site.outside.commit(Some(definition));
    }

    async fn act(&mut self) {
        let world = self.world().clone();
        let now = self.former.last().cloned().unwrap();
        match world.between(0, 22) {
            0..=2 => {
                self.images += 1;
                let (image, nature) = (self.images, self.any());
                self.commit(Definition { image, nature, ..now });
            }
            3 => {
                self.runs += 1;
                let run = self.runs;
                self.commit(Definition { run, ..now });
            }
            4 => {
                (self.images, self.runs) = (self.images + 1, self.runs + 1);
                let (image, run, nature, replicas) =
                    (self.images, self.runs, self.any(), world.between(1, 3));
                self.commit(Definition { image, nature, run, replicas, ..now });
            }
            5 => {
                let former = world.pick(&self.former).cloned().unwrap();
                self.commit(former);
            }
            6 => {
                world.tell("somebody commits what can't be read");
                self.site.outside.commit(None);
            }
            7..=9 => {
                let nature =
                    if world.chance(0.3) { *world.pick(&Nature::BAD).unwrap() } else { Nature::Good };
                self.site.outside.publish(nature);
                let (version, _) = self.site.outside.packages();
                world.tell(format!("the archive has packages {version}: {}", nature.word()));
            }
            10 => self.roll_back().await,
            11 => self.abort().await,
            12 => self.report().await,
            13 => self.apply().await,
            14..=16 => self.strike_instance(),
            17 => self.kill(),
            18 => self.freeze(),
            19 => self.reboot(),
            20 => self.trouble_broker(),
            21 => self.trouble_outside(),
            _ => self.jump(),
        }
    }

    fn request_id(&mut self) -> String {
        self.calls += 1;
        format!("call-{}", self.calls)
    }

    async fn apply(&mut self) {
        let git = GitSource { url: URL.to_owned(), branch: "main".to_owned() };
        let (request_id, source) = (self.request_id(), Some(Source::Git(git)));
        let request = ApplyRequest { request_id, source };
        let client = BuilderServiceClient::new(self.site.channel(Service::Builder));
        self.insist("apply", || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.apply(request).await }
        })
        .await;
    }

    async fn roll_back(&mut self) {
        let Some(expected) = self.release().await else { return };
        self.site.invariants.excuse(expected);
        let (request_id, server) = (self.request_id(), "web".to_owned());
        let request = RollbackRequest {
            request_id,
            server,
            expected_release: expected,
            reason: "somebody said so".to_owned(),
            ..RollbackRequest::default()
        };
        let client = DeployerServiceClient::new(self.site.channel(Service::Deployer));
        self.insist(&format!("rollback from {expected}"), || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.rollback(request).await }
        })
        .await;
    }

    async fn abort(&mut self) {
        let Some(expected) = self.release().await else { return };
        self.site.invariants.excuse(expected);
        let (request_id, server) = (self.request_id(), "web".to_owned());
        let request = AbortRolloutRequest { request_id, server, expected_release: expected };
        let client = DeployerServiceClient::new(self.site.channel(Service::Deployer));
        self.insist("abort", || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.abort_rollout(request).await }
        })
        .await;
    }

    async fn report(&mut self) {
        let (request_id, server) = (self.request_id(), "web".to_owned());
        let request = ReportSignalRequest {
            id: request_id.clone(),
            request_id,
            server,
            reporter: "scanner".to_owned(),
            summary: "found something".to_owned(),
            remedy: types::Remedy::Rebuild.into(),
            ..ReportSignalRequest::default()
        };
        let client = MonitorServiceClient::new(self.site.channel(Service::Monitor));
        self.insist("report", || {
            let (mut client, request) = (client.clone(), request.clone());
            async move { client.report_signal(request).await }
        })
        .await;
    }

    /// What the fleet is on, or going to.
    async fn release(&self) -> Option<u64> {
        let mut client = DeployerServiceClient::new(self.site.channel(Service::Deployer));
        let request = GetFleetRequest { server: "web".to_owned() };
        let fleet = client.get_fleet(request).await.ok()?.into_inner().fleet?;
        let rollout = fleet.rollout.filter(|rollout| rollout.ended.is_none());
        Some(rollout.map_or(fleet.release, |rollout| rollout.to_release))
    }

    /// Makes a call until it is answered, one way or the other; each try is the same call. What was acknowledged is
    /// acknowledged again in the same words.
    async fn insist<T, F>(&self, what: &str, call: impl Fn() -> F)
    where
        T: std::fmt::Debug + PartialEq,
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let world = self.world();
        let give_up = world.elapsed() + PATIENCE;
        let answer = loop {
            match call().await {
                Ok(answer) => break answer.into_inner(),
                Err(status) => {
                    let passes = matches!(
                        status.code(),
                        Code::Unavailable
                            | Code::DeadlineExceeded
                            | Code::Aborted
                            | Code::Cancelled
                            | Code::Unknown
                            | Code::Internal
                    );
                    if !passes || world.elapsed() > give_up {
                        world.tell(format!("{what} is refused: {}", status.message()));
                        return;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(world.between(100, 3_000))).await;
        };
        world.tell(format!("{what} is acknowledged"));
        if let Ok(again) = call().await
            && again.get_ref() != &answer
        {
            world.wrong(16, format!("{what} was answered {answer:?}, and then {again:?}"));
        }
    }

    fn strike_instance(&self) {
        let world = self.world();
        let machine = self.site.invariants.machine.lock().unwrap();
        let now = tokio::time::Instant::now();
        let running = machine.instances.iter().filter(|(_, held)| held.is_fleet() && held.answers(now));
        let running: Vec<InstanceId> = running.map(|(id, _)| id.clone()).collect();
        drop(machine);
        let Some(id) = world.pick(&running) else { return };
        self.site.invariants.excuse(id.release);
        let strike = |change: &dyn Fn(&mut crate::nature::Course)| {
            let mut machine = self.site.invariants.machine.lock().unwrap();
            change(&mut machine.instances.get_mut(id).unwrap().course);
        };
        match world.between(0, 2) {
            0 => self.site.node.exit(id, 137),
            1 => {
                world.tell(format!("{id} hangs"));
                strike(&|course| course.hangs = true);
            }
            _ => {
                let period = Duration::from_millis(world.between(1_000, 20_000));
                world.tell(format!("{id} flaps, every {period:?}"));
                strike(&|course| course.flaps = Some(period));
            }
        }
    }

    fn kill(&self) {
        let service = *self.world().pick(&Service::ALL).unwrap();
        if let Some(life) = self.site.any_life(service) {
            life.kill("by SIGKILL");
        }
    }

    /// A process stands still; where it is not the node, another one takes its place meanwhile. Then it goes on.
    fn freeze(&self) {
        let site = self.site.clone();
        let world = self.world().clone();
        let service = *world.pick(&Service::ALL).unwrap();
        let Some(life) = site.any_life(service).filter(|life| !life.is_dead()) else { return };
        tokio::spawn(async move {
            life.freeze();
            if service != Service::Node && world.chance(0.7) {
                tokio::time::sleep(Duration::from_millis(world.between(0, 10_000))).await;
                if !life.is_dead() {
                    site.start(service, life.replica);
                }
            }
            tokio::time::sleep(Duration::from_millis(world.between(100, 90_000))).await;
            life.thaw();
            let replaced =
                site.life(service, life.replica).is_some_and(|newest| newest.name() != life.name());
            if replaced {
                tokio::time::sleep(Duration::from_millis(world.between(100, 30_000))).await;
                life.kill("since it was replaced");
            }
        });
    }

    /// The machine goes down with everything on it.
    fn reboot(&self) {
        self.world().tell("the machine goes down");
        for life in self.site.lives() {
            life.kill("with the machine");
        }
        let ids: Vec<InstanceId> =
            self.site.invariants.machine.lock().unwrap().instances.keys().cloned().collect();
        for id in ids {
            self.site.node.exit(&id, 137);
        }
    }

    fn trouble_broker(&self) {
        let world = self.world().clone();
        let broker = self.site.broker.clone();
        if world.chance(0.4) {
            world.tell("the broker's data is deleted");
            broker.wipe();
            return;
        }
        world.tell("the broker is away");
        broker.set_away(true);
        let away = Duration::from_millis(world.between(100, 120_000));
        tokio::spawn(async move {
            tokio::time::sleep(away).await;
            broker.set_away(false);
            world.tell("the broker is back");
        });
    }

    fn trouble_outside(&self) {
        let world = self.world().clone();
        let outside = self.site.outside.clone();
        let git = world.chance(0.5);
        let set = move |away| if git { outside.set_git_away(away) } else { outside.set_archive_away(away) };
        world.tell(if git { "the repository is away" } else { "the archive is away" });
        set(true);
        let away = Duration::from_millis(world.between(100, 90_000));
        tokio::spawn(async move {
            tokio::time::sleep(away).await;
            set(false);
            world.tell("repository and archive are there");
        });
    }

    fn jump(&self) {
        let seconds = i64::try_from(self.world().between(1, 30 * 3600)).unwrap();
        let by = if self.world().chance(0.5) { seconds } else { -seconds };
        self.world().tell(format!("the wall clock jumps by {by} s"));
        self.world().shift_wall(SignedDuration::from_secs(by));
    }

    /// Comes to rest, and stays there.
    async fn rest(&self) -> Result<(), Vec<String>> {
        let world = self.world();
        let give_up = world.elapsed() + REST;
        let mut quiet = Duration::ZERO;
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if !world.broken().is_empty() {
                return Err(world.broken());
            }
            match unsettled(&self.site).await {
                None => quiet += Duration::from_secs(1),
                Some(why) if world.elapsed() > give_up => {
                    return Err(vec![format!("it does not come to rest: {why}")]);
                }
                Some(_) => quiet = Duration::ZERO,
            }
            if quiet >= QUIET {
                return Ok(());
            }
        }
    }
}
