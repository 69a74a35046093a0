//! A real site on this machine: `kiln up` in a folder of its own, reached by the command line and by gRPC.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::time::Duration;

use kiln_api::builder::builder_service_client::BuilderServiceClient;
use kiln_api::builder::{Build, BuildState, ListBuildsRequest};
use kiln_api::deployer::deployer_service_client::DeployerServiceClient;
use kiln_api::deployer::{Fleet, GetFleetRequest, InstanceState};
use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::types::HealthState;
use kiln_model::event::Service;
use kiln_service::client::{Channel, channel};
use kiln_test_postgres::Server as Postgres;

use crate::cluster::Cluster;
use crate::command::{binary, both, run};
use crate::wait::until;
use crate::{Error, Result};

/// Settings of `site.toml` that make waits short; what the tests measure is not in here. Archives are real ones, which
/// can publish an update in the middle of a test that counts builds, and asking them takes a second of a core.
const QUICK: [&str; 3] = ["poll.git=600ms", "poll.archive=1h", "poll.resync=5s"];

/// On a PostgreSQL server of a site's own.
pub(crate) const DATABASE: &str = "kiln";

/// A site that is taken down when this value goes, also after a failed test.
pub struct Site {
    home: tempfile::TempDir,
    name: String,
    down: bool,
    /// Of the site alone. Goes after it.
    database: Option<Mutex<Postgres>>,
    /// The folder of Kiln's programs; none for those that were built with this test.
    programs: Option<PathBuf>,
}

impl Site {
    /// Starts a site whose package store and layer cache are shared with the other tests.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up(name: &str) -> Result<Self> {
        Self::up_with(name, &[])
    }

    /// As [`Site::up`], with more settings of `site.toml`, as in `builder.workers=2`.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_with(name: &str, settings: &[&str]) -> Result<Self> {
        match std::env::var("KILN_TEST_STORE").as_deref() {
            Ok("postgres") => Self::start(name, settings, folder(), Some(Postgres::start(&[])?)),
            Ok(other) => Err(format!("KILN_TEST_STORE is `{other}`: there is postgres").into()),
            Err(_) => Self::start(name, settings, folder(), None),
        }
    }

    /// As [`Site::up`], with the home below a folder, and the state in files whatever `KILN_TEST_STORE` says.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_in(name: &str, folder: &Path) -> Result<Self> {
        Self::start(name, &[], Some(folder.to_owned()), None)
    }

    /// As [`Site::up_on_files`], with the programs of a folder.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_from(programs: &Path, name: &str) -> Result<Self> {
        Self::start_from(programs, name, None)
    }

    /// As [`Site::up_on_postgres`], with the programs of a folder.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_from_on_postgres(programs: &Path, name: &str) -> Result<Self> {
        Self::start_from(programs, name, Some(Postgres::start(&[])?))
    }

    fn start_from(programs: &Path, name: &str, database: Option<Postgres>) -> Result<Self> {
        let (mut site, arguments) = Self::prepare(name, &[], folder(), database)?;
        site.programs = Some(programs.to_owned());
        site.kiln(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(site)
    }

    /// As [`Site::up`], with the services' state in files whatever the others have.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_on_files(name: &str) -> Result<Self> {
        Self::start(name, &[], folder(), None)
    }

    /// As [`Site::up`], with the services' state in a PostgreSQL server of the site's own.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_on_postgres(name: &str) -> Result<Self> {
        Self::start(name, &[], folder(), Some(Postgres::start(&[])?))
    }

    /// As [`Site::up_on_postgres`], on a server that lets nobody in without this password, which a setting must name.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_on_postgres_asking(name: &str, password: &str, settings: &[&str]) -> Result<Self> {
        let database = Postgres::start(&[])?;
        database.database(DATABASE)?;
        database.ask_for_password(DATABASE, password)?;
        Self::start(name, settings, folder(), Some(database))
    }

    /// Where the site's PostgreSQL server keeps its data.
    ///
    /// # Errors
    /// Where there is none.
    pub fn database_folder(&self) -> Result<PathBuf> {
        let database = self.database.as_ref().ok_or("the site has no database")?;
        Ok(database.lock().map_err(|_| "another thread broke off there")?.data())
    }

    /// As [`Site::up_on_postgres`], with the home below a folder.
    ///
    /// # Errors
    /// What `kiln up` said.
    pub fn up_on_postgres_in(name: &str, folder: &Path) -> Result<Self> {
        Self::start(name, &[], Some(folder.to_owned()), Some(Postgres::start(&[])?))
    }

    /// As [`Site::up`], with its events on a cluster of three brokers, three copies of each.
    ///
    /// # Errors
    /// What `kiln up` said, or a server of the cluster.
    pub fn up_on_cluster(name: &str) -> Result<(Self, Cluster)> {
        let mut cluster = Cluster::new()?;
        let (site, mut arguments) = Self::prepare(name, &["nats.replicas=3"], folder(), None)?;
        let urls = cluster.urls();
        arguments.extend(["--nats-url", &urls, "--no-start"].map(str::to_owned));
        site.kiln(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        let home = site.home.path();
        let identity = home.join("nats/server.pem");
        let out = identity.display().to_string();
        site.kiln(&["pki", "issue", "broker", "--host", "127.0.0.1", "--out", &out])?;
        cluster.start(&home.join("nats/users.conf"), identity, home.join("keys/pki/authority.pem"))?;
        site.kiln(&["up"])?;
        Ok((site, cluster))
    }

    fn start(
        name: &str,
        settings: &[&str],
        folder: Option<PathBuf>,
        database: Option<Postgres>,
    ) -> Result<Self> {
        let (site, arguments) = Self::prepare(name, settings, folder, database)?;
        site.kiln(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        Ok(site)
    }

    /// A site, and how `kiln` is called to make and start it.
    pub(crate) fn prepare(
        name: &str,
        settings: &[&str],
        folder: Option<PathBuf>,
        database: Option<Postgres>,
    ) -> Result<(Self, Vec<String>)> {
        let cache = cache_folder()?;
        let mut home = tempfile::Builder::new();
        home.prefix("kiln-");
        let home = match folder {
            Some(folder) => home.tempdir_in(folder)?,
            None => home.tempdir()?,
        };
        let mut arguments = vec!["up".to_owned()];
        if let Some(database) = &database {
            arguments.extend(["--store".to_owned(), database.database(DATABASE)?]);
        }
        let database = database.map(Mutex::new);
        let site = Self { home, name: name.to_owned(), down: false, database, programs: None };
        let shared = [
            format!("builder.packages={}", cache.join("packages").display()),
            format!("builder.layers={}", cache.join("layers").display()),
        ];
        let all = QUICK.iter().map(|text| (*text).to_owned()).chain(shared);
        for setting in all.chain(settings.iter().map(|text| (*text).to_owned())) {
            arguments.extend(["--config".to_owned(), setting]);
        }
        Ok((site, arguments))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    fn program(&self, name: &str) -> Result<PathBuf> {
        self.programs.as_ref().map_or_else(|| binary(name), |folder| Ok(folder.join(name)))
    }

    /// Runs `kiln` on this site, whatever comes of it.
    ///
    /// # Errors
    /// Where it can't be started.
    pub fn try_kiln(&self, arguments: &[&str]) -> Result<Output> {
        let mut kiln = Command::new(self.program("kiln")?);
        kiln.arg("--home").arg(self.home.path()).args(["--site", &self.name]).args(arguments);
        Ok(kiln.output()?)
    }

    /// Runs `kiln` on this site, and gives what it printed.
    ///
    /// # Errors
    /// Where its exit status is not 0, with everything that it printed.
    pub fn kiln(&self, arguments: &[&str]) -> Result<String> {
        let output = self.try_kiln(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(format!("kiln {} ended with {}:\n{}", arguments.join(" "), output.status, both(&output)).into())
    }

    /// Runs `kiln -o json`.
    ///
    /// # Errors
    /// Where it fails, or prints something else.
    pub fn json(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let mut all = vec!["-o", "json"];
        all.extend(arguments);
        let text = self.kiln(&all)?;
        serde_json::from_str(&text).map_err(|error| format!("{error} in:\n{text}").into())
    }

    /// Runs `kiln -o json` where it prints a document a line.
    ///
    /// # Errors
    /// Where it fails, or a line is none.
    pub fn lines(&self, arguments: &[&str]) -> Result<Vec<serde_json::Value>> {
        let text = self.kiln(&[&["-o", "json"], arguments].concat())?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Whether the broker has the end of a rollout, by a connection that is made for the question.
    ///
    /// # Errors
    /// Where it has not, or can't be asked.
    pub fn heard(&self, release: u64) -> Result<()> {
        let is_it = |event: &serde_json::Value| {
            event["type"] == "kiln.deployer.rollout.succeeded.v1"
                && event["data"]["rollout"]["to_release"] == release
        };
        let events = self.lines(&["events", "--since", "1h"])?;
        if events.iter().any(is_it) { Ok(()) } else { Err("there is none".into()) }
    }

    fn channel(&self, service: Service) -> Channel {
        channel(&self.home.path().join(format!("run/{service}.sock")))
    }

    pub fn builder(&self) -> BuilderServiceClient<Channel> {
        BuilderServiceClient::new(self.channel(Service::Builder))
    }

    pub fn deployer(&self) -> DeployerServiceClient<Channel> {
        DeployerServiceClient::new(self.channel(Service::Deployer))
    }

    pub fn monitor(&self) -> MonitorServiceClient<Channel> {
        MonitorServiceClient::new(self.channel(Service::Monitor))
    }

    pub fn engine(&self) -> EngineServiceClient<Channel> {
        EngineServiceClient::new(self.channel(Service::Node))
    }

    /// The fleet of a server as it is.
    ///
    /// # Errors
    /// Where there is none, or the deployer is away.
    pub async fn fleet(&self, server: &str) -> Result<Fleet> {
        let request = GetFleetRequest { server: server.to_owned() };
        let answer = self.deployer().get_fleet(request).await?.into_inner();
        answer.fleet.ok_or_else(|| format!("{server} has no fleet").into())
    }

    /// Waits until a fleet is whole: on `release`, each replica healthy and on the edge, nothing else left, no rollout
    /// under way.
    ///
    /// # Errors
    /// When the bound is over, with what is missing.
    pub async fn settled(&self, server: &str, release: u64, bound: Duration) -> Result<Fleet> {
        let what = format!("{server} to settle on release {release}");
        until(&what, bound, async || {
            let fleet = self.fleet(server).await?;
            settled(&fleet, release)?;
            Ok(fleet)
        })
        .await
    }

    /// Waits until a build of a server has succeeded that is newer than one that is known, if any is, and gives its id.
    ///
    /// # Errors
    /// When the bound is over, with the newest build as it is.
    pub async fn built(&self, server: &str, after: Option<&str>, bound: Duration) -> Result<String> {
        until("the build", bound, async || {
            let request = ListBuildsRequest { server: server.to_owned(), ..Default::default() };
            let builds = self.builder().list_builds(request).await?.into_inner().builds;
            let created = |build: &&Build| build.created.map(|at| (at.seconds, at.nanos));
            match builds.iter().max_by_key(created) {
                Some(build) if after == Some(&build.id) => Err("it has not begun".into()),
                Some(build) if build.state() == BuildState::Succeeded => Ok(build.id.clone()),
                other => Err(format!("{other:?}").into()),
            }
        })
        .await
    }

    /// The image of a build, or a server's newest, as an OCI layout, in `layout` below a folder.
    ///
    /// # Errors
    /// Where the export fails.
    pub fn export(&self, image: &str, folder: &Path) -> Result<PathBuf> {
        let (archive, layout) = (folder.join(format!("{image}.tar")), folder.join("layout"));
        self.kiln(&["image", "export", image, "--file", &archive.display().to_string()])?;
        std::fs::create_dir(&layout)?;
        run(Command::new("tar")
            .arg("--extract")
            .arg("--file")
            .arg(&archive)
            .arg("--directory")
            .arg(&layout))?;
        Ok(layout)
    }

    /// The process of a service, or of the broker (`nats`).
    ///
    /// # Errors
    /// Where it has left no pid file.
    pub fn pid(&self, process: &str) -> Result<u32> {
        let path = self.home.path().join(format!("run/{process}.pid"));
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    /// Sends a signal to a service, or to the broker.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn signal(&self, process: &str, signal: rustix::process::Signal) -> Result<()> {
        let pid = i32::try_from(self.pid(process)?).ok().and_then(rustix::process::Pid::from_raw);
        rustix::process::kill_process(pid.ok_or("no process id")?, signal).map_err(Error::from)
    }

    /// Kills the site's PostgreSQL server, and starts it again after a while.
    ///
    /// # Errors
    /// Where there is none, or it does not come up.
    pub fn kill_database(&self, away: Duration) -> Result<()> {
        self.with_database(|database| {
            database.kill()?;
            std::thread::sleep(away);
            database.resume()
        })
    }

    /// Lets every process of the site's PostgreSQL server stand still for a while.
    ///
    /// # Errors
    /// Where there is none.
    pub fn freeze_database(&self, still: Duration) -> Result<()> {
        self.with_database(|database| {
            database.signal(rustix::process::Signal::STOP)?;
            std::thread::sleep(still);
            database.signal(rustix::process::Signal::CONT)
        })
    }

    pub const fn has_database(&self) -> bool {
        self.database.is_some()
    }

    pub(crate) fn with_database<T>(&self, act: impl FnOnce(&mut Postgres) -> Result<T>) -> Result<T> {
        let database = self.database.as_ref().ok_or("the site has no database")?;
        let mut database = database.lock().map_err(|_| "another thread broke off there")?;
        act(&mut database)
    }

    /// The id that marks everything the site makes on this machine.
    ///
    /// # Errors
    /// Where `site.toml` can't be read.
    pub fn id(&self) -> Result<String> {
        Ok(kiln_service::config::Site::load(self.home.path())?.id.to_string())
    }

    /// Everything of the site that is on this machine, a line each.
    ///
    /// # Errors
    /// Where the machine can't be looked at.
    pub fn on_machine(&self) -> Result<Vec<String>> {
        let mut lines = self.made_by("kiln-node")?;
        lines.extend(self.made_by("kiln-builder")?);
        Ok(lines)
    }

    /// What one of the programs has on this machine.
    ///
    /// # Errors
    /// Where the machine can't be looked at.
    pub fn made_by(&self, program: &str) -> Result<Vec<String>> {
        let output = Command::new(self.program(program)?)
            .arg("--home")
            .arg(self.home.path())
            .arg("--leftovers")
            .output()?;
        if !output.status.success() {
            return Err(format!("{program} --leftovers: {}", both(&output)).into());
        }
        Ok(String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect())
    }

    /// Takes the site down, and fails where anything of it is left.
    ///
    /// # Errors
    /// What `kiln down` said, or what is left.
    pub fn down(mut self) -> Result<()> {
        self.take_down()
    }

    /// The same, and moves the site's folder to a place on the same file system instead of deleting it.
    ///
    /// # Errors
    /// As for [`Site::down`]; the folder can't be moved there.
    pub fn down_to(mut self, folder: &Path) -> Result<()> {
        self.take_down()?;
        Ok(std::fs::rename(self.home.path(), folder)?)
    }

    fn take_down(&mut self) -> Result<()> {
        self.down = true;
        self.kiln(&["down"])?;
        let left = self.on_machine()?;
        if left.is_empty() { Ok(()) } else { Err(format!("left over: {}", left.join("; ")).into()) }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.down {
            return;
        }
        // The test failed: what the services wrote may say why.
        if let Some(keep) = std::env::var_os("KILN_TEST_KEEP_LOGS") {
            let _ = Command::new("cp").arg("-rT").arg(self.home.path()).arg(keep).status();
        }
        let _ = self.try_kiln(&["down"]);
    }
}

/// # Errors
/// What keeps a fleet from being whole on a release.
pub fn settled(fleet: &Fleet, release: u64) -> Result<()> {
    let live: Vec<_> = fleet
        .instances
        .iter()
        .filter(|instance| !matches!(instance.state(), InstanceState::Retired | InstanceState::Failed))
        .collect();
    let good = live
        .iter()
        .filter(|instance| {
            instance.release == release
                && instance.state() == InstanceState::Running
                && instance.health() == HealthState::Healthy
                && instance.on_edge
        })
        .count();
    let wanted = usize::try_from(fleet.replicas)?;
    if fleet.release == release && fleet.rollout.is_none() && good == wanted && live.len() == wanted {
        return Ok(());
    }
    let shown: Vec<_> = live
        .iter()
        .map(|i| format!("{} {:?} {:?} edge={}", i.id, i.state(), i.health(), i.on_edge))
        .collect();
    let rollout = fleet.rollout.as_ref().map(|r| format!("{} {:?} {}", r.id, r.state(), r.problem));
    Err(format!(
        "release {}, rollout {rollout:?}, {good} of {wanted}: {}; {}",
        fleet.release,
        shown.join(", "),
        fleet.problem
    )
    .into())
}

/// A layout with what it calls its one image: `FOLDER:NAME`.
///
/// # Errors
/// Where its index can't be read, or names nothing.
pub fn tagged(layout: &Path) -> Result<String> {
    let index: serde_json::Value = serde_json::from_slice(&std::fs::read(layout.join("index.json"))?)?;
    let name = index["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"].as_str();
    let name = name.ok_or_else(|| format!("no name in {index}"))?;
    Ok(format!("{}:{name}", layout.display()))
}

/// Where users reach a port of the edge.
pub fn edge(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// For homes beside a site's.
pub(crate) fn folder_of_homes() -> PathBuf {
    folder().unwrap_or_else(std::env::temp_dir)
}

/// Where sites are made, from `KILN_TEST_FOLDER`: `tests/run.sh` sets it to a file system in memory, where scenarios that
/// run beside each other do not wait for each other's writes to one disk. Benchmarks do without.
pub(crate) fn folder() -> Option<PathBuf> {
    std::env::var_os("KILN_TEST_FOLDER").map(PathBuf::from)
}

/// Kept between runs: packages and layers, both named by their content.
///
/// # Errors
/// Where it can't be made.
pub fn cache_folder() -> Result<PathBuf> {
    let folder = match folder() {
        Some(folder) => folder.join("cache"),
        None => binary("kiln")?.with_file_name("kiln-test-cache"),
    };
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// A definition of the examples, by its folder's name.
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(name)
}

/// Full counts are asked for, by `tests/run.sh --full`.
pub fn full() -> bool {
    std::env::var_os("KILN_TEST_FULL").is_some()
}
