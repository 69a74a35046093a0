//! Packages into a tree: unpacked from outside, configured inside.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Instant;

use kiln_builder_core::build::Phase;
use kiln_model::lock::LockedPackage;
use rustix::fs::FileType;

use super::deb::Deb;
use super::dpkg::Database;
use super::error::BakeError;
use super::owners;
use super::packages::PackageStore;
use super::sandbox::{Access, Folder, Job, PATH, Rights, Sandbox};
use super::tree::{SHIFT, Tree};
use super::unpack::{Trouble, Unpacked, unpack};
use super::work::mount_shifted;
use crate::timings::Timings;

/// Without syncs: the tree lies in memory. A configuration file that a files step has put there stays.
const DPKG: &str = "dpkg --force-unsafe-io --force-confdef --force-confold";
const POLICY: &[u8] = b"usr/sbin/policy-rc.d";
/// Where the sandbox sees the package files.
const DEBS: &str = "/tmp/debs";

pub(crate) struct Installer<'a> {
    pub(crate) sandbox: &'a Sandbox<'a>,
    pub(crate) store: &'a PackageStore,
    pub(crate) architecture: &'a str,
    pub(crate) timings: &'a Timings,
}

impl Installer<'_> {
    /// A whole system into an empty tree, which is mounted at `root` for the sandbox and stays so. Gives the time of its
    /// youngest file.
    pub(crate) fn base(
        &self,
        step: &str,
        packages: &[LockedPackage],
        tree_path: &Path,
        root: &Path,
    ) -> Result<i64, BakeError> {
        let tree = Tree::open(tree_path, 0).map_err(BakeError::io("open", tree_path))?;
        let debs = self.open(packages)?;
        let unpacked = self.unpack(&debs, &tree)?;
        let database = Database::default();
        database.add(&tree, &debs, &unpacked, self.architecture)?;
        mount_shifted(tree_path, root, false)?;
        let stamp = newest(&unpacked);
        self.configure(step, &tree, root, &debs, &[], stamp)?;
        complete(&tree)?;
        Ok(stamp)
    }

    /// Packages on top of a system. `Err` is not a failure, but says why this is dpkg's work; the tree is spoilt then.
    pub(crate) fn step(
        &self,
        step: &str,
        packages: &[LockedPackage],
        root: &Path,
        stamp: i64,
    ) -> Result<Result<i64, String>, BakeError> {
        if packages.is_empty() {
            return Ok(Ok(stamp));
        }
        let tree = Tree::open(root, SHIFT).map_err(BakeError::io("open", root))?;
        let database = Database::read(&tree)?;
        let debs = self.open(packages)?;
        if let Some(why) = database.needs_dpkg(&debs) {
            return Ok(Err(why));
        }
        let began = Instant::now();
        let unpacking = || unpack(&debs, &tree, self.sandbox.cancel);
        let unpacked = match self.timings.during(Phase::Unpack, unpacking) {
            Ok(unpacked) => unpacked,
            Err(Trouble::Taken { package, path }) => {
                return Ok(Err(format!("{package} brings {path}, which is there")));
            }
            Err(Trouble::Failed(error)) => return Err(error),
        };
        if let Some(why) = database.diverted(&tree, &unpacked)? {
            return Ok(Err(why));
        }
        self.tell("unpacked", debs.len(), began);
        database.add(&tree, &debs, &unpacked, self.architecture)?;
        let stamp = newest(&unpacked).max(stamp);
        self.configure(step, &tree, root, &debs, &database.triggered(&unpacked), stamp)?;
        Ok(Ok(stamp))
    }

    /// The slow way, for upgrades, diversions and files that change hands.
    pub(crate) fn by_dpkg(
        &self,
        step: &str,
        packages: &[LockedPackage],
        root: &Path,
        stamp: i64,
    ) -> Result<i64, BakeError> {
        let tree = Tree::open(root, SHIFT).map_err(BakeError::io("open", root))?;
        let folder = self.sandbox.work.folder("debs", SHIFT)?;
        let mut newest = stamp;
        for (at, package) in packages.iter().enumerate() {
            let from = self.store.path(&package.sha256);
            let to = folder.join(format!("{at:05}.deb"));
            fs::copy(&from, &to).map_err(BakeError::io("copy", &from))?;
            let mut tar = Deb::open(self.store, package)?.data()?;
            while let Some(entry) = tar.next_entry().map_err(|problem| BakeError::Package {
                package: package.name.clone(),
                why: format!("data.tar: {problem}"),
            })? {
                newest = newest.max(entry.mtime);
            }
        }
        // They come in an order that apt found good; what a package needs before it is unpacked may still be unconfigured.
        let script = format!("{DPKG} --force-depends --unpack {DEBS}/*.deb\n{DPKG} --configure -a\n");
        let seen = [Folder { outside: folder.clone(), inside: DEBS, access: Access::Read }];
        self.run(step, &tree, root, &script, newest, &seen)?;
        fs::remove_dir_all(&folder).map_err(BakeError::io("remove", &folder))?;
        Ok(newest)
    }

    /// The files of packages into an empty folder, and nothing more: no package is configured, and none is known to be there.
    pub(crate) fn unpack_alone(&self, packages: &[LockedPackage], to: &Path) -> Result<(), BakeError> {
        let tree = Tree::open(to, 0).map_err(BakeError::io("open", to))?;
        self.unpack(&self.open(packages)?, &tree).map(drop)
    }

    fn unpack(&self, debs: &[Deb], tree: &Tree) -> Result<Vec<Unpacked>, BakeError> {
        self.merge_usr(tree)?;
        let began = Instant::now();
        let unpacking = || unpack(debs, tree, self.sandbox.cancel);
        let unpacked = self.timings.during(Phase::Unpack, unpacking).map_err(|trouble| match trouble {
            Trouble::Failed(error) => error,
            Trouble::Taken { package, path } => BakeError::Package {
                package,
                why: format!("it brings {path}, which another one of these packages brings too"),
            },
        })?;
        self.tell("unpacked", debs.len(), began);
        Ok(unpacked)
    }

    fn open(&self, packages: &[LockedPackage]) -> Result<Vec<Deb>, BakeError> {
        packages.iter().map(|package| Deb::open(self.store, package)).collect()
    }

    /// /bin and its like as links, before the first package brings files below them.
    fn merge_usr(&self, tree: &Tree) -> Result<(), BakeError> {
        let links: &[&str] = match self.architecture {
            "amd64" => &["bin", "sbin", "lib", "lib64"],
            _ => &["bin", "sbin", "lib"],
        };
        for name in links {
            let make = || -> std::io::Result<()> {
                tree.folder(format!("usr/{name}").as_bytes())?;
                Ok(rustix::fs::symlinkat(format!("usr/{name}"), tree.folder(b"")?, *name)?)
            };
            make().map_err(BakeError::io("make link", format!("/{name}")))?;
        }
        Ok(())
    }

    fn configure(
        &self,
        step: &str,
        tree: &Tree,
        root: &Path,
        debs: &[Deb],
        triggers: &[String],
        stamp: i64,
    ) -> Result<(), BakeError> {
        let mut script = String::new();
        for deb in debs.iter().filter(|deb| deb.control_file("preinst").is_some()) {
            // Writing into a String can't fail.
            let _ = writeln!(
                script,
                "DPKG_MAINTSCRIPT_NAME=preinst DPKG_MAINTSCRIPT_PACKAGE={} DPKG_MAINTSCRIPT_PACKAGE_REFCOUNT=1 \
                 DPKG_MAINTSCRIPT_ARCH={} DPKG_ADMINDIR=/var/lib/dpkg DPKG_ROOT= DEBCONF_PACKAGE={} \
                 /var/lib/dpkg/info/{}.preinst install",
                deb.name,
                deb.field("Architecture"),
                // debconf else looks for it where dpkg unpacks.
                deb.name,
                deb.info_name(),
            );
        }
        for trigger in triggers {
            let quoted = trigger.replace('\'', r"'\''");
            let _ = writeln!(script, "dpkg-trigger --by-package=dpkg --no-await '{quoted}'");
        }
        let _ = writeln!(script, "{DPKG} --configure -a");
        let began = Instant::now();
        self.run(step, tree, root, &script, stamp, &[])?;
        self.tell("configured", debs.len(), began);
        Ok(())
    }

    fn tell(&self, did: &str, packages: usize, began: Instant) {
        (self.sandbox.log)(&format!("{did} {packages} packages ({} ms)", began.elapsed().as_millis()));
    }

    fn run(
        &self,
        step: &str,
        tree: &Tree,
        root: &Path,
        script: &str,
        stamp: i64,
        folders: &[Folder],
    ) -> Result<(), BakeError> {
        forbid_services(tree)?;
        let hide_ischroot = hides_ischroot(tree)?;
        let env: BTreeMap<String, String> = [
            ("PATH", PATH),
            ("HOME", "/root"),
            ("TERM", "dumb"),
            ("LC_ALL", "C.UTF-8"),
            ("LANG", "C.UTF-8"),
            ("LANGUAGE", "C.UTF-8"),
            ("DEBIAN_FRONTEND", "noninteractive"),
            ("DEBCONF_NONINTERACTIVE_SEEN", "true"),
            ("SOURCE_DATE_EPOCH", &stamp.to_string()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
        let job = Job {
            step,
            root,
            script,
            env: &env,
            folders,
            hide_ischroot,
            own_run: false,
            resolver: None,
            rights: Rights::Step,
        };
        self.timings.during(Phase::Configure, || self.sandbox.run(&job))
    }
}

/// What a first run of apt and any bootstrap leave, so that the tree is that of other ways to make it.
fn complete(tree: &Tree) -> Result<(), BakeError> {
    let make = || -> std::io::Result<()> {
        for folder in ["dev/pts", "dev/shm"] {
            tree.folder(folder.as_bytes())?;
        }
        for (name, target) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ] {
            // Where the tree's own /dev leads, a link of a package's, is inside of it.
            rustix::fs::symlinkat(target, tree.folder(b"dev")?, name)?;
        }
        Ok(())
    };
    make().map_err(BakeError::io("complete", tree.path()))?;
    let Ok((apt, _)) = owners::resolve(tree, "_apt:root") else { return Ok(()) };
    for folder in ["var/lib/apt/lists/partial", "var/cache/apt/archives/partial"] {
        let own = || -> std::io::Result<()> {
            let folder = tree.folder(folder.as_bytes())?;
            tree.own(&folder, apt, 0)?;
            rustix::fs::fchmod(&folder, rustix::fs::Mode::RWXU)?;
            Ok(())
        };
        own().map_err(BakeError::io("own", format!("/{folder}")))?;
    }
    Ok(())
}

fn newest(unpacked: &[Unpacked]) -> i64 {
    unpacked.iter().map(|unpacked| unpacked.newest).max().unwrap_or(0)
}

/// `invoke-rc.d` asks this file whether it may start a service. Sealing takes it out again.
pub(crate) fn forbid_services(tree: &Tree) -> Result<(), BakeError> {
    let path = "/usr/sbin/policy-rc.d";
    // A package's own is left alone; no image should have it.
    if tree.stat_itself(POLICY).map_err(|e| BakeError::io("look at", path)(e.into()))?.is_some()
        || tree.stat(b"usr/sbin").map_err(|e| BakeError::io("look at", path)(e.into()))?.is_none()
    {
        return Ok(());
    }
    tree.write(POLICY, 0o755, b"#!/bin/sh\nexit 101\n").map_err(BakeError::io("write", path))
}

pub(crate) fn hides_ischroot(tree: &Tree) -> Result<bool, BakeError> {
    let is_file = |path: &[u8]| {
        tree.stat_itself(path)
            .map(|stat| stat.is_some_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::RegularFile))
            .map_err(|e| BakeError::io("look at", format!("/{}", String::from_utf8_lossy(path)))(e.into()))
    };
    Ok(is_file(b"usr/bin/ischroot")? && is_file(b"usr/bin/true")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_completes_a_tree_does_not_leave_it_by_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::create_dir(&outside).unwrap();
        for target in [outside.clone(), "../outside".into()] {
            let root = folder.path().join("tree");
            // The link leads somewhere on both sides.
            let inside = root.join(target.strip_prefix("/").unwrap_or(Path::new("outside")));
            fs::create_dir_all(&inside).unwrap();
            std::os::unix::fs::symlink(&target, root.join("dev")).unwrap();
            complete(&Tree::open(&root, 0).unwrap()).unwrap();
            let names = |path: &Path| fs::read_dir(path).unwrap().count();
            assert_eq!(names(&outside), 0, "{target:?}");
            assert_eq!(names(&inside), 6, "{target:?}");
            fs::remove_dir_all(&root).unwrap();
        }
    }
}
