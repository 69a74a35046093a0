//! Whether this machine can run a site: node and builder look at what they need, this at the rest, and shows it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;

use kiln_model::event::Service;
use kiln_service::config::Site;
use kiln_service::machine::Finding;
use serde_json::{Value, json};

use super::broker;
use super::network::port_of;
use super::programs::{self, Kind};
use crate::clients::Services;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::screen::Screen;
use crate::screen::{bad, busy, good, plain};

pub(crate) struct Report {
    findings: Vec<Finding>,
}

/// Scarce memory and disk are worth a word; whether they suffice depends on what is going to run. A firewall that drops
/// what no rule of its own takes may have such a rule.
const ADVICE: [&str; 3] = ["memory", "disk", "firewall"];

fn stands_in_the_way(it: &Finding) -> bool {
    !it.ok && !ADVICE.contains(&it.name.as_str())
}

impl Report {
    pub(crate) fn is_good(&self) -> bool {
        !self.findings.iter().any(stands_in_the_way)
    }

    pub(crate) fn document(&self) -> Value {
        json!({ "good": self.is_good(), "findings": self.findings })
    }

    /// All findings, or just those that are not good.
    pub(crate) fn show(&self, screen: Screen, only_bad: bool) -> Outcome {
        let rows: Vec<_> = self
            .findings
            .iter()
            .filter(|it| !only_bad || !it.ok)
            .map(|it| {
                let state = match it {
                    it if it.ok => good("ok"),
                    it if stands_in_the_way(it) => bad("BAD"),
                    _ => busy("look"),
                };
                vec![plain(&it.name), state, plain(&it.detail)]
            })
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        screen.table(&["CHECK", "STATE", "FOUND"], rows)?;
        let wanting = self.findings.iter().filter(|it| !it.ok);
        let steps: Vec<_> = wanting.map(|it| format!("{}: {}", it.name, it.fix)).collect();
        screen.next(&steps)
    }
}

pub(crate) async fn examine(home: &Home) -> Outcome<Report> {
    // With a site, what that one needs is looked at as well.
    let site = if home.exists() { Some(super::load(home)?) } else { None };
    let mut of_node = vec!["--doctor".to_owned()];
    if let Some(site) = &site {
        of_node.extend(["--home".to_owned(), site.home.display().to_string()]);
        for (setting, port) in own_ports(site)? {
            of_node.extend(["--own-port".to_owned(), format!("{setting}={port}")]);
        }
        for port in listen_ports(home).await? {
            of_node.extend(["--port".to_owned(), port.to_string()]);
        }
    }
    let of_builder = ["--doctor".to_owned()];
    let (node, builder) = tokio::join!(told("kiln-node", &of_node), told("kiln-builder", &of_builder));
    let mut findings = node?;
    findings.extend(builder?);
    findings.push(services()?);
    if site.as_ref().is_none_or(broker::is_own) {
        findings.push(nats_server().await);
    }
    Ok(Report { findings })
}

/// What a service's program finds.
async fn told(name: &str, arguments: &[String]) -> Outcome<Vec<Finding>> {
    let binary = programs::sibling(name)?;
    let mut command = tokio::process::Command::new(&binary);
    // Without a site it must not take one from here.
    command.args(arguments).env_remove("KILN_HOME").stdin(Stdio::null());
    let output = command.output().await.during(format_args!("starting {}", binary.display()))?;
    serde_json::from_slice(&output.stdout).map_err(|_| {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.trim().lines().last().unwrap_or("it printed nothing").to_owned();
        Failure::new(Code::Failed, "looking at this machine", format!("{}: {line}", binary.display()))
    })
}

/// The ports of what does not run, by the setting that names each: something else may hold them by now.
fn own_ports(site: &Site) -> Outcome<Vec<(String, u16)>> {
    let stopped = programs::of(site)?.into_iter().filter(|program| program.running().is_none());
    let ports = |kind| match kind {
        Kind::Broker => {
            port_of(&site.nats_url).map(|port| ("nats.url".to_owned(), port)).into_iter().collect()
        }
        Kind::Service(service) => {
            let of = |setting: &str, address: &SocketAddr| (format!("{setting}.{service}"), address.port());
            let metrics = site.metrics.get(&service).map(|address| of("metrics", address));
            let listen = site.listen.get(&service).map(|address| of("listen", address));
            metrics.into_iter().chain(listen).collect::<Vec<_>>()
        }
    };
    Ok(stopped.flat_map(|program| ports(program.kind)).collect())
}

/// The ports that users connect to; only the deployer knows them, and it may not run.
async fn listen_ports(home: &Home) -> Outcome<Vec<u16>> {
    let fleets = match Services::open(home)?.fleets().await {
        Err(failure) if failure.is_unavailable() => return Ok(Vec::new()),
        fleets => fleets?,
    };
    let ports = fleets.iter().filter(|fleet| !fleet.removed).flat_map(|fleet| &fleet.ports);
    let mut ports: Vec<_> = ports.filter_map(|port| u16::try_from(port.listen).ok()).collect();
    ports.sort_unstable();
    ports.dedup();
    Ok(ports)
}

fn services() -> Outcome<Finding> {
    let paths = Service::ALL.iter().map(|service| programs::sibling(&format!("kiln-{service}")));
    let missing: Vec<_> = paths
        .collect::<Outcome<Vec<PathBuf>>>()?
        .into_iter()
        .filter(|path| !path.is_file())
        .map(|path| path.display().to_string())
        .collect();
    let found = if missing.is_empty() { "all four are there".to_owned() } else { missing.join(", ") };
    let fix = "put Kiln's programs into one folder; in a checkout: cargo build --release --workspace --bins";
    Ok(Finding::of("services", missing.is_empty(), found, fix))
}

/// The first version that takes every setting of the site's own broker, TLS 1.3 and no older among them.
const BROKER: (u32, u32) = (2, 11);

async fn nats_server() -> Finding {
    const NAME: &str = "nats-server";
    let fix = "deploy/prerequisites.sh installs one; or put nats-server 2.11 or newer on the PATH, name one with \
               KILN_NATS_SERVER, or use a broker that runs: kiln up --nats-url";
    let binary = match programs::nats_server() {
        Ok(binary) => binary,
        Err(failure) => return Finding::bad(NAME, failure.line(), fix),
    };
    let said = tokio::process::Command::new(&binary).arg("--version").stdin(Stdio::null()).output().await;
    let said = match said {
        Ok(said) => String::from_utf8_lossy(&said.stdout).trim().to_owned(),
        Err(error) => return Finding::bad(NAME, format!("{}: {error}", binary.display()), fix),
    };
    let new_enough = version(&said).is_some_and(|version| version >= BROKER);
    Finding::of(NAME, new_enough, format!("{}: {said}", binary.display()), fix)
}

/// Of `nats-server: v2.14.4`, and of `nats-server: v2.11.0-RC.1`.
fn version(said: &str) -> Option<(u32, u32)> {
    let mut parts = said.rsplit(['v', ' ']).find(|part| part.contains('.'))?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_taken_by_its_version() {
        assert_eq!(version("nats-server: v2.14.4"), Some((2, 14)));
        assert_eq!(version("nats-server: v2.11.0-RC.1"), Some((2, 11)));
        for old in ["nats-server: v2.9.25", "nats-server: v2.10.29"] {
            assert!(version(old).is_some_and(|it| it < BROKER), "{old}");
        }
        assert_eq!(version("something else"), None);
        assert_eq!(version(""), None);
    }

    #[test]
    fn scarce_memory_is_no_obstacle() {
        let report = |name: &str| Report { findings: vec![Finding::bad(name, "", "")] };
        assert!(report("memory").is_good());
        assert!(!report("nftables").is_good());
    }
}
