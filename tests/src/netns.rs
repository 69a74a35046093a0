//! A network namespace beside the host: a neighbour on the same wire, as users are.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::command::{binary, run};
use crate::load::Summary;
use crate::{Error, Result};

/// Joined to the host by a pair of virtual Ethernet devices; gone with this value.
pub struct Neighbour {
    name: String,
    host: Ipv4Addr,
    own: Ipv4Addr,
}

impl Neighbour {
    /// `number` keeps neighbours apart, and is part of their addresses.
    ///
    /// # Errors
    /// Where `ip` fails; most often for want of root.
    pub fn new(number: u8) -> Result<Self> {
        let name = format!("kiln-beside{number}");
        let host = Ipv4Addr::new(10, 231, number, 1);
        let own = Ipv4Addr::new(10, 231, number, 2);
        let neighbour = Self { name: name.clone(), host, own };
        let ip = |arguments: String| run(Command::new("ip").args(arguments.split(' '))).map(drop);
        ip(format!("netns add {name}"))?;
        ip(format!("link add kilnb{number} type veth peer name eth0 netns {name}"))?;
        ip(format!("address add {host}/30 dev kilnb{number}"))?;
        ip(format!("link set kilnb{number} up"))?;
        ip(format!("-n {name} address add {own}/30 dev eth0"))?;
        ip(format!("-n {name} link set eth0 up"))?;
        ip(format!("-n {name} link set lo up"))?;
        ip(format!("-n {name} route add default via {host}"))?;
        Ok(neighbour)
    }

    /// The host's address as the neighbour sees it.
    pub fn host(&self) -> Ipv4Addr {
        self.host
    }

    /// Its own address.
    pub fn address(&self) -> Ipv4Addr {
        self.own
    }

    /// A program with the neighbour's network, and all else of the host.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg("--").arg(program);
        command
    }

    /// Starts load from here on a port of the host.
    ///
    /// # Errors
    /// Where the load generator can't be started.
    pub fn load(&self, port: u16, wanted: &str) -> Result<NeighbourLoad> {
        let child = Command::new("ip")
            .args(["netns", "exec", &self.name])
            .arg(binary("kiln-load")?)
            .args(["--to", &format!("{}:{port}", self.host)])
            .args(["--clients", "4", "--rate", "200", "--seconds", "600", "--text", wanted])
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(NeighbourLoad { child: Some(child) })
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // Takes the devices with it. One that is in use by a failing test's child goes with that child.
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

/// Load under way in another process.
pub struct NeighbourLoad {
    child: Option<Child>,
}

impl NeighbourLoad {
    /// Ends the load, and gives what it saw.
    ///
    /// # Errors
    /// Where the process was gone before, or printed no summary.
    pub fn stop(mut self) -> Result<Summary> {
        let child = self.child.take().ok_or("the load was stopped before")?;
        terminate(&child)?;
        let output = child.wait_with_output()?;
        serde_json::from_slice(&output.stdout)
            .map_err(|error| format!("the load ended badly: {error}").into())
    }
}

impl Drop for NeighbourLoad {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = terminate(&child);
            let _ = child.wait();
        }
    }
}

fn terminate(child: &Child) -> Result<()> {
    let pid =
        i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).ok_or("no process id")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).map_err(Error::from)
}

/// Whether a file is below `/proc` of a process that lives.
pub fn alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).join("stat").exists()
}
