//! What everything that a site makes on the machine is called. Each name carries the site's id, so that several sites
//! run side by side and what is left over can be found.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use kiln_model::event::Service;
use kiln_model::name::SiteId;
use kiln_service::config::{Site, Subnet};

/// Names and places of one site on this machine.
#[derive(Debug, Clone)]
pub struct Names {
    site: SiteId,
    dir: PathBuf,
    bridge: String,
    subnet: Subnet,
}

impl Names {
    pub fn of(site: &Site) -> Self {
        Self {
            site: site.id.clone(),
            dir: site.paths().service(Service::Node),
            bridge: site.bridge.clone(),
            subnet: site.subnet,
        }
    }

    pub fn site(&self) -> &SiteId {
        &self.site
    }

    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    pub(crate) fn gateway(&self) -> Ipv4Addr {
        self.subnet.host(1)
    }

    /// Connections from 127.0.0.0/8 reach instances under this address. It is not the gateway's own: the node's probes
    /// come from there, and translated connections would take their ports away.
    pub(crate) fn local_users(&self) -> Ipv4Addr {
        self.subnet.host(2)
    }

    pub(crate) fn first_instance(&self) -> Ipv4Addr {
        self.subnet.host(10)
    }

    /// The nft table, of family `ip`.
    pub fn table(&self) -> String {
        format!("kiln_{}", self.site)
    }

    /// The cgroup, from the root of each hierarchy, without a leading slash.
    pub fn cgroup(&self) -> String {
        format!("kiln-{}", self.site)
    }

    pub fn netns_prefix(&self) -> String {
        format!("kiln-{}-", self.site)
    }

    pub fn node_dir(&self) -> PathBuf {
        self.dir.clone()
    }

    /// Bundles, root file systems and writable memory of instances that have not ended.
    pub(crate) fn instances_dir(&self) -> PathBuf {
        self.dir.join("instances")
    }

    pub(crate) fn instance_dir(&self, id: &str) -> PathBuf {
        self.instances_dir().join(id)
    }

    pub(crate) fn logs_dir(&self) -> PathBuf {
        self.dir.join("logs")
    }

    pub(crate) fn log_file(&self, id: &str) -> PathBuf {
        self.logs_dir().join(format!("{id}.log"))
    }

    /// Where conmon leaves exit codes, one file per instance.
    pub(crate) fn exits_dir(&self) -> PathBuf {
        self.dir.join("exits")
    }

    pub(crate) fn runc_root(&self) -> PathBuf {
        self.dir.join("runc")
    }

    pub(crate) fn leases_dir(&self) -> PathBuf {
        self.dir.join("cni")
    }
}
