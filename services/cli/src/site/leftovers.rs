//! What of a site is on the machine: the one list. The services' processes and whatever is mounted in the site's folder
//! are looked for here; node and builder say what there is of what they make.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use kiln_service::config::Site;
use kiln_service::machine::{Leftover, is_over};

use super::process::{command_line, pids};
use super::programs::{self, Program};
use super::supervisor;
use crate::failure::{During as _, Failure, Outcome};

pub(crate) async fn find(site: &Site) -> Outcome<Vec<Leftover>> {
    let mut found = BTreeSet::new();
    found.extend(processes(site, &programs::of(site)?)?);
    let table = fs::read_to_string("/proc/self/mountinfo").during("looking for mounts")?;
    found.extend(mounts(&table, site.id.as_str(), &site.home));
    for name in ["kiln-node", "kiln-builder"] {
        found.extend(told(name, site).await?);
    }
    Ok(found.into_iter().collect())
}

/// What `kiln-node --leftovers` and `kiln-builder --leftovers` print.
async fn told(name: &str, site: &Site) -> Outcome<Vec<Leftover>> {
    let text = asked(name, site, "--leftovers", "looking for what is left").await?;
    let parse = |line: &str| {
        Leftover::parse(line).ok_or_else(|| {
            Failure::failed(format!("reading what {name} --leftovers printed"), format!("`{line}`"))
        })
    };
    text.lines().map(parse).collect()
}

/// To look at a machine, or to clear a site off it, takes seconds; to write its images into a backup as long as their disk does.
const TASK: Duration = Duration::from_secs(3600);

/// Runs a service's program for a task beside its service, and gives what it printed.
pub(crate) async fn asked(name: &str, site: &Site, task: &str, what: &str) -> Outcome<String> {
    let binary = programs::sibling(name)?;
    let mut command = tokio::process::Command::new(&binary);
    command.arg("--home").arg(&site.home).arg(task).stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(TASK, command.output()).await.map_err(|_| {
        Failure::failed(
            what,
            format!("{} {task} did not end within {TASK:?} and was killed", binary.display()),
        )
    })?;
    let output = output.during(format_args!("starting {}", binary.display()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.trim().lines().last().unwrap_or_default().to_owned();
    Err(Failure::failed(what, format!("{} {task} ended with {}: {line}", binary.display(), output.status)))
}

/// What instances run under; each is given the site's folder.
const RUNTIMES: [&str; 3] = ["conmon", "runc", "crun"];

fn processes(site: &Site, programs: &[Program]) -> Outcome<Vec<Leftover>> {
    let pids = pids().during("looking for processes")?;
    let mut found = Vec::new();
    for pid in pids.into_iter().filter(|pid| !is_over(*pid)) {
        let line = command_line(pid);
        let program = line.first().and_then(|it| it.rsplit('/').next()).unwrap_or_default();
        let is_ours = supervisor::is_called(site, &line)
            || programs.iter().any(|program| program.is_called(&line))
            || (RUNTIMES.contains(&program) && line.iter().any(|part| lies_in(part, &site.home)));
        // One that ends meanwhile is in no group.
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if is_ours || groups.lines().any(|group| names(group, site.id.as_str())) {
            found.push(Leftover::process(pid));
        }
    }
    Ok(found)
}

/// Whether an argument, such as `--root=/var/lib/kiln/a/node/runc`, is a path in a folder.
fn lies_in(argument: &str, folder: &Path) -> bool {
    Path::new(argument.rsplit('=').next().unwrap_or_default()).starts_with(folder)
}

/// Whether a part of a path is one that carries the site's id.
fn names(path: &str, id: &str) -> bool {
    path.split('/').any(|part| {
        let rest = part.strip_prefix("kiln-").map(|rest| rest.strip_prefix("bake-").unwrap_or(rest));
        rest.and_then(|rest| rest.strip_prefix(id))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    })
}

fn mounts(table: &str, id: &str, home: &Path) -> Vec<Leftover> {
    // A space is written in octal there.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(|it| it.replace("\\040", " "));
    let ours = points.filter(|point| Path::new(point).starts_with(home) || names(point, id));
    ours.map(|point| Leftover::new("mount", point)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0a1b2c3d";

    #[test]
    fn mounts_are_the_sites_by_folder_or_by_id() {
        let points = |home: &str, points: &[&str]| {
            let table: String =
                points.iter().map(|point| format!("1 2 0:1 / {point} rw - tmpfs tmpfs rw\n")).collect();
            let found = mounts(&table, ID, Path::new(home));
            found.into_iter().map(|it| it.name).collect::<Vec<_>>()
        };
        let ours = [
            "/var/lib/kiln/a",
            "/var/lib/kiln/a/node/x",
            "/run/netns/kiln-0a1b2c3d-1",
            "/run/kiln-bake-0a1b2c3d/web-b1",
        ];
        assert_eq!(points("/var/lib/kiln/a", &ours), ours);
        let others = [
            "/var/lib/kiln/a2",
            "/var/lib/kiln",
            "/run/netns/kiln-0a1b2c3e-1",
            "/run/kiln-bake-ffffffff/web-b1",
            "/srv/kiln-0a1b2c3d4",
        ];
        assert_eq!(points("/var/lib/kiln/a", &others), Vec::<String>::new());
        assert_eq!(points("/srv/my site", &["/srv/my\\040site/node"]), ["/srv/my site/node"]);
    }

    #[test]
    fn another_site_with_a_longer_name_is_not_blamed() {
        let home = Path::new("/var/lib/kiln/local");
        assert!(lies_in("/var/lib/kiln/local", home));
        assert!(lies_in("--root=/var/lib/kiln/local/node/runc", home));
        assert!(!lies_in("/var/lib/kiln/local2", home));
        assert!(!lies_in("--root=/var/lib/kiln/local2/node/runc", home));
        assert!(names("0::/kiln-0a1b2c3d/web-r1-0-a1", ID));
        assert!(names("9:pids:/kiln-0a1b2c3d-bake-web-b1", ID));
        assert!(!names("0::/user.slice/kiln-0a1b2c3d4", ID));
    }
}
