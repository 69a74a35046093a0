//! What of a site is on the machine: everything that Kiln makes carries the site's id or lies in its folder.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use kiln_service::config::Site;
use serde::Serialize;

use super::process::command_line;

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Leftover {
    pub(crate) kind: &'static str,
    pub(crate) name: String,
}

/// Looked for by the kernel's own lists, not by what the node believes to have made.
pub(crate) fn find(site: &Site) -> Vec<Leftover> {
    let id = format!("kiln-{}", site.id);
    let table = format!("kiln_{}", site.id);
    let home = site.home.display().to_string();
    let mut found = Vec::new();
    let mut add =
        |kind, names: Vec<String>| found.extend(names.into_iter().map(|name| Leftover { kind, name }));
    add("process", processes(&id, &home));
    add("mount", mounts(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(), &id, &home));
    add("network namespace", entries("/run/netns", &id));
    add("address lease", entries("/var/lib/cni/networks", &id));
    add("network interface", entries("/sys/class/net", &site.bridge));
    let mut groups = Vec::new();
    cgroups(Path::new("/sys/fs/cgroup"), &id, 4, &mut groups);
    add("cgroup", groups);
    add("firewall rule", firewall(&id, &table));
    found.sort();
    found
}

const PROGRAMS: [&str; 8] =
    ["kiln-node", "kiln-builder", "kiln-deployer", "kiln-monitor", "nats-server", "conmon", "runc", "crun"];

fn processes(id: &str, home: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut found = Vec::new();
    for pid in pids.filter(|pid| !is_over(*pid)) {
        let line = command_line(pid);
        let program = line.first().and_then(|it| it.rsplit('/').next()).unwrap_or_default().to_owned();
        let named = line.iter().any(|part| part.contains(home) || part.contains(id));
        let ours =
            PROGRAMS.contains(&program.as_str()) || line.iter().any(|part| part == super::supervisor::MARK);
        let inside = fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| text.contains(id));
        if (named && ours) || inside {
            found.push(format!("{pid} {program}"));
        }
    }
    found
}

/// Ended, and waiting for its parent to ask how: it holds nothing but its number.
fn is_over(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in front of the state may hold anything, also `)`.
    stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']))
}

fn mounts(table: &str, id: &str, home: &str) -> Vec<String> {
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let inside =
        |point: &str| point == home || point.strip_prefix(home).is_some_and(|rest| rest.starts_with('/'));
    points.filter(|point| inside(point) || point.contains(id)).map(ToOwned::to_owned).collect()
}

fn entries(folder: &str, part: &str) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(part)).collect()
}

fn cgroups(folder: &Path, id: &str, depth: u32, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().contains(id) {
            found.push(entry.path().display().to_string());
        } else if depth > 0 {
            cgroups(&entry.path(), id, depth - 1, found);
        }
    }
}

/// Tables of the site, and rules elsewhere that name it.
fn firewall(id: &str, table: &str) -> Vec<String> {
    let output = Command::new("nft").args(["list", "ruleset"]).output();
    let text = output.map(|it| String::from_utf8_lossy(&it.stdout).into_owned()).unwrap_or_default();
    let lines = text.lines().map(str::trim).filter(|line| line.contains(id) || line.contains(table));
    // A rule that is there twice is told once.
    lines.map(ToOwned::to_owned).collect::<BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_below_the_home_are_the_sites() {
        let table = "1 2 0:1 / /var/lib/kiln/a rw - tmpfs tmpfs rw\n\
             1 2 0:1 / /var/lib/kiln/a/node/x rw - overlay overlay rw\n\
             1 2 0:1 / /var/lib/kiln/ab rw - tmpfs tmpfs rw\n\
             1 2 0:1 / /run/netns/kiln-0a1b2c3d-1 rw - nsfs nsfs rw\n";
        assert_eq!(
            mounts(table, "kiln-0a1b2c3d", "/var/lib/kiln/a"),
            ["/var/lib/kiln/a", "/var/lib/kiln/a/node/x", "/run/netns/kiln-0a1b2c3d-1"]
        );
    }

    #[test]
    fn groups_are_found_wherever_they_hang() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("memory/kiln-0a1b2c3d/web-r1-0-a1")).unwrap();
        fs::create_dir_all(folder.path().join("memory/kiln-ffffffff")).unwrap();
        let mut found = Vec::new();
        cgroups(folder.path(), "kiln-0a1b2c3d", 4, &mut found);
        assert_eq!(found, [folder.path().join("memory/kiln-0a1b2c3d").display().to_string()]);
    }
}
