//! Looks at the machine before anything is launched on it: what is missing, and what to do about it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use kiln_service::config::Site;
use kiln_service::machine::Finding;
use serde_json::Value;

use crate::cgroup::{self, Cgroup};
use crate::edge;
use crate::failure::Failure;
use crate::helper::Helpers;
use crate::names::Names;
use crate::network::firewall::{Forwarding, forwarding};
use crate::network::{bridge, plugin_dir};
use crate::runtime::find_program;

/// Programs, how each says its version, and the Debian package that has it.
const PROGRAMS: [(&str, &str, &str); 4] = [
    ("runc", "--version", "runc"),
    ("conmon", "--version", "conmon"),
    ("nft", "--version", "nftables"),
    ("ip", "-V", "iproute2"),
];
const LIMIT: Duration = Duration::from_secs(10);
/// A fleet of three with one more during a rollout.
const MEMORY_MIB: u64 = 1024;
/// Images, packages and layers of a few servers.
const DISK_MIB: u64 = 5 * 1024;

/// Ports that must be free.
#[derive(Debug)]
pub struct Ports<'a> {
    /// Users are to connect to them.
    pub listen: &'a [u16],
    /// The site's own, by the setting that names each.
    pub own: &'a [(String, u16)],
}

/// Looks at everything that launching needs. With a site, also at what that site needs for itself. Changes nothing that
/// stays.
pub async fn examine(site: Option<&Site>, ports: &Ports<'_>) -> Vec<Finding> {
    let helpers = Helpers::outside();
    let mut all = vec![root()];
    for (program, flag, package) in PROGRAMS {
        all.push(version(&helpers, program, flag, package).await);
    }
    all.extend([cni(), cgroups(), memory()]);
    all.push(nftables(&helpers).await);
    all.push(bridges(&helpers).await);
    all.push(forwarded(&helpers).await);
    let home = site.map_or_else(|| Path::new("/var/lib").to_owned(), |site| site.home.clone());
    all.push(disk(&home));
    if let Some(site) = site {
        all.push(subnet(&Names::of(site), &helpers).await);
    }
    all.extend(ports.listen.iter().map(|listen| {
        port(&format!("port {listen}"), *listen, "stop it, or choose another `run.ports.listen`")
    }));
    all.extend(ports.own.iter().map(|(setting, own)| {
        let scheme = if setting == "nats.url" { "tls://" } else { "" };
        let fix = format!("stop it, or choose another: kiln up --config {setting}={scheme}127.0.0.1:PORT");
        port(&format!("port {own} ({setting})"), *own, &fix)
    }));
    all
}

/// Whether something on the machine listens on a port.
fn port(name: &str, number: u16, fix: &str) -> Finding {
    match edge::holder(number) {
        Ok(None) => Finding::good(name, "no program holds it"),
        Ok(Some(holder)) => Finding::bad(name, format!("held by {holder}"), fix),
        Err(failure) => Finding::bad(name, failure.to_string(), "mount /proc"),
    }
}

fn root() -> Finding {
    let ok = rustix::process::geteuid().is_root();
    let detail = if ok { "runs as root" } else { "does not run as root" };
    Finding::of("root", ok, detail, "run it as root, or with sudo")
}

async fn version(helpers: &Helpers, program: &str, flag: &str, package: &str) -> Finding {
    let fix = format!("apt-get install {package}");
    if find_program(program).is_none() {
        return Finding::bad(program, "is not installed", &fix);
    }
    let run = async {
        let mut command = helpers.command(program)?;
        command.arg(flag);
        helpers.run(command, b"", LIMIT).await
    };
    match run.await {
        Ok(said) => {
            let said = String::from_utf8_lossy(&said);
            Finding::good(program, said.lines().next().unwrap_or_default())
        }
        Err(failure) => Finding::bad(program, failure.to_string(), &fix),
    }
}

fn cni() -> Finding {
    let fix = "apt-get install containernetworking-plugins";
    match plugin_dir() {
        Some(dir) => Finding::good("cni-plugins", dir.display().to_string()),
        None => Finding::bad("cni-plugins", "`bridge` and `host-local` were not found", fix),
    }
}

/// A group is made and removed: the hierarchies may be there, and be read-only.
fn cgroups() -> Finding {
    let fix = "mount cgroup2 (or the v1 controllers memory, cpu and pids) below /sys/fs/cgroup, writable";
    let group = format!("kiln-doctor-{}", std::process::id());
    let made = Cgroup::make(&group, Cgroup::HELPERS).map(drop);
    let removed = cgroup::remove_everywhere(&group);
    match cgroup::mode().and_then(|mode| made.and(removed).map(|()| mode)) {
        Ok(mode) => Finding::good("cgroups", mode),
        Err(failure) => Finding::bad("cgroups", failure.to_string(), fix),
    }
}

fn memory() -> Finding {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let mib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024;
    let fix = "free some: a rollout runs one more instance than the fleet has";
    Finding::of("memory", mib >= MEMORY_MIB, format!("{mib} MiB available, {MEMORY_MIB} wanted"), fix)
}

fn disk(home: &Path) -> Finding {
    // A site that is not there yet will lie on the file system of its parent.
    let there = home.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let free = rustix::fs::statvfs(there).map_or(0, |stat| stat.f_bavail * stat.f_frsize) >> 20;
    let detail = format!("{free} MiB free at {}, {DISK_MIB} wanted", there.display());
    Finding::of("disk", free >= DISK_MIB, detail, "free some: images, packages and layers lie there")
}

async fn nftables(helpers: &Helpers) -> Finding {
    let fix = "modprobe nf_tables nft_fib_ipv4 nft_numgen nft_nat; apt-get install nftables";
    match edge::try_out(helpers).await {
        Ok(()) => Finding::good("nftables", "takes the edge's rules"),
        Err(failure) => Finding::bad("nftables", failure.to_string(), fix),
    }
}

/// In a network namespace that ends with the command: two that look at once don't meet, and nothing can be left.
async fn bridges(helpers: &Helpers) -> Finding {
    let made = async {
        let mut command = helpers.command("unshare")?;
        command.args(["--net", "ip", "link", "add", "kiln-doctor", "type", "bridge"]);
        helpers.run(command, b"", LIMIT).await
    };
    match made.await {
        Ok(_) => Finding::good("bridge", "can be made"),
        Err(failure) => Finding::bad("bridge", failure.to_string(), "modprobe bridge veth"),
    }
}

/// What the node can mend it does. In a chain of another program's an accept of its own would be no use: a packet has
/// to get through all chains.
async fn forwarded(helpers: &Helpers) -> Finding {
    const NAME: &str = "firewall";
    let chains = async {
        let mut command = helpers.command("nft")?;
        command.args(["-j", "list", "chains"]);
        let said = helpers.run(command, b"", LIMIT).await?;
        serde_json::from_slice::<Value>(&said)
            .map_err(|error| Failure::new("reading the answer of nft", error))
    };
    let dropping = match chains.await {
        Ok(chains) => dropping(&chains),
        Err(failure) => return Finding::bad(NAME, failure.to_string(), "apt-get install nftables"),
    };
    if !dropping.is_empty() {
        let rules = dropping.iter().flat_map(|chain| {
            ["iifname", "oifname"].map(|way| format!("nft insert rule {chain} {way} 'kiln-*' accept"))
        });
        let fix = format!(
            "unless it lets them through already: {}; and write the same into its own configuration",
            rules.collect::<Vec<_>>().join("; ")
        );
        let detail = format!("drops forwarded packets that no rule takes: {}", dropping.join(", "));
        return Finding::bad(NAME, detail, fix);
    }
    let detail = match forwarding(helpers).await {
        Forwarding::Free => "forwarded packets are not dropped".to_owned(),
        Forwarding::Dropped { chain } => {
            format!("forwarded packets may be dropped; the node puts its accepts into {chain}")
        }
    };
    Finding::good(NAME, detail)
}

/// The chains that drop what is forwarded, but for the one that the node itself mends by iptables.
fn dropping(answer: &Value) -> Vec<String> {
    let chains = answer["nftables"].as_array().into_iter().flatten().filter_map(|it| it.get("chain"));
    let drops = |chain: &&Value| {
        chain["hook"] == "forward"
            && chain["policy"] == "drop"
            // Instances have no IPv6.
            && ["ip", "inet"].iter().any(|family| chain["family"] == *family)
            && !(chain["family"] == "ip" && chain["table"] == "filter" && chain["name"] == "FORWARD")
    };
    let named = |chain: &Value| {
        let [family, table, name] =
            ["family", "table", "name"].map(|part| chain[part].as_str().unwrap_or_default());
        format!("{family} {table} {name}")
    };
    chains.filter(drops).map(named).collect()
}

async fn subnet(names: &Names, helpers: &Helpers) -> Finding {
    let fix = "choose another: kiln up --config subnet=10.77.3.0/24";
    match bridge::refuse_foreign_subnet(names, helpers).await {
        Ok(()) => Finding::good("subnet", format!("nothing else has {}", names.subnet())),
        Err(failure) => Finding::bad("subnet", failure.to_string(), fix),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_that_drops_what_is_forwarded_is_named() {
        let chain = |family: &str, table: &str, name: &str, hook: &str, policy: &str| {
            serde_json::json!({ "chain": {
                "family": family, "table": table, "name": name, "handle": 1, "type": "filter",
                "hook": hook, "prio": 0, "policy": policy,
            } })
        };
        let answer = serde_json::json!({ "nftables": [
            { "metainfo": { "version": "1.0.6" } },
            chain("inet", "filter", "forward", "forward", "drop"),
            chain("inet", "filter", "input", "input", "drop"),
            chain("ip", "filter", "FORWARD", "forward", "drop"),
            chain("ip", "kiln_0a1b2c3d", "forward", "forward", "accept"),
            chain("ip6", "filter", "FORWARD", "forward", "drop"),
            { "chain": { "family": "inet", "table": "filter", "name": "other", "handle": 2 } },
        ] });
        assert_eq!(dropping(&answer), ["inet filter forward"]);
    }

    #[test]
    fn a_held_port_names_who_holds_it_and_what_to_do() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let number = socket.local_addr().unwrap().port();
        let found = port("x", number, "stop it");
        assert!(!found.ok && found.detail.contains(&std::process::id().to_string()), "{found:?}");
        assert_eq!(found.fix, "stop it");
        drop(socket);
        assert_eq!(port("x", number, "stop it"), Finding::good("x", "no program holds it"));
    }
}
