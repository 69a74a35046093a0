//! Looks at the machine before anything is baked on it: what is missing, and what to do about it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_service::machine::Finding;
use rustix::mount::{MountFlags, mount};

use super::error::BakeError;
use super::fetch::APT_HELPER;
use super::rights;
use super::sources::{Archive, host_archives};
use super::work::{clear, mount_overlay, mount_shifted};

/// How each program says its version, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 4] =
    [("apt-get", "apt"), ("apt-config", "apt"), ("git", "git"), ("prlimit", "util-linux")];

/// Looks at everything that a bake needs. Changes nothing that stays.
pub fn examine() -> Vec<Finding> {
    let mut all: Vec<_> = PROGRAMS.iter().map(|(name, package)| program(name, package)).collect();
    all.push(apt_helper());
    all.push(sources(host_archives()));
    all.push(rights());
    all.push(mounts());
    all
}

fn program(name: &str, package: &str) -> Finding {
    let fix = format!("apt-get install {package}");
    match Command::new(name).arg("--version").output() {
        Ok(said) if said.status.success() => {
            let text = String::from_utf8_lossy(&said.stdout).into_owned();
            Finding::good(name, text.lines().next().unwrap_or_default())
        }
        Ok(said) => Finding::bad(name, said.status.to_string(), fix),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Finding::bad(name, "is not installed", fix)
        }
        Err(error) => Finding::bad(name, error.to_string(), fix),
    }
}

fn rights() -> Finding {
    const NAME: &str = "build-rights";
    match rights::check() {
        Ok(()) => Finding::good(NAME, "all capabilities that a bake uses"),
        Err(BakeError::Machine { why, remedy, .. }) => Finding::bad(NAME, why, remedy),
        Err(error) => Finding::bad(NAME, error.to_string(), ""),
    }
}

fn apt_helper() -> Finding {
    let there = Path::new(APT_HELPER).is_file();
    Finding::of("apt-helper", there, APT_HELPER, "apt-get install apt; it fetches the packages")
}

/// Suites that a definition gets without naming archives of its own.
fn sources(archives: Result<Vec<Archive>, BakeError>) -> Finding {
    const NAME: &str = "apt-sources";
    let fix = "write one, `deb <address of an archive> bookworm main`, into /etc/apt/sources.list; or `archives` below \
               `from` in each server.yaml";
    match archives {
        Ok(archives) => {
            let suites: BTreeSet<_> = archives
                .iter()
                .map(|archive| archive.suite.as_str())
                .filter(|suite| !suite.contains(['-', '/']))
                .collect();
            let named = suites.into_iter().collect::<Vec<_>>().join(", ");
            let found = if named.is_empty() { "no suite in /etc/apt".to_owned() } else { named.clone() };
            Finding::of(NAME, !named.is_empty(), found, fix)
        }
        Err(error) => Finding::bad(NAME, error.to_string(), fix),
    }
}

/// The mounts of a bake, tried out one on the other: user namespaces, mounts with other owners, and overlays.
fn mounts() -> Finding {
    const NAME: &str = "build-mounts";
    let fix = "bakes need overlayfs and id-mapped mounts (Linux 6.5 or newer), root, and user namespaces: modprobe \
               overlay; sysctl -w user.max_user_namespaces=15000";
    let folder = PathBuf::from(format!("/run/kiln-doctor-{}", std::process::id()));
    let tried = try_mounts(&folder);
    let cleared = clear(&folder).map_err(BakeError::io("clear", &folder));
    match tried.and(cleared) {
        Ok(()) => Finding::good(NAME, "an overlay of an id-mapped mount can be made"),
        Err(error) => Finding::bad(NAME, error.to_string(), fix),
    }
}

fn try_mounts(folder: &Path) -> Result<(), BakeError> {
    fs::create_dir(folder).map_err(BakeError::io("make folder", folder))?;
    mount("tmpfs", folder, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, c"size=1m,mode=0700")
        .map_err(|errno| BakeError::io("mount tmpfs on", folder)(errno.into()))?;
    let make = |name: &str| {
        let path = folder.join(name);
        fs::create_dir(&path).map_err(BakeError::io("make folder", &path)).map(|()| path)
    };
    let (tree, lower, upper, scratch, root) =
        (make("tree")?, make("lower")?, make("upper")?, make("scratch")?, make("root")?);
    mount_shifted(&tree, &lower, true)?;
    mount_overlay(&[lower], &upper, &scratch, &root)
}

#[cfg(test)]
mod tests {
    use super::super::sources::Signer;
    use super::*;

    #[test]
    fn a_machine_without_a_suite_is_told_what_to_write() {
        let archive = |suite: &str| Archive {
            url: "http://a.test".to_owned(),
            suite: suite.to_owned(),
            components: vec!["main".to_owned()],
            signed_by: Signer::HostKeys,
        };
        let good = sources(Ok(vec![archive("bookworm-security"), archive("bookworm"), archive("trixie")]));
        assert_eq!(good, Finding::good("apt-sources", "bookworm, trixie"));
        for none in [Vec::new(), vec![archive("./"), archive("bookworm-updates")]] {
            let bad = sources(Ok(none));
            assert!(!bad.ok && bad.fix.contains("sources.list"), "{bad:?}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_names_its_package() {
        let bad = program("kiln-no-such-program", "some-package");
        assert!(!bad.ok && bad.fix == "apt-get install some-package", "{bad:?}");
        assert!(program("git", "git").ok);
    }
}
