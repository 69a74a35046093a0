//! Another machine with a node: a network namespace and a home of its own.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::Result;
use crate::command::{binary, both, run};
use crate::netns::Neighbour;
use crate::registry::Registry;
use crate::site::Site;

const PORT: u16 = 7104;

pub struct Machine {
    home: tempfile::TempDir,
    network: Neighbour,
    /// Holds the mounts, which outlive each node.
    mounts: Child,
    node: Option<Child>,
    name: String,
}

/// The devices of its own network, and the cgroups of the host.
const MOUNTS: &str = "set -e\nmkdir /tmp/$1\nmount --rbind /sys/fs/cgroup /tmp/$1\nmount -t sysfs sysfs /sys\n\
    mount --rbind /tmp/$1 /sys/fs/cgroup\numount -l /tmp/$1\nrmdir /tmp/$1\necho ready\nexec sleep infinity";

impl Machine {
    /// # Errors
    /// Where `ip` fails.
    pub fn new(name: &str, number: u8) -> Result<Self> {
        let home = tempfile::Builder::new().prefix("kiln-").tempdir_in(crate::site::folder_of_homes())?;
        let network = Neighbour::new()?;
        let folder = format!("kiln-cgroups-{}-{number}", std::process::id());
        let mut mounts = network.command("unshare".as_ref());
        mounts.args(["--mount", "--propagation", "slave", "sh", "-c", MOUNTS, "sh", &folder]);
        let mut mounts = mounts.stdout(Stdio::piped()).spawn()?;
        let mut said = String::new();
        if let Some(stdout) = mounts.stdout.take() {
            BufReader::new(stdout).read_line(&mut said)?;
        }
        let machine = Self { home, network, mounts, node: None, name: name.to_owned() };
        if said == "ready\n" {
            Ok(machine)
        } else {
            Err(format!("the mounts of {name} can't be made").into())
        }
    }

    /// The node's program with its network and mounts.
    fn program(&self) -> Result<Command> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.mounts.id())).args(["--net", "--mount", "--"]);
        command.arg(binary("kiln-node")?).arg("--home").arg(self.home.path());
        Ok(command)
    }

    /// The setting of the site that names it.
    pub fn setting(&self) -> String {
        format!("nodes.{}=https://{}:{PORT}", self.name, self.network.address())
    }

    /// The host, as it sees it.
    pub fn host(&self) -> Ipv4Addr {
        self.network.host()
    }

    /// Where users reach a port of its edge.
    pub fn edge(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.network.address(), port))
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// Gives it what belongs to a node of the site, as a person would, and starts it.
    ///
    /// # Errors
    /// What the site refused, or where the node can't be started.
    pub fn join(&mut self, site: &Site, number: u8, registry: &Registry) -> Result<()> {
        let home = self.home.path();
        for folder in ["run", "keys/pki", "node", "logs"] {
            std::fs::create_dir_all(home.join(folder))?;
        }
        let address = self.network.address();
        let config = format!(
            "name = \"{}\"\nid = \"{:08x}\"\nsubnet = \"10.232.{number}.0/24\"\nbridge = \"kiln-m{number}\"\n\
             [nats]\nurl = \"tls://{}:4222\"\n[listen]\nnode = \"{address}:{PORT}\"\n\
             [poll]\nresync = \"5s\"\n\
             [registry]\nrepository = \"{}\"\nca = \"keys/registry-ca.pem\"\ncredentials = \"keys/registry.json\"\n",
            site.name(),
            std::process::id().wrapping_mul(251).wrapping_add(number.into()),
            self.host(),
            registry.repository(self.host()),
        );
        std::fs::write(home.join("site.toml"), config)?;
        registry.give_keys(&home.join("keys"), self.host())?;
        for file in ["keys/signing.pub", "keys/pki/authority.pem"] {
            std::fs::copy(site.home().join(file), home.join(file))?;
        }
        let identity = home.join("keys/pki/node.pem").display().to_string();
        site.kiln(&["pki", "issue", "node", "--host", &address.to_string(), "--out", &identity])?;
        self.start()
    }

    /// # Errors
    /// Where the node can't be started.
    pub fn start(&mut self) -> Result<()> {
        let log = std::fs::File::create(self.home.path().join("logs/node.log"))?;
        self.node = Some(self.program()?.stdout(Stdio::null()).stderr(log).spawn()?);
        Ok(())
    }

    /// # Errors
    /// Where it can't be killed.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut node) = self.node.take() {
            // nsenter has become the node.
            node.kill()?;
            node.wait()?;
        }
        Ok(())
    }

    fn purge(&mut self) -> Result<()> {
        self.kill()?;
        run(self.program()?.arg("--purge")).map(drop)
    }

    /// Takes everything of the site off it, and fails where anything is left.
    ///
    /// # Errors
    /// What is left.
    pub fn clear(mut self) -> Result<()> {
        self.purge()?;
        let output = self.program()?.arg("--leftovers").output()?;
        let left = String::from_utf8_lossy(&output.stdout);
        if output.status.success() && left.is_empty() { Ok(()) } else { Err(both(&output).into()) }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(keep) = std::env::var_os("KILN_TEST_KEEP_LOGS") {
            let to = Path::new(&keep).join(&self.name);
            let _ = Command::new("cp").arg("-rT").arg(self.home.path()).arg(to).status();
        }
        let _ = self.purge();
        let _ = self.mounts.kill();
        let _ = self.mounts.wait();
    }
}
