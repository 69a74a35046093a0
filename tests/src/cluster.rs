//! Three nats-servers on this machine that are one broker, with the settings of `deploy/nats`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::Result;
use crate::command::run;
use crate::free_port;
use crate::load::fetch;
use crate::wait::until;

const SIZE: usize = 3;
/// To elect leaders, and to bring one that was away up to what the others have.
const WHOLE: Duration = Duration::from_secs(60);

pub struct Cluster {
    folder: tempfile::TempDir,
    /// Of clients, of the other servers, and of whoever looks on.
    ports: [[u16; 3]; SIZE],
    children: [Option<Child>; SIZE],
    identity: PathBuf,
    authority: PathBuf,
}

impl Cluster {
    /// Three places, and nothing that runs there yet.
    ///
    /// # Errors
    /// Where no ports are free.
    pub fn new() -> Result<Self> {
        let mut ports = [[0; 3]; SIZE];
        for port in ports.as_flattened_mut() {
            *port = free_port()?;
        }
        let (identity, authority) = Default::default();
        Ok(Self {
            folder: tempfile::tempdir()?,
            ports,
            children: [const { None }; SIZE],
            identity,
            authority,
        })
    }

    /// What `nats.url` is.
    pub fn urls(&self) -> String {
        self.ports.map(|[client, _, _]| format!("tls://127.0.0.1:{client}")).join(",")
    }

    /// Starts all of them, for the users that a site has, with a certificate of its authority.
    ///
    /// # Errors
    /// Where a server can't be started.
    pub fn start(&mut self, users: &Path, identity: PathBuf, authority: PathBuf) -> Result<()> {
        (self.identity, self.authority) = (identity, authority);
        for file in ["kiln.conf", "tls.conf"] {
            let common = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/nats").join(file);
            std::fs::copy(common, self.folder.path().join(file))?;
        }
        std::fs::copy(users, self.folder.path().join("users.conf"))?;
        let routes = self.ports.map(|[_, route, _]| format!("\"nats://127.0.0.1:{route}\"")).join(", ");
        for (number, [client, route, watch]) in self.ports.into_iter().enumerate() {
            let config = format!(
                "server_name: \"kiln-{number}\"\nlisten: \"127.0.0.1:{client}\"\nhttp: \"127.0.0.1:{watch}\"\n\
                 cluster {{\n  name: kiln\n  listen: \"127.0.0.1:{route}\"\n  routes: [{routes}]\n  \
                 include \"tls.conf\"\n}}\n\
                 include \"kiln.conf\"\ninclude \"tls.conf\"\ninclude \"users.conf\"\n"
            );
            std::fs::write(self.config(number), config)?;
            self.revive(number)?;
        }
        Ok(())
    }

    fn config(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("{number}.conf"))
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// Where it does not run.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        let mut child = self.children[number].take().ok_or("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Starts one again, with the data that it had.
    ///
    /// # Errors
    /// Where it can't be started.
    pub fn revive(&mut self, number: usize) -> Result<()> {
        let program = std::env::var_os("KILN_NATS_SERVER").unwrap_or_else(|| "nats-server".into());
        let log = std::fs::File::create(self.folder.path().join(format!("{number}.log")))?;
        let child = Command::new(program)
            .arg("--config")
            .arg(self.config(number))
            .env("KILN_NATS_DATA", self.folder.path().join(number.to_string()))
            .env("KILN_NATS_IDENTITY", &self.identity)
            .env("KILN_NATS_AUTHORITY", &self.authority)
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.children[number] = Some(child);
        Ok(())
    }

    /// Waits until every server that was started has all that the others have.
    ///
    /// # Errors
    /// When the bound is over, with what a server said.
    pub async fn whole(&self) -> Result<()> {
        for [_, _, watch] in self.ports {
            until("a server of the cluster", WHOLE, async || {
                let answer = fetch(SocketAddr::from(([127, 0, 0, 1], watch)), "/healthz").await?;
                if answer.contains(r#""status":"ok""#) { Ok(()) } else { Err(answer.into()) }
            })
            .await?;
        }
        Ok(())
    }

    /// Streams by their names, each with the number of the server that leads it and the count of its copies.
    ///
    /// # Errors
    /// Where no server answers, or what it says is not understood.
    pub fn streams(&self) -> Result<Vec<(String, usize, u64)>> {
        let [_, _, watch] = self.ports[0];
        let url = format!("http://127.0.0.1:{watch}/jsz?accounts=true&streams=true&config=true");
        let answer: Value =
            serde_json::from_str(&run(Command::new("curl").args(["--silent", "--fail", &url]))?)?;
        let accounts = answer["account_details"].as_array().ok_or("no accounts")?;
        let streams = accounts.iter().filter_map(|account| account["stream_detail"].as_array()).flatten();
        let mut found = Vec::new();
        for stream in streams {
            let leader = stream["cluster"]["leader"].as_str().and_then(|it| it.strip_prefix("kiln-"));
            found.push((
                stream["name"].as_str().unwrap_or_default().to_owned(),
                leader.ok_or("no leader")?.parse()?,
                stream["config"]["num_replicas"].as_u64().unwrap_or_default(),
            ));
        }
        Ok(found)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.children.iter_mut().flatten() {
            // One that is gone already is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
