//! A second machine of a site, as far as one machine can be two: a builder, a deployer and a monitor with a folder of
//! their own, and with the keys, the database, the broker, the images and the definitions of the first one. Each service of either is
//! called at both places, over TCP.
//!
//! Nothing starts again by itself what was killed here: the first one's supervisor is held where that matters.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kiln_api::builder::ListBuildsRequest;
use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::deployer::deployer_service_client::DeployerServiceClient;
use kiln_api::deployer::{Fleet, GetFleetRequest, ListRolloutsRequest, Rollout};
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_builder_core::build::{self, Build};
use kiln_model::event::Service;
use kiln_model::name::BuildId;
use kiln_service::client::{Channel, channel, own_address};
use kiln_service::config;
use kiln_service::members;
use kiln_store::{Document, Place, SqlStore, Store as _, decode};
use kiln_test_postgres::Server as Postgres;
use rustix::process::{Pid, Signal, kill_process};

use crate::command::{binary, run};
use crate::free_port;
use crate::site::{Site, folder, settled};
use crate::wait::until;
use crate::{Error, Result};

/// What there is two of.
pub const DOUBLE: [Service; 3] = [Service::Builder, Service::Deployer, Service::Monitor];

const COMES_UP: Duration = Duration::from_secs(60);

/// One of the two processes of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replica {
    First,
    Second,
}

impl Replica {
    pub const fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }
}

/// The processes of the second machine are killed when this value goes.
pub struct Second {
    first: PathBuf,
    home: tempfile::TempDir,
    running: Vec<(Service, Child)>,
    /// What the services of both keep.
    stores: BTreeMap<Service, SqlStore>,
}

impl Site {
    /// A site on PostgreSQL whose builder, deployer and monitor run twice, each on TCP ports of its own.
    ///
    /// # Errors
    /// What `kiln up` said, or a service of the second machine.
    pub async fn up_double(name: &str) -> Result<(Self, Second)> {
        let mut settings = Vec::new();
        let mut listen_of_second = Vec::new();
        for service in DOUBLE {
            let [first, second] = [free_port()?, free_port()?].map(|port| format!("127.0.0.1:{port}"));
            settings.push(format!("peers.{service}=https://{first},https://{second}"));
            settings.push(format!("listen.{service}={first}"));
            listen_of_second.push((service, second));
        }
        let node = format!("127.0.0.1:{}", free_port()?);
        settings.push(format!("listen.node={node}"));
        let settings: Vec<_> = settings.iter().map(String::as_str).collect();
        let (site, mut arguments) = Self::prepare(name, &settings, folder(), Some(Postgres::start(&[])?))?;
        arguments.push("--no-start".to_owned());
        site.kiln(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let mut second = Second::of(&site, name, listen_of_second, &node)?;
        // A builder that starts ends what one before it left on this machine, by the site's mark: the other one would be
        // taken for that, were it there.
        second.start(Service::Builder)?;
        until("the second builder", COMES_UP, async || {
            let request = ListBuildsRequest::default();
            Ok(second.builder(Replica::Second).list_builds(request).await.map(drop)?)
        })
        .await?;
        site.kiln(&["up"])?;
        second.start(Service::Deployer)?;
        second.start(Service::Monitor)?;
        for service in DOUBLE {
            let store = second.store(service).await?;
            second.stores.insert(service, store);
            until("the members", COMES_UP, async || {
                let there = second.members(service).await?;
                if there.len() == 2 { Ok(()) } else { Err(format!("{there:?}").into()) }
            })
            .await?;
        }
        Ok((site, second))
    }
}

impl Second {
    /// Made as the runbook says.
    fn of(site: &Site, name: &str, listen: Vec<(Service, String)>, node: &str) -> Result<Self> {
        let home = tempfile::Builder::new()
            .prefix("kiln-second-")
            .tempdir_in(site.home().parent().ok_or("the site's folder is below another one")?)?;
        let text = std::fs::read_to_string(site.home().join("site.toml"))?;
        let mut file = config::SiteFile::parse(&text)?;
        file.metrics.clear();
        file.listen = listen.into_iter().collect();
        file.peers.insert(Service::Node, format!("https://{node}"));
        std::fs::write(home.path().join("site.toml"), file.to_text()?)?;
        run(Command::new("cp").arg("-r").arg(site.home().join("keys")).arg(home.path()))?;
        std::fs::create_dir(home.path().join("builder"))?;
        for shared in ["images", "builder/contexts", "builder/files", "builder/snapshots"] {
            std::fs::create_dir_all(site.home().join(shared))?;
            std::os::unix::fs::symlink(site.home().join(shared), home.path().join(shared))?;
        }
        let second =
            Self { first: site.home().to_owned(), home, running: Vec::new(), stores: BTreeMap::new() };
        let mut kiln = Command::new(binary("kiln")?);
        kiln.arg("--home").arg(second.home.path()).args(["--site", name]);
        run(kiln.args(["up", "--no-start", "--nats-url", &file.nats.url]))?;
        Ok(second)
    }

    fn start(&mut self, service: Service) -> Result<()> {
        let log = File::create(self.home.path().join(format!("logs/{service}.log")))?;
        let child = Command::new(binary(&format!("kiln-{service}"))?)
            .arg("--home")
            .arg(self.home.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.running.push((service, child));
        Ok(())
    }

    fn home(&self, replica: Replica) -> &Path {
        match replica {
            Replica::First => &self.first,
            Replica::Second => self.home.path(),
        }
    }

    fn channel(&self, replica: Replica, service: Service) -> Channel {
        channel(&self.home(replica).join(format!("run/{service}.sock")))
    }

    pub fn builder(&self, replica: Replica) -> BuilderServiceClient<Channel> {
        BuilderServiceClient::new(self.channel(replica, Service::Builder))
    }

    pub fn deployer(&self, replica: Replica) -> DeployerServiceClient<Channel> {
        DeployerServiceClient::new(self.channel(replica, Service::Deployer))
    }

    pub fn monitor(&self, replica: Replica) -> MonitorServiceClient<Channel> {
        MonitorServiceClient::new(self.channel(replica, Service::Monitor))
    }

    /// Sends a signal to one of the two processes of a service.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn signal(&self, replica: Replica, service: Service, signal: Signal) -> Result<()> {
        let path = self.home(replica).join(format!("run/{service}.pid"));
        let pid: i32 = std::fs::read_to_string(path)?.trim().parse()?;
        kill_process(Pid::from_raw(pid).ok_or("no process id")?, signal)?;
        Ok(())
    }

    async fn store(&self, service: Service) -> Result<SqlStore> {
        let Place::Postgres(mut database) = config::Site::load(&self.first)?.store_of(service)? else {
            return Err("the state is in files".into());
        };
        database.seen = self.home.path().join(format!("{service}.seen"));
        Ok(SqlStore::open(&Place::Postgres(database)).await?)
    }

    /// Which of the two is which in the store: the ids of those that are there.
    async fn members(&self, service: Service) -> Result<Vec<(Replica, String)>> {
        let mut found = Vec::new();
        let store = self.stores.get(&service).ok_or("its store is not open")?;
        let documents = store.list(members::KIND, "", None, 100).await?;
        for replica in [Replica::First, Replica::Second] {
            let address = own_address(&config::Site::load(self.home(replica))?, service);
            let is_its = |document: &&Document| document.body["address"] == address;
            found.extend(documents.iter().filter(is_its).map(|document| (replica, document.id.clone())));
        }
        Ok(found)
    }

    /// Whose a piece of work is, with both there.
    ///
    /// # Errors
    /// Where the store can't be read, or they are not both there.
    pub async fn owner(&self, service: Service, work: &str) -> Result<Replica> {
        let there = self.members(service).await?;
        let [_, _] = there[..] else { return Err(format!("not two: {there:?}").into()) };
        let owner = members::owner(there.iter().map(|(_, id)| id.as_str()), work);
        let found = there.iter().find(|(_, id)| Some(id.as_str()) == owner);
        Ok(found.ok_or("nobody's")?.0)
    }

    /// The build that runs, and whose it is.
    ///
    /// # Errors
    /// Where none does.
    pub async fn building(&self) -> Result<(Replica, Build)> {
        let store = self.stores.get(&Service::Builder).ok_or("its store is not open")?;
        let there = self.members(Service::Builder).await?;
        for document in store.list(build::KIND, "", None, 500).await? {
            let build: Build = decode(&document, build::SCHEMA)?;
            if let build::State::Running { lease } = &build.state {
                let of =
                    there.iter().find(|(_, member)| *member == lease.owner).ok_or("its builder is gone")?;
                return Ok((of.0, build));
            }
        }
        Err("nothing is built".into())
    }

    /// # Errors
    /// Where there is none of this id.
    pub async fn build(&self, id: &BuildId) -> Result<Build> {
        let store = self.stores.get(&Service::Builder).ok_or("its store is not open")?;
        let document = store.get(build::KIND, &id.to_string()).await?.ok_or("there is no such build")?;
        Ok(decode(&document, build::SCHEMA)?)
    }

    /// A fleet as one of the deployers has it.
    ///
    /// # Errors
    /// Where it is away, or knows none.
    pub async fn fleet(&self, replica: Replica, server: &str) -> Result<Fleet> {
        let request = GetFleetRequest { server: server.to_owned() };
        let answer = self.deployer(replica).get_fleet(request).await?.into_inner();
        answer.fleet.ok_or_else(|| format!("{server} has no fleet").into())
    }

    /// As [`Site::settled`], asked of one of the deployers.
    ///
    /// # Errors
    /// When the bound is over, with what is missing.
    pub async fn settled(
        &self,
        replica: Replica,
        server: &str,
        release: u64,
        bound: Duration,
    ) -> Result<Fleet> {
        until(&format!("{server} to settle on release {release}"), bound, async || {
            let fleet = self.fleet(replica, server).await?;
            settled(&fleet, release)?;
            Ok(fleet)
        })
        .await
    }

    /// Every rollout of a server, as one of the deployers has them.
    ///
    /// # Errors
    /// Where it is away.
    pub async fn rollouts(&self, replica: Replica, server: &str) -> Result<Vec<Rollout>> {
        let request = ListRolloutsRequest { server: server.to_owned(), ..Default::default() };
        Ok(self.deployer(replica).list_rollouts(request).await?.into_inner().rollouts)
    }

    /// Ends what runs of the second machine, in order, and lets the first one's supervisor go on where it was held.
    ///
    /// # Errors
    /// Where one ends badly.
    pub fn stop(mut self, site: &Site) -> Result<()> {
        site.signal("supervisor", Signal::CONT)?;
        for (service, mut child) in std::mem::take(&mut self.running) {
            if child.try_wait()?.is_some() {
                continue;
            }
            let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
            kill_process(pid.ok_or("no process id")?, Signal::TERM).map_err(Error::from)?;
            let status = child.wait()?;
            if !status.success() {
                return Err(format!("the second {service} ended with {status}").into());
            }
        }
        Ok(())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        for (_, child) in &mut self.running {
            // One that is gone already is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
        // The test failed: what they wrote may say why.
        if let Some(keep) = std::env::var_os("KILN_TEST_KEEP_LOGS").filter(|_| !self.running.is_empty()) {
            let to = PathBuf::from(keep).with_extension("second");
            let _ = Command::new("cp").arg("-rT").arg(self.home.path()).arg(to).status();
        }
    }
}
