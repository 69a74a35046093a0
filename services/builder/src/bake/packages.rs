//! The package store: `.deb` files by their sha256, shared by all builds and by several sites.
//!
//! ```text
//! sha256/<hex>.deb
//! where/<hex>          the address it can be had from
//! opened/<hex>         its files, in a form that is quicker to read
//! ```
//!
//! A file gets its name by a rename once its hash was checked, so two processes can put the same one.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_model::digest::Digest;
use kiln_model::lock::LockedPackage;

use super::apt::Solved;
use super::context::HashingReader;
use super::error::BakeError;
use super::fetch::{Transport, Wanted};
use super::{kept, whole};
use crate::collect::{Collected, How};

/// Of files in one call, so that its arguments fit.
const AT_ONCE: usize = 400;
/// The shortest time that what no build uses can be told to be kept for is a day.
const USE_NOTED_EVERY: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone)]
pub(crate) struct PackageStore {
    root: PathBuf,
}

impl PackageStore {
    pub(crate) fn open(root: &Path) -> Result<Self, BakeError> {
        for part in ["sha256", "where", "opened"] {
            let path = root.join(part);
            fs::create_dir_all(&path).map_err(BakeError::io("make folder", &path))?;
        }
        Ok(Self { root: root.to_owned() })
    }

    pub(crate) fn path(&self, sha256: &Digest) -> PathBuf {
        self.root.join("sha256").join(format!("{}.deb", sha256.hex()))
    }

    pub(crate) fn opened_path(&self, sha256: &Digest) -> PathBuf {
        self.root.join("opened").join(sha256.hex())
    }

    fn has(&self, package: &LockedPackage) -> bool {
        fs::metadata(self.path(&package.sha256)).is_ok_and(|found| found.len() == package.size)
    }

    fn where_path(&self, sha256: &Digest) -> PathBuf {
        self.root.join("where").join(sha256.hex())
    }

    /// Says that packages are used now, and what is kept beside them, as far as it is here.
    pub(crate) fn note_use<'a>(
        &self,
        packages: impl Iterator<Item = &'a LockedPackage>,
    ) -> Result<(), BakeError> {
        for LockedPackage { sha256, .. } in packages {
            for path in [self.path(sha256), self.opened_path(sha256), self.where_path(sha256)] {
                // Told once in a while: a bake uses hundreds.
                if fs::metadata(&path).is_ok_and(|found| kept::unused_for(&found) > USE_NOTED_EVERY) {
                    kept::touch(&path)?;
                }
            }
        }
        Ok(())
    }

    /// Lets go of packages that were not used for so long, and of what is kept beside them.
    pub(crate) fn forget(&self, unused: Duration, how: How) -> Result<Collected, BakeError> {
        let mut collected = kept::forget("packages", &self.root.join("sha256"), unused, how)?;
        for beside in ["opened", "where"] {
            collected.add(0, kept::forget(beside, &self.root.join(beside), unused, how)?.bytes);
        }
        Ok(collected)
    }

    /// Remembers where packages can be had, for those that are not here.
    pub(crate) fn remember(&self, solved: &[Solved]) -> Result<(), BakeError> {
        for Solved { package, url, .. } in solved {
            if !self.has(package) {
                let path = self.where_path(&package.sha256);
                whole::write(&path, &[url.as_bytes()]).map_err(BakeError::io("write", &path))?;
            }
        }
        Ok(())
    }

    /// Fetches what is missing, by apt's own transports.
    pub(crate) fn fetch<'a>(
        &self,
        packages: impl Iterator<Item = &'a LockedPackage>,
        transport: Transport<'_>,
    ) -> Result<(), BakeError> {
        let packages: Vec<_> = packages.collect();
        self.note_use(packages.iter().copied())?;
        let packages = packages.into_iter();
        let missing: HashMap<Digest, &LockedPackage> =
            packages.filter(|package| !self.has(package)).map(|package| (package.sha256, package)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let bytes: u64 = missing.values().map(|package| package.size).sum();
        let folder = tempfile::Builder::new()
            .prefix("fetch-")
            .tempdir_in(&self.root)
            .map_err(BakeError::io("make a folder in", &self.root))?;
        let missing: Vec<_> = missing.into_values().collect();
        for some in missing.chunks(AT_ONCE) {
            self.fetch_into(folder.path(), some, transport)?;
        }
        (transport.log)(&format!(
            "fetched {} packages, {bytes} bytes ({} ms)",
            missing.len(),
            began.elapsed().as_millis()
        ));
        Ok(())
    }

    fn fetch_into(
        &self,
        folder: &Path,
        missing: &[&LockedPackage],
        transport: Transport<'_>,
    ) -> Result<(), BakeError> {
        let mut wanted = Vec::new();
        for package in missing {
            let path = self.where_path(&package.sha256);
            let url = fs::read_to_string(&path).map_err(|_| BakeError::Definition {
                what: format!("package {} {}", package.name, package.version),
                why:
                    "the lock names it, but the package store has lost it, and no archive is known to have it"
                        .to_owned(),
                remedy: "resolve the packages anew: build without pinning".to_owned(),
            })?;
            let to = folder.join(package.sha256.hex());
            wanted.push(Wanted { url, to, sha256: Some(package.sha256), largest: package.size });
        }
        transport.fetch(&wanted, &[])?.map_err(|why| BakeError::Archive {
            archive: "of the lock's packages".to_owned(),
            why,
            remedy:
                "see that this machine reaches it; where the archive has newer packages by now, build without pinning"
                    .to_owned(),
        })?;
        for package in missing {
            self.put(&folder.join(package.sha256.hex()), package)?;
        }
        Ok(())
    }

    fn put(&self, fetched: &Path, package: &LockedPackage) -> Result<(), BakeError> {
        let file = File::open(fetched).map_err(BakeError::io("open", fetched))?;
        let mut reader = HashingReader::new(&file);
        let size = io::copy(&mut reader, &mut io::sink()).map_err(BakeError::io("read", fetched))?;
        if reader.digest() != package.sha256 || size != package.size {
            return Err(BakeError::Archive {
                archive: format!("of package {} {}", package.name, package.version),
                why: "what it gives is not what its signed lists say".to_owned(),
                remedy: "try again; if it stays, the archive or the way to it is broken".to_owned(),
            });
        }
        let path = self.path(&package.sha256);
        file.sync_data().map_err(BakeError::io("sync", fetched))?;
        fs::rename(fetched, &path).map_err(BakeError::io("name", &path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_with_what_is_kept_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = PackageStore::open(folder.path()).unwrap();
        let day = Duration::from_secs(24 * 3600);
        let long_ago = std::time::SystemTime::now().checked_sub(10 * day).unwrap();
        let put = |name: &str| {
            let sha256 = Digest::of(name.as_bytes());
            let beside = folder.path().join("where").join(sha256.hex());
            let files = [store.path(&sha256), store.opened_path(&sha256), beside];
            for path in &files {
                fs::write(path, name).unwrap();
                File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
            }
            let (name, version) = (name.to_owned(), "1".to_owned());
            let architecture = "all".to_owned();
            (LockedPackage { name, version, architecture, sha256, size: 4 }, files)
        };
        let ((used, its_files), (_, unused_files)) = (put("used"), put("gone"));
        store.note_use([&used].into_iter()).unwrap();
        let looked_at = store.forget(7 * day, How::Look).unwrap();
        assert!(unused_files.iter().all(|path| path.exists()));
        assert_eq!(store.forget(7 * day, How::Remove).unwrap(), looked_at);
        assert_eq!((looked_at.count, looked_at.bytes), (1, 12));
        assert!(its_files.iter().all(|path| path.exists()));
        assert!(!unused_files.iter().any(|path| path.exists()));
    }

    #[test]
    fn only_what_the_lock_names_is_put() {
        let folder = tempfile::tempdir().unwrap();
        let store = PackageStore::open(&folder.path().join("packages")).unwrap();
        let content = b"a package";
        let package = |sha256: Digest, size: u64| LockedPackage {
            name: "evil".to_owned(),
            version: "1".to_owned(),
            architecture: "all".to_owned(),
            sha256,
            size,
        };
        let fetched = folder.path().join("fetched");
        let (digest, size) = (Digest::of(content), content.len() as u64);
        for (what, wrong) in [
            ("another hash", package(Digest::of(b"another"), size)),
            ("shorter", package(digest, size + 1)),
            ("longer", package(digest, size - 1)),
        ] {
            fs::write(&fetched, content).unwrap();
            let refused = store.put(&fetched, &wrong);
            assert!(matches!(refused, Err(BakeError::Archive { .. })), "{what}: {refused:?}");
            assert!(!store.path(&wrong.sha256).exists(), "{what}");
        }
        let right = package(digest, size);
        store.put(&fetched, &right).unwrap();
        assert!(store.has(&right));
        // What a crash has cut is fetched again.
        fs::write(store.path(&digest), &content[..4]).unwrap();
        assert!(!store.has(&right));
    }
}
