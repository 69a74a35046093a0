//! Looks at the machine before anything is launched on it: what is missing, and what to do about it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use kiln_service::config::Site;
use serde::Serialize;

use crate::cgroup;
use crate::edge;
use crate::helper::Helpers;
use crate::names::Names;
use crate::network::firewall::{Forwarding, forwarding};
use crate::network::{bridge, plugin_dir};
use crate::runtime::find_program;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub name: String,
    pub ok: bool,
    /// What was seen.
    pub detail: String,
    /// What to do about it; empty where it is fine.
    pub fix: String,
}

/// Programs, how each says its version, and the Debian package that has it.
const PROGRAMS: [(&str, &str, &str); 6] = [
    ("runc", "--version", "runc"),
    ("conmon", "--version", "conmon"),
    ("nft", "--version", "nftables"),
    ("ip", "-V", "iproute2"),
    ("conntrack", "--version", "conntrack"),
    ("git", "--version", "git"),
];
const LIMIT: Duration = Duration::from_secs(10);
/// A fleet of three with one more during a rollout.
const MEMORY_MIB: u64 = 1024;
/// Images, packages and layers of a few servers.
const DISK_MIB: u64 = 5 * 1024;

fn finding(name: &str, ok: bool, detail: impl Into<String>, fix: &str) -> Finding {
    let fix = if ok { "" } else { fix };
    Finding { name: name.to_owned(), ok, detail: detail.into(), fix: fix.to_owned() }
}

/// Looks at everything. With a site, also at what that site needs for itself. Changes nothing that stays.
pub async fn examine(site: Option<&Site>, ports: &[u16]) -> Vec<Finding> {
    let helpers = Helpers::outside();
    let mut all = vec![root()];
    for (program, flag, package) in PROGRAMS {
        all.push(version(&helpers, program, flag, package).await);
    }
    all.extend([cni(), cgroups(), overlay(), user_namespaces(), memory()]);
    all.push(nftables(&helpers).await);
    all.push(bridges(&helpers).await);
    all.push(forwarded(&helpers).await);
    let home = site.map_or_else(|| Path::new("/var/lib").to_owned(), |site| site.home.clone());
    all.push(disk(&home));
    if let Some(site) = site {
        all.push(subnet(&Names::of(site), &helpers).await);
    }
    all.extend(ports.iter().map(|listen| port(*listen)));
    all
}

/// Whether something on the machine listens on a port that users are to connect to.
fn port(listen: u16) -> Finding {
    let name = format!("port {listen}");
    match edge::holder(listen) {
        Ok(None) => finding(&name, true, "free", ""),
        Ok(Some(holder)) => finding(
            &name,
            false,
            format!("held by {holder}"),
            "stop it, or choose another `run.ports.listen`",
        ),
        Err(failure) => finding(&name, false, failure.to_string(), "mount /proc"),
    }
}

fn root() -> Finding {
    let ok = rustix::process::geteuid().is_root();
    let detail = if ok { "runs as root" } else { "does not run as root" };
    finding("root", ok, detail, "run it as root, or with sudo")
}

async fn version(helpers: &Helpers, program: &str, flag: &str, package: &str) -> Finding {
    let fix = format!("apt-get install {package}");
    if find_program(program).is_none() {
        return finding(program, false, "is not installed", &fix);
    }
    let run = async {
        let mut command = helpers.command(program)?;
        command.arg(flag);
        helpers.run(command, b"", LIMIT).await
    };
    match run.await {
        Ok(said) => {
            let said = String::from_utf8_lossy(&said);
            finding(program, true, said.lines().next().unwrap_or_default(), "")
        }
        Err(failure) => finding(program, false, failure.to_string(), &fix),
    }
}

fn cni() -> Finding {
    let fix = "apt-get install containernetworking-plugins";
    match plugin_dir() {
        Some(dir) => finding("cni-plugins", true, dir.display().to_string(), fix),
        None => finding("cni-plugins", false, "`bridge` and `host-local` were not found", fix),
    }
}

fn cgroups() -> Finding {
    let fix = "mount cgroup2 (or the v1 controllers memory, cpu and pids) below /sys/fs/cgroup";
    match cgroup::mode() {
        Ok(mode) => finding("cgroups", true, mode, fix),
        Err(failure) => finding("cgroups", false, failure.to_string(), fix),
    }
}

fn overlay() -> Finding {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let ok =
        known.lines().any(|line| line.ends_with("\toverlay")) || Path::new("/sys/module/overlay").exists();
    let detail = if ok { "known to the kernel" } else { "not known to the kernel" };
    finding("overlayfs", ok, detail, "modprobe overlay")
}

fn user_namespaces() -> Finding {
    let most = bridge::number("user/max_user_namespaces").unwrap_or(0);
    let fix = "sysctl -w user.max_user_namespaces=15000; builds run in one";
    finding("user-namespaces", most > 0, format!("at most {most}"), fix)
}

fn memory() -> Finding {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let mib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024;
    let fix = "free some: a rollout runs one more instance than the fleet has";
    finding("memory", mib >= MEMORY_MIB, format!("{mib} MiB available, {MEMORY_MIB} wanted"), fix)
}

fn disk(home: &Path) -> Finding {
    // A site that is not there yet will lie on the file system of its parent.
    let there = home.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let free = rustix::fs::statvfs(there).map_or(0, |stat| stat.f_bavail * stat.f_frsize) >> 20;
    let detail = format!("{free} MiB free at {}, {DISK_MIB} wanted", there.display());
    finding("disk", free >= DISK_MIB, detail, "free some: images, packages and layers lie there")
}

async fn nftables(helpers: &Helpers) -> Finding {
    let fix = "modprobe nf_tables nft_fib_ipv4 nft_numgen nft_nat; apt-get install nftables";
    match edge::try_out(helpers).await {
        Ok(()) => finding("nftables", true, "takes the edge's rules", fix),
        Err(failure) => finding("nftables", false, failure.to_string(), fix),
    }
}

async fn bridges(helpers: &Helpers) -> Finding {
    let name = "kiln-doctor";
    let ip = async |args: &[&str]| {
        let mut command = helpers.command("ip")?;
        command.args(args);
        helpers.run(command, b"", LIMIT).await
    };
    let made = ip(&["link", "add", name, "type", "bridge"]).await;
    // Also one that an interrupted look left.
    let removed = ip(&["link", "del", name]).await;
    let fix = "modprobe bridge veth";
    match made.and(removed) {
        Ok(_) => finding("bridge", true, "can be made", fix),
        Err(failure) => finding("bridge", false, failure.to_string(), fix),
    }
}

async fn forwarded(helpers: &Helpers) -> Finding {
    let detail = match forwarding(helpers).await {
        Forwarding::Free => "forwarded packets are not dropped".to_owned(),
        Forwarding::Dropped { chain } => {
            format!("forwarded packets may be dropped; the node puts its accepts into {chain}")
        }
    };
    finding("firewall", true, detail, "")
}

async fn subnet(names: &Names, helpers: &Helpers) -> Finding {
    let fix = "set another `subnet` in site.toml";
    match bridge::refuse_foreign_subnet(names, helpers).await {
        Ok(()) => finding("subnet", true, format!("{} is free", names.subnet()), fix),
        Err(failure) => finding("subnet", false, failure.to_string(), fix),
    }
}
