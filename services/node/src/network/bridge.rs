//! The site's bridge and what the kernel must allow for it.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use kiln_service::config::Subnet;
use serde::Deserialize;

use crate::failure::{During, Failure};
use crate::helper::Helpers;
use crate::names::Names;

const LIMIT: Duration = Duration::from_secs(10);

/// Connections that the kernel can track at once. A full table drops new ones; an entry takes 320 bytes.
const TRACKED: u64 = 262_144;
/// Ended connections stay tracked this long. At the default of 120 s a client that connects anew for each request
/// fills the table at 2,000 requests a second.
const TIME_WAIT: u64 = 30;

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    ifname: String,
    #[serde(default)]
    addr_info: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    #[serde(default)]
    local: String,
}

fn exists(names: &Names) -> bool {
    PathBuf::from("/sys/class/net").join(names.bridge()).exists()
}

async fn ip(helpers: &Helpers, args: &[&str]) -> Result<Vec<u8>, Failure> {
    let mut command = helpers.command("ip")?;
    command.args(args);
    helpers.run(command, b"", LIMIT).await
}

/// Locally administered, unicast, and of this subnet alone.
fn hardware_address(gateway: Ipv4Addr) -> String {
    let [a, b, c, d] = gateway.octets();
    format!("02:6b:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

/// Makes the bridge as it must be; fine if it is.
pub(crate) async fn ensure(names: &Names, helpers: &Helpers) -> Result<(), Failure> {
    let bridge = names.bridge();
    refuse_foreign_subnet(names, helpers).await?;
    if !exists(names) {
        ip(helpers, &["link", "add", bridge, "type", "bridge"]).await?;
    }
    // Without one of its own the bridge takes the lowest hardware address among its ports, which changes as instances
    // come and go: those that live would answer to the old one, unheard, until they ask again.
    ip(helpers, &["link", "set", bridge, "address", &hardware_address(names.gateway())]).await?;
    // Before it is up: with an address of its own there, the machine would answer instances past the table, which is
    // for IPv4.
    no_ipv6(bridge)?;
    let gateway = format!("{}/{}", names.gateway(), Subnet::PREFIX);
    let local_users = format!("{}/32", names.local_users());
    ip(helpers, &["addr", "replace", &gateway, "dev", bridge]).await?;
    ip(helpers, &["addr", "replace", &local_users, "dev", bridge]).await?;
    ip(helpers, &["link", "set", bridge, "up"]).await?;
    sysctl("net/ipv4/ip_forward", "1")?;
    // Users on this machine connect to 127.0.0.1; their packets must be let out to the bridge.
    sysctl(&format!("net/ipv4/conf/{bridge}/route_localnet"), "1")?;
    for (name, wanted, better) in [
        ("net/netfilter/nf_conntrack_max", TRACKED, u64::max as fn(u64, u64) -> u64),
        ("net/netfilter/nf_conntrack_tcp_timeout_time_wait", TIME_WAIT, u64::min),
    ] {
        match number(name) {
            Some(now) if better(now, wanted) == now => {}
            Some(_) => sysctl(name, &wanted.to_string())?,
            // Connection tracking is loaded with the table's first NAT chain; this runs again after it.
            None => {}
        }
    }
    Ok(())
}

/// Two interfaces with one network would each get a part of the packets.
pub(crate) async fn refuse_foreign_subnet(names: &Names, helpers: &Helpers) -> Result<(), Failure> {
    let gateway = names.gateway().to_string();
    let answer = ip(helpers, &["-j", "-4", "addr", "show"]).await?;
    let interfaces: Vec<Interface> =
        serde_json::from_slice(&answer).during(|| "reading the answer of `ip addr`".to_owned())?;
    let holder = interfaces
        .iter()
        .find(|i| i.ifname != names.bridge() && i.addr_info.iter().any(|address| address.local == gateway));
    holder.map_or(Ok(()), |holder| {
        Err(Failure::new(
            format!("using the subnet {}", names.subnet()),
            format!("{gateway} is an address of {}; set another `subnet` in site.toml", holder.ifname),
        ))
    })
}

pub(crate) async fn remove(names: &Names, helpers: &Helpers) -> Result<(), Failure> {
    if !exists(names) {
        return Ok(());
    }
    ip(helpers, &["link", "del", names.bridge()]).await.map(drop)
}

/// The interfaces that are plugged into the bridge; none where there is no bridge.
pub(crate) fn ports(names: &Names) -> Vec<String> {
    let dir = PathBuf::from("/sys/class/net").join(names.bridge()).join("brif");
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

pub(crate) fn is_there(names: &Names) -> bool {
    exists(names)
}

pub(crate) fn number(name: &str) -> Option<u64> {
    fs::read_to_string(PathBuf::from("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

fn no_ipv6(bridge: &str) -> Result<(), Failure> {
    let name = format!("net/ipv6/conf/{bridge}/disable_ipv6");
    if PathBuf::from("/proc/sys").join(&name).exists() { sysctl(&name, "1") } else { Ok(()) }
}

fn sysctl(name: &str, value: &str) -> Result<(), Failure> {
    let path = PathBuf::from("/proc/sys").join(name);
    // Written only where it differs: a container may see /proc/sys read-only and already right.
    if fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).during(|| format!("setting {} to {value}", path.display()))
}
