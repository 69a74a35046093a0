//! A PostgreSQL server of a test's own: in memory, on a Unix socket, gone with its value.

use std::io::Error as IoError;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};

pub type Error = Box<dyn std::error::Error + Send + Sync>;
pub type Result<T> = std::result::Result<T, Error>;

/// On a server that starts, also after a crash.
const STARTS: Duration = Duration::from_secs(30);

pub struct Server {
    folder: tempfile::TempDir,
    programs: PathBuf,
    settings: Vec<String>,
    postmaster: Option<Child>,
}

impl Server {
    /// A new server that runs; its superuser is `postgres`, without a password. `settings` are as in `fsync=off`.
    ///
    /// # Errors
    /// Where PostgreSQL is not installed, or does not come up.
    pub fn start(settings: &[&str]) -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let mut folder = tempfile::Builder::new();
        folder.prefix("kiln-postgres-");
        let folder = if memory.is_dir() { folder.tempdir_in(memory)? } else { folder.tempdir()? };
        if geteuid().is_root() {
            std::os::unix::fs::chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
        }
        let settings = settings.iter().map(|setting| (*setting).to_owned()).collect();
        let mut server = Self { folder, programs: programs()?, settings, postmaster: None };
        let mut initdb = server.as_user("initdb");
        initdb.arg("--pgdata").arg(server.data());
        initdb.args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
        ]);
        run(&mut initdb)?;
        server.resume()?;
        Ok(server)
    }

    /// A database on it, made where it is missing, as `kiln` takes it.
    ///
    /// # Errors
    /// Where it can't be made.
    pub fn database(&self, name: &str) -> Result<String> {
        if self.psql("postgres", &format!("SELECT 1 FROM pg_database WHERE datname = '{name}'"))?.is_empty() {
            self.psql("postgres", &format!("CREATE DATABASE {name}"))?;
        }
        Ok(format!("postgres:///{name}?host={}&user=postgres", self.folder.path().display()))
    }

    /// What a statement gives, without a head.
    ///
    /// # Errors
    /// What the server says.
    pub fn psql(&self, database: &str, statement: &str) -> Result<String> {
        let mut psql = self.as_superuser(database);
        run(psql.args(["--command", statement])).map(|text| text.trim().to_owned())
    }

    fn as_superuser(&self, database: &str) -> Command {
        let mut psql = Command::new(self.programs.join("psql"));
        psql.arg("--host").arg(self.folder.path()).args(["--username=postgres", "--no-psqlrc", "--quiet"]);
        psql.args(["--tuples-only", "--no-align", "--no-password", "--set=ON_ERROR_STOP=1"]);
        psql.args(["--dbname", database]);
        psql
    }

    /// Runs the statements of a file.
    ///
    /// # Errors
    /// What the server says.
    pub fn psql_file(&self, database: &str, path: &Path) -> Result<()> {
        run(self.as_superuser(database).arg("--file").arg(path)).map(drop)
    }

    /// Writes a schema, with all that is in it, to a file of statements.
    ///
    /// # Errors
    /// What the server says.
    pub fn dump(&self, database: &str, schema: &str, to: &Path) -> Result<()> {
        let mut dump = Command::new(self.programs.join("pg_dump"));
        dump.arg("--host").arg(self.folder.path()).args(["--username=postgres", "--no-password"]);
        run(dump.args(["--schema", schema]).arg("--file").arg(to).arg(database)).map(drop)
    }

    /// Lets nobody into a database but with the superuser's password, which this is from now on. The database `postgres`
    /// stays open.
    ///
    /// # Errors
    /// What the server says, or that it still asks nobody.
    pub fn ask_for_password(&self, database: &str, password: &str) -> Result<()> {
        self.psql("postgres", &format!("ALTER USER postgres PASSWORD '{password}'"))?;
        let rules = "local postgres all trust\nlocal all all scram-sha-256\n";
        std::fs::write(self.data().join("pg_hba.conf"), rules)?;
        self.psql("postgres", "SELECT pg_reload_conf()")?;
        // It reads its rules when it comes to it.
        let limit = Instant::now() + STARTS;
        while self.psql(database, "SELECT 1").is_ok() {
            if Instant::now() > limit {
                return Err("anybody may come in".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The folder of its socket.
    pub fn socket(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of its data and of `pg_hba.conf`.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// SIGKILL to every process of it at once, as when its machine dies.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn kill(&mut self) -> Result<()> {
        let mut postmaster = self.postmaster.take().ok_or("the server does not run")?;
        let children = children(postmaster.id());
        postmaster.kill()?;
        for child in children {
            // One that has ended by itself meanwhile is as good.
            let _ = kill_process(child, Signal::KILL);
        }
        postmaster.wait()?;
        Ok(())
    }

    /// Stops every process of it, or lets them go on.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let postmaster = self.postmaster.as_ref().ok_or("the server does not run")?;
        let of = |id: u32| i32::try_from(id).ok().and_then(Pid::from_raw);
        // The postmaster first: while it stands still there are no new ones.
        kill_process(of(postmaster.id()).ok_or("no process id")?, signal)?;
        for child in children(postmaster.id()) {
            // One that has ended by itself meanwhile is as good.
            let _ = kill_process(child, signal);
        }
        Ok(())
    }

    /// Starts it again after [`Server::kill`], and waits until it answers.
    ///
    /// # Errors
    /// What it says, where it does not come up.
    pub fn resume(&mut self) -> Result<()> {
        let limit = Instant::now() + STARTS;
        loop {
            if self.postmaster.as_mut().map(Child::try_wait).transpose()?.flatten().is_some() {
                // The processes that were killed hold the memory of the one before for a moment.
                self.postmaster = None;
            }
            if self.postmaster.is_none() {
                self.postmaster = Some(self.spawn()?);
            }
            let mut ready = Command::new(self.programs.join("pg_isready"));
            let ready = ready.arg("--host").arg(self.folder.path()).stdout(Stdio::null()).status()?;
            if ready.success() {
                return Ok(());
            }
            if Instant::now() > limit {
                let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                return Err(format!("PostgreSQL does not come up:\n{log}").into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn spawn(&self) -> Result<Child> {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.folder.path().join("log"))?;
        let mut postgres = self.as_user("postgres");
        postgres.arg("-D").arg(self.data()).arg("-k").arg(self.folder.path());
        // Small, since tests run beside each other.
        for setting in ["listen_addresses=", "shared_buffers=16MB", "max_wal_size=64MB"] {
            postgres.args(["-c", setting]);
        }
        for setting in &self.settings {
            postgres.args(["-c", setting]);
        }
        let null = Stdio::null;
        Ok(postgres.stdin(null()).stdout(null()).stderr(log).spawn()?)
    }

    /// PostgreSQL refuses to run as root. It ends with the thread that starts it, also when that is killed.
    fn as_user(&self, program: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        if geteuid().is_root() {
            let nobody = NOBODY.to_string();
            command.args(["--reuid", &nobody, "--regid", &nobody, "--clear-groups"]);
        }
        command.arg("--").arg(self.programs.join(program)).current_dir(self.folder.path());
        command
    }
}

const NOBODY: u32 = 65534;

impl Drop for Server {
    fn drop(&mut self) {
        if self.postmaster.is_some() {
            let _ = self.kill();
        }
    }
}

fn children(id: u32) -> Vec<Pid> {
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|id| id.parse().ok()).filter_map(Pid::from_raw).collect()
}

/// Debian keeps the server's programs out of the path, by version.
fn programs() -> Result<PathBuf> {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<_> = debian.map(|entry| entry.path().join("bin")).collect();
    found.sort();
    let path = std::env::var_os("PATH").unwrap_or_default();
    found.extend(std::env::split_paths(&path));
    found.reverse();
    let whole = |folder: &PathBuf| {
        ["initdb", "postgres", "psql", "pg_dump"].iter().all(|name| folder.join(name).exists())
    };
    found
        .into_iter()
        .find(whole)
        .ok_or_else(|| "no PostgreSQL: deploy/prerequisites.sh --tests installs it".into())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|error: IoError| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr))
        .into())
}
