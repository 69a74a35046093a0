//! A network namespace beside the host: a neighbour on the same wire, as users are.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

use crate::command::{binary, run};
use crate::load::Summary;
use crate::process::begun;
use crate::{Error, Result};

/// Joined to the host by a pair of virtual Ethernet devices; gone with this value.
pub struct Neighbour {
    name: String,
    host: Ipv4Addr,
    own: Ipv4Addr,
}

/// Before the process that made it, when that began, and its number there.
const PREFIX: &str = "kiln-beside-";

/// Of addresses in fours, one for the host and one for the neighbour between the network's own two.
const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 231, 0, 0);
const FOURS: u32 = 1 << 14;

impl Neighbour {
    /// # Errors
    /// Where `ip` fails; most often for want of root.
    pub fn new() -> Result<Self> {
        Self::made_by(std::process::id())
    }

    fn made_by(process: u32) -> Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let begun = begun(process).ok_or("its process is gone")?;
        let _turn = turn()?;
        remove_left()?;
        let name = format!("{PREFIX}{process}-{begun}-{number}");
        let device = format!("kilnb{process}-{number}");
        let (host, own) = free_addresses()?;
        let neighbour = Self { name: name.clone(), host, own };
        ip(&format!("netns add {name}"))?;
        ip(&format!("link add {device} type veth peer name eth0 netns {name}"))?;
        ip(&format!("address add {host}/30 dev {device}"))?;
        ip(&format!("link set {device} up"))?;
        ip(&format!("-n {name} address add {own}/30 dev eth0"))?;
        ip(&format!("-n {name} link set eth0 up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!("-n {name} route add default via {host}"))?;
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

fn ip(arguments: &str) -> Result<String> {
    run(Command::new("ip").args(arguments.split(' ')))
}

/// One process at a time chooses addresses: before a device has them, nothing shows another one that they are taken.
fn turn() -> Result<File> {
    let lock = File::create("/run/kiln-beside.lock")?;
    flock(&lock, FlockOperation::LockExclusive)?;
    Ok(lock)
}

fn free_addresses() -> Result<(Ipv4Addr, Ipv4Addr)> {
    let taken = ip("-4 -oneline address show")?;
    let all = (0..FOURS).map(|four| NETWORK.to_bits() + 4 * four);
    let mut pairs = all.map(|first| (Ipv4Addr::from_bits(first + 1), Ipv4Addr::from_bits(first + 2)));
    let free = pairs.find(|(host, _)| !taken.contains(&format!(" {host}/")));
    free.ok_or_else(|| "every address is taken".into())
}

/// What an interrupted process left, with the processes in there.
fn remove_left() -> Result<()> {
    let listed = ip("netns list")?;
    for name in listed.lines().filter_map(|line| line.split(' ').next()).filter(|name| is_left(name)) {
        for process in ip(&format!("netns pids {name}"))?.lines() {
            // One that has ended meanwhile is what is wanted.
            let _ = Pid::from_raw(process.parse()?).map(|pid| kill_process(pid, Signal::KILL));
        }
        ip(&format!("netns delete {name}"))?;
    }
    Ok(())
}

fn is_left(name: &str) -> bool {
    let mut parts = name.strip_prefix(PREFIX).into_iter().flat_map(|rest| rest.split('-'));
    let (Some(process), Some(at)) = (parts.next().and_then(|id| id.parse().ok()), parts.next()) else {
        return false;
    };
    begun(process).as_deref() != Some(at)
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
            // Nobody reads what it would say, for which it could wait without end.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn terminate(child: &Child) -> Result<()> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or("no process id")?;
    kill_process(pid, Signal::TERM).map_err(Error::from)
}

#[test]
fn neighbours_are_apart_and_what_an_interrupted_process_left_goes_with_the_next() -> Result<()> {
    let [one, another] = [Neighbour::new()?, Neighbour::new()?];
    assert!(one.name != another.name && one.host != another.host);
    let mut maker = Command::new("sleep").arg("1000").spawn()?;
    let left = std::mem::ManuallyDrop::new(Neighbour::made_by(maker.id())?);
    let place = Path::new("/run/netns").join(&left.name);
    let mut inside = left.command("sleep".as_ref()).arg("1000").spawn()?;
    drop(Neighbour::new()?);
    assert!(place.exists(), "its maker lives");
    maker.kill()?;
    maker.wait()?;
    drop(Neighbour::new()?);
    assert!(!place.exists() && !inside.wait()?.success());
    for neighbour in [&one, &another] {
        assert!(Path::new("/run/netns").join(&neighbour.name).exists());
    }
    Ok(())
}
