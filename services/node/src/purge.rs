//! Taking everything of a site off the machine, and looking for what is left.

use std::fs;
use std::io;

use kiln_service::machine::Leftover;

use crate::boot::made;
use crate::cgroup::{self, Cgroup};
use crate::edge;
use crate::failure::{During, Failure};
use crate::helper::Helpers;
use crate::names::Names;
use crate::network::{Cni, bridge, firewall, leases, namespace};
use crate::rootfs;

/// Removes every instance and everything else that carries the site's id. The node must not run. Its store, logs and
/// images stay. Fine if there is nothing.
pub async fn purge(names: &Names) -> Result<(), Failure> {
    let site = names.cgroup();
    let group = site.clone();
    let helpers = blocking(move || Cgroup::make(&group, Cgroup::HELPERS)).await?;
    let (helpers, own) = blocking({
        let names = names.clone();
        move || {
            helpers.empty()?;
            remove_instances(&names)?;
            Ok((Helpers::new(helpers), names))
        }
    })
    .await?;
    let mut namespaces = namespace::list(&own.netns_prefix())?;
    namespaces.extend(leases(&own));
    namespaces.sort();
    namespaces.dedup();
    let cni = Cni::new(&own, helpers.clone());
    for name in &namespaces {
        if let Ok(cni) = &cni {
            // Leases go with their folder below, interfaces with the namespace.
            let _ = cni.del(name).await;
        }
        namespace::remove(name)?;
    }
    edge::remove(&own, &helpers).await?;
    firewall::remove(&own, &helpers).await;
    bridge::remove(&own, &helpers).await?;
    remove_all(&own.leases_dir())?;
    drop((cni, helpers));
    blocking(move || {
        for group in cgroup::groups(&site)? {
            Cgroup::named(&site, &group)?.empty()?;
        }
        cgroup::remove_everywhere(&site)
    })
    .await
}

/// Instances first end all at once, then each is cleared away.
fn remove_instances(names: &Names) -> Result<(), Failure> {
    let site = names.cgroup();
    for group in cgroup::groups(&site)?.iter().filter(|group| *group != Cgroup::HELPERS) {
        Cgroup::named(&site, group)?.empty()?;
        cgroup::remove_everywhere(&format!("{site}/{group}"))?;
    }
    for id in made(names)? {
        rootfs::remove(&names.instance_dir(&id))?;
    }
    remove_all(&names.runc_root())?;
    rootfs::remove(&names.instances_dir())
}

fn remove_all(dir: &std::path::Path) -> Result<(), Failure> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Failure::new(format!("removing {}", dir.display()), error))
        }
        _ => Ok(()),
    }
}

/// Everything that the node made on the machine and is there: it carries the site's id.
pub async fn leftovers(names: &Names) -> Result<Vec<Leftover>, Failure> {
    let mut found = Vec::new();
    found.extend(cgroup::places(&names.cgroup())?.iter().map(|dir| Leftover::new("cgroup", dir.display())));
    found.extend(cgroup::processes(&names.cgroup())?.iter().map(Leftover::process));
    let mounts = rootfs::mounts_below(&names.node_dir())?;
    found.extend(mounts.iter().map(|at| Leftover::new("mount", at.display())));
    found.extend(namespace::list(&names.netns_prefix())?.iter().map(|name| Leftover::new("netns", name)));
    found.extend(leases(names).iter().map(|name| Leftover::new("lease", format!("of {name}"))));
    if bridge::is_there(names) {
        found.push(Leftover::new("bridge", names.bridge()));
        found.extend(bridge::ports(names).iter().map(|port| Leftover::new("interface", port)));
    }
    let helpers = Helpers::outside();
    if edge::exists(names, &helpers).await? {
        found.push(Leftover::new("nft table", format!("ip {}", names.table())));
    }
    let rules = firewall::left(names, &helpers).await;
    found.extend(rules.iter().map(|rule| Leftover::new("iptables rule", rule)));
    Ok(found)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work).await.during(|| "clearing the machine".to_owned())?
}
