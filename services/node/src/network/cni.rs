//! The CNI `bridge` plugin with `host-local` addresses.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::namespace;
use crate::failure::{During, Failure};
use crate::helper::Helpers;
use crate::names::Names;

/// Where distributions put the plugins.
pub(crate) const PLUGIN_DIRS: [&str; 3] = ["/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"];

/// A plugin takes 30 ms; it waits for others that hold the leases' lock.
const LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone)]
pub(crate) struct Cni {
    helpers: Helpers,
    plugins: PathBuf,
    network: String,
    config: String,
}

#[derive(Deserialize)]
struct Added {
    ips: Vec<AddedAddress>,
}

#[derive(Deserialize)]
struct AddedAddress {
    address: String,
}

/// The folder that has the plugins.
pub(crate) fn plugin_dir() -> Option<&'static Path> {
    let usable = |dir: &&Path| dir.join("bridge").is_file() && dir.join("host-local").is_file();
    PLUGIN_DIRS.iter().map(Path::new).find(usable)
}

impl Cni {
    pub(crate) fn new(names: &Names, helpers: Helpers) -> Result<Self, Failure> {
        let plugins = plugin_dir().ok_or_else(|| {
            let why = format!(
                "`bridge` and `host-local` are in none of {}; install them (Debian: containernetworking-plugins)",
                PLUGIN_DIRS.join(", ")
            );
            Failure::new("looking for the CNI plugins", why)
        })?;
        let subnet = names.subnet();
        let network = names.cgroup();
        let config = json!({
            "cniVersion": "1.0.0",
            "name": network,
            "type": "bridge",
            "bridge": names.bridge(),
            "isGateway": true,
            // An instance that calls its own server may be sent to itself. Where br_netfilter is loaded, the bridge then
            // has to give a frame back to the port that it came from.
            "hairpinMode": true,
            "ipam": {
                "type": "host-local",
                "dataDir": names.leases_dir(),
                "ranges": [[{
                    "subnet": subnet.to_string(),
                    "rangeStart": names.first_instance(),
                    "gateway": names.gateway(),
                }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        });
        Ok(Self { helpers, plugins: plugins.to_owned(), network, config: config.to_string() })
    }

    async fn call(&self, verb: &str, namespace: &str) -> Result<Vec<u8>, Failure> {
        // Without a namespace DEL gives the address back, and does not look for an interface.
        let netns = if namespace::is_there(namespace) { namespace::path(namespace) } else { PathBuf::new() };
        let mut command = self.helpers.command(self.plugins.join("bridge"))?;
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", namespace)
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.plugins);
        let what = || format!("CNI {verb} of {namespace} on {}", self.network);
        self.helpers.run(command, self.config.as_bytes(), LIMIT).await.during(what)
    }

    /// Plugs a namespace in.
    pub(crate) async fn add(&self, namespace: &str) -> Result<Ipv4Addr, Failure> {
        let answer = self.call("ADD", namespace).await?;
        let what = || format!("reading the answer to CNI ADD of {namespace}");
        let added: Added = serde_json::from_slice(&answer).during(what)?;
        let address = added.ips.first().and_then(|ip| ip.address.split('/').next()?.parse().ok());
        address.ok_or_else(|| Failure::new(what(), "it has no IPv4 address"))
    }

    /// Unplugs a namespace and gives its address back; fine if it was done before.
    pub(crate) async fn del(&self, namespace: &str) -> Result<(), Failure> {
        self.call("DEL", namespace).await.map(drop)
    }
}

/// Namespaces that hold an address: host-local keeps a file per address, whose first line is the holder.
pub(crate) fn leases(names: &Names) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(names.leases_dir().join(names.cgroup())) else { return Vec::new() };
    let holder = |entry: std::fs::DirEntry| {
        entry.file_name().to_str()?.parse::<Ipv4Addr>().ok()?;
        let text = std::fs::read_to_string(entry.path()).ok()?;
        Some(text.lines().next()?.trim().to_owned())
    };
    entries.flatten().filter_map(holder).collect()
}
