//! The site's nftables table: its shape, reading it back, and scripts that change its elements.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use serde_json::Value;

use super::Slots;
use super::slots::SLOTS;
use crate::failure::{During, Failure};
use crate::helper::Helpers;
use crate::names::Names;

const LIMIT: Duration = Duration::from_secs(20);

/// An empty chain of this name marks a table whose chains are those that `shape` writes. Count it up with each change
/// there: a node that finds another mark makes the table anew.
const MARK: &str = "shape_1";

fn shape(names: &Names) -> String {
    let (subnet, local_users) = (names.subnet().to_string(), names.local_users().to_string());
    shape_of(&names.table(), names.bridge(), &subnet, &local_users)
}

fn shape_of(table: &str, bridge: &str, subnet: &str, local_users: &str) -> String {
    // Every packet to a local address is looked up by its port and a random slot. One that finds no element goes on to
    // the machine itself.
    let lookup = format!("fib daddr type local dnat ip to tcp dport . numgen random mod {SLOTS} map @be");
    format!(
        r#"
add table ip {table}
delete table ip {table}
table ip {table} {{
  map be {{ typeof tcp dport . numgen random mod {SLOTS} : ip daddr . tcp dport; }}
  chain {MARK} {{ }}
  chain prerouting {{ type nat hook prerouting priority -100; policy accept; {lookup}; }}
  chain output {{ type nat hook output priority -100; policy accept; {lookup}; }}
  # route_localnet lets 127.0.0.0/8 be routed to and from the bridge: instances must not use it.
  chain loopback {{ type filter hook prerouting priority -300; policy accept;
    iifname "{bridge}" ip daddr 127.0.0.0/8 drop
    iifname "{bridge}" ip saddr 127.0.0.0/8 drop
  }}
  # Instances answer the machine (probes, local users) and never begin.
  chain input {{ type filter hook input priority 0; policy accept;
    iifname "{bridge}" ct state established,related accept
    iifname "{bridge}" drop
  }}
  # From outside only what came by the edge.
  chain forward {{ type filter hook forward priority 0; policy accept;
    oifname "{bridge}" ct state established,related accept
    oifname "{bridge}" ct status dnat accept
    oifname "{bridge}" iifname != "{bridge}" drop
  }}
  chain postrouting {{ type nat hook postrouting priority 100; policy accept;
    oifname "{bridge}" ip saddr 127.0.0.0/8 snat to {local_users}
    oifname "{bridge}" ip saddr {subnet} ct status dnat snat to {local_users}
    ip saddr {subnet} oifname != "{bridge}" masquerade
  }}
}}
"#
    )
}

/// Makes the table with no element, in the place of one that may be there.
pub(super) async fn make(names: &Names, helpers: &Helpers) -> Result<(), Failure> {
    run(helpers, &shape(names)).await
}

/// Whether the kernel would take such a table; it is not kept.
pub(crate) async fn try_out(helpers: &Helpers) -> Result<(), Failure> {
    let text = shape_of("kiln_doctor", "kiln-doctor", "10.77.0.0/24", "10.77.0.2");
    run(helpers, &format!("{text}\ndelete table ip kiln_doctor\n")).await
}

/// Runs a script as one transaction.
pub(super) async fn run(helpers: &Helpers, script: &str) -> Result<(), Failure> {
    let mut command = helpers.command("nft")?;
    command.args(["-f", "-"]);
    helpers.run(command, script.as_bytes(), LIMIT).await.map(drop)
}

async fn list(helpers: &Helpers, args: &[&str]) -> Result<Value, Failure> {
    let mut command = helpers.command("nft")?;
    command.arg("-j").args(args);
    let answer = helpers.run(command, b"", LIMIT).await?;
    serde_json::from_slice(&answer).during(|| format!("reading the answer of nft {}", args.join(" ")))
}

/// Values of one kind in nft's answer.
fn objects<'a>(answer: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    answer["nftables"].as_array().into_iter().flatten().filter_map(move |object| object.get(kind))
}

/// Names of the tables that sites have made.
async fn tables(helpers: &Helpers) -> Result<Vec<String>, Failure> {
    let answer = list(helpers, &["list", "tables", "ip"]).await?;
    let names = objects(&answer, "table").filter_map(|table| table["name"].as_str());
    Ok(names.filter(|name| name.starts_with("kiln_")).map(str::to_owned).collect())
}

pub(crate) async fn exists(names: &Names, helpers: &Helpers) -> Result<bool, Failure> {
    Ok(tables(helpers).await?.contains(&names.table()))
}

/// Takes the whole edge away; fine if there is none.
pub(crate) async fn remove(names: &Names, helpers: &Helpers) -> Result<(), Failure> {
    let table = names.table();
    run(helpers, &format!("add table ip {table}\ndelete table ip {table}\n")).await
}

/// The elements of the table; none where there is no table of the shape that this program makes.
pub(super) async fn read(names: &Names, helpers: &Helpers) -> Result<Option<Slots>, Failure> {
    if !exists(names, helpers).await? {
        return Ok(None);
    }
    let answer = list(helpers, &["list", "table", "ip", &names.table()]).await?;
    if !objects(&answer, "chain").any(|chain| chain["name"] == MARK) {
        return Ok(None);
    }
    let what = || format!("reading the map of table {}", names.table());
    let map = objects(&answer, "map").find(|map| map["name"] == "be");
    let map =
        map.ok_or_else(|| Failure::new(what(), "it is not there; delete the table, the node makes it anew"))?;
    let mut slots: BTreeMap<u16, BTreeMap<usize, SocketAddrV4>> = BTreeMap::new();
    for (listen, slot, backend) in elements(map) {
        slots.entry(listen).or_default().insert(slot, backend);
    }
    // A port is either absent or has every slot, as each transaction leaves it so.
    let whole = slots.values().all(|port| port.len() == SLOTS);
    Ok(whole
        .then(|| slots.into_iter().map(|(listen, port)| (listen, port.into_values().collect())).collect()))
}

fn elements(map: &Value) -> impl Iterator<Item = (u16, usize, SocketAddrV4)> {
    map["elem"].as_array().into_iter().flatten().filter_map(|element| {
        let (key, value) = (&element[0]["concat"], &element[1]["concat"]);
        let address: Ipv4Addr = value[0].as_str()?.parse().ok()?;
        let port = |number: &Value| u16::try_from(number.as_u64()?).ok();
        let backend = SocketAddrV4::new(address, port(&value[1])?);
        Some((port(&key[0])?, usize::try_from(key[1].as_u64()?).ok()?, backend))
    })
}

/// Another site that has this port on its edge.
pub(super) async fn other_site_with(
    names: &Names,
    helpers: &Helpers,
    listen: u16,
) -> Result<Option<String>, Failure> {
    for table in tables(helpers).await?.into_iter().filter(|table| *table != names.table()) {
        // The other site may go away between the two calls.
        let Ok(answer) = list(helpers, &["list", "map", "ip", &table, "be"]).await else { continue };
        if objects(&answer, "map").flat_map(elements).any(|(port, ..)| port == listen) {
            return Ok(Some(format!("another site of Kiln (nft table ip {table})")));
        }
    }
    Ok(None)
}

/// The script that turns one set of elements into another; empty where they are equal.
pub(super) fn difference(names: &Names, now: &Slots, next: &Slots) -> String {
    let none = Vec::new();
    let (mut gone, mut new) = (String::new(), String::new());
    let mut ports: Vec<u16> = now.keys().chain(next.keys()).copied().collect();
    ports.sort_unstable();
    ports.dedup();
    for listen in ports {
        let before = now.get(&listen).unwrap_or(&none);
        let after = next.get(&listen).unwrap_or(&none);
        for slot in 0..SLOTS {
            let (before, after) = (before.get(slot), after.get(slot));
            if before == after {
                continue;
            }
            // Writing to a String can't fail.
            if before.is_some() {
                let _ = write!(gone, "{listen} . {slot},");
            }
            if let Some(backend) = after {
                let _ = write!(new, "{listen} . {slot} : {} . {},", backend.ip(), backend.port());
            }
        }
    }
    let table = names.table();
    let line = |verb: &str, elements: &str| match elements {
        "" => String::new(),
        elements => format!("{verb} element ip {table} be {{ {elements} }}\n"),
    };
    line("delete", &gone) + &line("add", &new)
}
