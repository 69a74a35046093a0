//! What a reboot takes from a machine beside its processes: everything that the kernel alone knew.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_tests::Result;
use kiln_tests::site::Site;
use kiln_tests::wait::until;

const GONE: Duration = Duration::from_secs(30);

/// Takes a site's mounts, namespaces, devices, rules and control groups off the machine. What lies in files stays.
///
/// # Errors
/// What is left when the bound is over.
pub(crate) async fn forgets(site: &Site) -> Result<()> {
    until("the kernel to have forgotten the site", GONE, async || {
        let mut there = things(site)?;
        // A mount on a mount goes before that.
        there.sort();
        for (kind, name) in there.iter().rev() {
            remove(kind, name)?;
        }
        let left = things(site)?;
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}").into()) }
    })
    .await
}

fn things(site: &Site) -> Result<Vec<(String, String)>> {
    let lines = site.on_machine()?;
    let things = lines.iter().filter_map(|line| line.split_once(": "));
    // Leases are files.
    let of_kernel = things.filter(|(kind, _)| *kind != "lease");
    Ok(of_kernel.map(|(kind, name)| (kind.to_owned(), name.to_owned())).collect())
}

/// With the groups in it.
fn remove_group(group: &Path) {
    let entries = std::fs::read_dir(group).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|it| it.is_dir())) {
        remove_group(&entry.path());
    }
    let _ = std::fs::remove_dir(group);
}

/// What can't go yet is tried again, and what went with another thing is gone.
fn remove(kind: &str, name: &str) -> Result<()> {
    let words = match kind {
        "cgroup" => {
            remove_group(Path::new(name));
            return Ok(());
        }
        "mount" => format!("umount --lazy {name}"),
        // It lies on a tmpfs. What is still mounted in it keeps its files, which may be those of a cache.
        "folder" => format!("rm --recursive --force --one-file-system {name}"),
        "netns" => format!("ip netns delete {name}"),
        "bridge" | "interface" => format!("ip link delete {name}"),
        "nft table" => format!("nft delete table {name}"),
        "iptables rule" => format!("iptables -w 5 {}", name.replacen("-A ", "-D ", 1).replace('"', "")),
        _ => return Err(format!("how does a reboot end this: {kind}: {name}").into()),
    };
    let mut words = words.split(' ');
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).stderr(Stdio::null()).status()?;
    Ok(())
}
