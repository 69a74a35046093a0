//! What archives held when a step was resolved that installs packages by itself: apt in its sandbox is answered from here, so
//! that the same lock sees the same packages.
//!
//! ```text
//! snapshots/<hex>/index.json
//! snapshots/<hex>/<n>          lists and release files: hard links to apt's own where they can be
//! ```

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use kiln_image::tar::clean_path;
use kiln_model::digest::Digest;
use kiln_model::lock::LockedPackage;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::apt::{PackageList, Solved, list_name};
use super::error::BakeError;
use super::sources::Archive;
use super::{kept, whole};

/// Where the sandbox reaches the archives.
pub(crate) const PORT: u16 = 3142;
const INDEX: &str = "index.json";

#[derive(Debug, Serialize, Deserialize)]
struct Index {
    /// What apt in the sandbox is told of the archives.
    sources: String,
    /// The archives' own addresses; the sandbox knows them by their places in here.
    repositories: Vec<String>,
    /// The number of the file, by the path that it is asked for.
    files: BTreeMap<String, usize>,
    /// The number of each list, with the place of its archive.
    lists: Vec<(usize, usize)>,
}

/// All of them.
pub(crate) fn all(home: &Path) -> PathBuf {
    home.join("snapshots")
}

pub(crate) struct Snapshot {
    folder: PathBuf,
    index: Index,
}

impl Snapshot {
    /// Keeps what apt's lists say now, and gives the name to open it by.
    pub(crate) fn keep(
        home: &Path,
        archives: &[Archive],
        lists: &[PackageList],
    ) -> Result<Digest, BakeError> {
        let mut keeping = Keeping::new(archives);
        for list in lists {
            keeping.add(list)?;
        }
        // Which archives, in which order, and which of their lists: all of it decides what apt chooses.
        let key = Digest::of_json(&json!({"index": keeping.index, "releases": keeping.releases}))
            .map_err(|e| BakeError::io("name", "a snapshot")(e.into()))?;
        let folder = all(home).join(key.hex());
        if folder.join(INDEX).is_file() {
            kept::touch(&folder)?;
            return Ok(key);
        }
        fs::create_dir_all(&folder).map_err(BakeError::io("make folder", &folder))?;
        for (number, file) in keeping.files.iter().enumerate() {
            let to = folder.join(number.to_string());
            keep_file(file, &to).map_err(BakeError::io("keep", &to))?;
        }
        let path = folder.join(INDEX);
        let failed = || BakeError::io("write", &path);
        let text = serde_json::to_vec(&keeping.index).map_err(|e| failed()(e.into()))?;
        // Written last: without it there is no snapshot.
        whole::write(&path, &[&text]).map_err(failed())?;
        Ok(key)
    }

    pub(crate) fn open(home: &Path, key: &Digest) -> Result<Self, BakeError> {
        let folder = all(home).join(key.hex());
        let index = fs::read(folder.join(INDEX)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        match index {
            Some(index) => {
                kept::touch(&folder)?;
                Ok(Self { folder, index })
            }
            None => Err(BakeError::Definition {
                what: format!("archives as of snapshot {}", key.short()),
                why: "the lock names it, and it is not kept any more".to_owned(),
                remedy: "resolve the packages anew: build without pinning".to_owned(),
            }),
        }
    }

    pub(crate) fn sources(&self) -> &str {
        &self.index.sources
    }

    /// The file that is asked for by a path.
    pub(crate) fn file(&self, path: &str) -> Option<PathBuf> {
        let asked = clean_path(path.as_bytes()).ok()?;
        // A few for each archive.
        let mut known = self.index.files.iter();
        let is_it = |known: &str| clean_path(known.as_bytes()).is_ok_and(|known| known == asked);
        known.find(|(known, _)| is_it(known)).map(|(_, number)| self.numbered(*number))
    }

    fn numbered(&self, number: usize) -> PathBuf {
        self.folder.join(number.to_string())
    }

    /// Puts the lists where apt of the sandbox keeps them, so that it needs not ask for them.
    pub(crate) fn put_lists(&self, folder: &Path) -> Result<(), BakeError> {
        for (path, number) in &self.index.files {
            let to = folder.join(list_name(&format!("127.0.0.1:{PORT}/{path}")));
            fs::copy(self.numbered(*number), &to).map_err(BakeError::io("copy", &to))?;
        }
        Ok(())
    }

    /// Every package of the lists, by the path that it is asked for.
    pub(crate) fn packages(&self) -> Result<HashMap<String, Solved>, BakeError> {
        let mut packages = HashMap::new();
        for (number, repository) in &self.index.lists {
            let path = self.numbered(*number);
            let file = File::open(&path).map_err(BakeError::io("open", &path))?;
            let address = self.index.repositories.get(*repository).map_or("", String::as_str);
            let mut fields = Fields::default();
            let mut add = |fields: Fields| {
                if let Some((name, package)) = fields.finish() {
                    let url = format!("{address}{name}");
                    packages.insert(format!("{repository}/{name}"), Solved { package, url, security: false });
                }
            };
            for line in BufReader::with_capacity(1 << 16, file).split(b'\n') {
                let line = line.map_err(BakeError::io("read", &path))?;
                if line.is_empty() {
                    add(std::mem::take(&mut fields));
                } else {
                    fields.read(&String::from_utf8_lossy(&line));
                }
            }
            add(fields);
        }
        Ok(packages)
    }
}

/// A snapshot that is collected.
struct Keeping {
    index: Index,
    files: Vec<PathBuf>,
    /// By their addresses.
    releases: BTreeMap<String, Digest>,
}

/// Under a name of its own what apt replaces and never changes. Of an archive in the file system apt has links, and what they
/// lead to is somebody else's to change.
fn keep_file(file: &Path, to: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(file)?.is_symlink() {
        match fs::hard_link(file, to) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
            Err(error) => return Err(error),
        }
    }
    // A crash may have cut an earlier one.
    let part = to.with_extension("part");
    fs::copy(file, &part)?;
    fs::rename(&part, to)
}

impl Keeping {
    fn new(archives: &[Archive]) -> Self {
        let mut repositories: Vec<String> = Vec::new();
        let mut sources = String::new();
        for archive in archives {
            let url = format!("{}/", archive.url.trim_end_matches('/'));
            let place = repositories.iter().position(|known| *known == url).unwrap_or_else(|| {
                repositories.push(url);
                repositories.len() - 1
            });
            // Its signature was checked when the snapshot was taken. Writing into a String can't fail.
            let _ = writeln!(
                sources,
                "Types: deb\nURIs: http://127.0.0.1:{PORT}/{place}/\nSuites: {}\nTrusted: yes",
                archive.suite
            );
            if !archive.components.is_empty() {
                let _ = writeln!(sources, "Components: {}", archive.components.join(" "));
            }
            sources.push('\n');
        }
        let index = Index { sources, repositories, files: BTreeMap::new(), lists: Vec::new() };
        Self { index, files: Vec::new(), releases: BTreeMap::new() }
    }

    fn add(&mut self, list: &PackageList) -> Result<(), BakeError> {
        let place = self.index.repositories.iter().position(|known| *known == list.repository);
        let below = list.base.strip_prefix(list.repository.as_str());
        let (Some(place), Some(below)) = (place, below) else {
            return Err(BakeError::Archive {
                archive: list.base.clone(),
                why: "apt has a list of it, and it is none of the archives that apt was given".to_owned(),
                remedy: "write each archive's address as it is, without what leads elsewhere".to_owned(),
            });
        };
        let content = fs::read(&list.release).map_err(BakeError::io("read", &list.release))?;
        self.releases.insert(format!("{}{}", list.base, list.release_name), Digest::of(&content));
        self.file(format!("{place}/{below}{}", list.release_name), list.release.clone());
        let number = self.file(format!("{place}/{below}{}", list.key), list.file.clone());
        self.index.lists.push((number, place));
        Ok(())
    }

    fn file(&mut self, asked: String, file: PathBuf) -> usize {
        let (files, known) = (&mut self.files, &mut self.index.files);
        *known.entry(asked).or_insert_with(|| {
            files.push(file);
            files.len() - 1
        })
    }
}

/// One paragraph of a list, as far as it says where the package is.
#[derive(Default)]
struct Fields {
    name: String,
    version: String,
    architecture: String,
    /// Empty where it is no path below the archive.
    file: Vec<u8>,
    size: Option<u64>,
    sha256: Option<Digest>,
}

impl Fields {
    fn read(&mut self, line: &str) {
        let Some((field, value)) = line.split_once(": ") else { return };
        match field {
            "Package" => value.clone_into(&mut self.name),
            "Version" => value.clone_into(&mut self.version),
            "Architecture" => value.clone_into(&mut self.architecture),
            "Filename" => self.file = clean_path(value.as_bytes()).unwrap_or_default(),
            "Size" => self.size = value.parse().ok(),
            "SHA256" => self.sha256 = format!("sha256:{value}").parse().ok(),
            _ => {}
        }
    }

    fn finish(self) -> Option<(String, LockedPackage)> {
        let Self { name, version, architecture, file, size, sha256 } = self;
        let (size, sha256) = (size?, sha256?);
        let file = String::from_utf8(file).ok()?;
        let whole = ![&name, &version, &architecture, &file].iter().any(|field| field.is_empty());
        whole.then_some((file, LockedPackage { name, version, architecture, sha256, size }))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::super::sources::Signer;
    use super::*;
    use crate::collect::How;

    pub(crate) const LIST: &str = "Package: nginx\nVersion: 1:1.22-9\nArchitecture: all\nFilename: pool/n/nginx_1.22-9_all.deb\n\
                        Size: 7\nSHA256: HASH\nDescription: a server\n of pages\n\nPackage: half\nVersion: 1\n\n\
                        Package: last\nVersion: 2\nArchitecture: amd64\nFilename: ./pool/last.deb\nSize: 1\nSHA256: HASH\n";

    pub(crate) fn lists(folder: &Path, release: &str) -> Vec<PackageList> {
        let (file, release_file) = (folder.join("Packages"), folder.join("InRelease"));
        // As apt does: what is linked elsewhere stays what it is.
        let replace = |path: &Path, text: &str| {
            fs::write(path.with_extension("new"), text).unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        };
        replace(&file, &LIST.replace("HASH", &Digest::of(b"content").hex()));
        replace(&release_file, release);
        vec![PackageList {
            repository: "http://a.test/debian/".to_owned(),
            base: "http://a.test/debian/dists/bookworm/".to_owned(),
            key: "main/binary-amd64/Packages".to_owned(),
            file,
            release_name: "InRelease",
            release: release_file,
        }]
    }

    pub(crate) fn archives() -> Vec<Archive> {
        vec![Archive {
            url: "http://a.test/debian".to_owned(),
            suite: "bookworm".to_owned(),
            components: vec!["main".to_owned()],
            signed_by: Signer::HostKeys,
        }]
    }

    #[test]
    fn a_snapshot_stays_what_it_is_when_the_archive_moves_on() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let one = Snapshot::keep(home, &archives(), &lists(home, "first")).unwrap();
        assert_eq!(Snapshot::keep(home, &archives(), &lists(home, "first")).unwrap(), one);
        let two = Snapshot::keep(home, &archives(), &lists(home, "second")).unwrap();
        assert_ne!(one, two);
        let read = |key: &Digest, path: &str| {
            Snapshot::open(home, key).unwrap().file(path).map(|file| fs::read_to_string(file).unwrap())
        };
        assert_eq!(read(&one, "0/dists/bookworm/InRelease").unwrap(), "first");
        assert_eq!(read(&two, "0/dists/bookworm/InRelease").unwrap(), "second");
        assert!(read(&one, "0/dists/bookworm/main/binary-amd64/Packages").is_some());
        for wrong in ["", "0", "0/dists/bookworm/../bookworm/InRelease", "1/dists/bookworm/InRelease"] {
            assert_eq!(read(&one, wrong), None, "{wrong}");
        }
        let sources = Snapshot::open(home, &one).unwrap().sources().to_owned();
        assert!(sources.contains("URIs: http://127.0.0.1:3142/0/\nSuites: bookworm\n"), "{sources}");
        assert!(!sources.contains("a.test"), "{sources}");

        let to = home.join("lists");
        fs::create_dir(&to).unwrap();
        Snapshot::open(home, &one).unwrap().put_lists(&to).unwrap();
        let in_release = to.join("127.0.0.1:3142_0_dists_bookworm_InRelease");
        assert_eq!(fs::read_to_string(in_release).unwrap(), "first");

        kept::forget("lists", &all(home), Duration::from_secs(3600), How::Remove).unwrap();
        assert!(Snapshot::open(home, &one).is_ok());
        assert_eq!(kept::forget("lists", &all(home), Duration::ZERO, How::Look).unwrap().count, 2);
        assert!(Snapshot::open(home, &one).is_ok());
        kept::forget("lists", &all(home), Duration::ZERO, How::Remove).unwrap();
        assert!(Snapshot::open(home, &one).is_err_and(|error| error.to_string().contains("pinning")));
    }

    #[test]
    fn other_archives_are_another_snapshot_though_their_releases_are_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let keep = |archives: &[Archive]| Snapshot::keep(home, archives, &lists(home, "first")).unwrap();
        let one = keep(&archives());
        let mut more = archives();
        more[0].components.push("contrib".to_owned());
        let mut two = archives();
        two.insert(0, Archive { url: "http://b.test/debian".to_owned(), ..archives().remove(0) });
        assert_eq!(BTreeSet::from([one, keep(&more), keep(&two)]).len(), 3);
    }

    /// Of an archive in the file system apt keeps links to the archive's own files.
    #[test]
    fn what_apt_has_links_to_is_copied() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let mut lists = lists(home, "first");
        let link = home.join("link");
        std::os::unix::fs::symlink(&lists[0].file, &link).unwrap();
        let archives_own = std::mem::replace(&mut lists[0].file, link);
        let key = Snapshot::keep(home, &archives(), &lists).unwrap();
        fs::write(archives_own, "moved on").unwrap();
        let packages = Snapshot::open(home, &key).unwrap().packages().unwrap();
        assert!(packages.contains_key("0/pool/last.deb"));
    }

    /// Without folders for suites: `deb http://a.test/debian ./`.
    #[test]
    fn a_flat_archive_is_asked_with_dots() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let mut lists = lists(home, "first");
        "http://a.test/debian/./".clone_into(&mut lists[0].base);
        "Packages".clone_into(&mut lists[0].key);
        // A description in another encoding is no reason to refuse what can be read.
        let mut content = fs::read(&lists[0].file).unwrap();
        content.extend_from_slice(b"Description: caf\xe9\n");
        fs::write(&lists[0].file, content).unwrap();
        let mut archives = archives();
        "./".clone_into(&mut archives[0].suite);
        archives[0].components.clear();
        let snapshot = Snapshot::open(home, &Snapshot::keep(home, &archives, &lists).unwrap()).unwrap();
        assert!(snapshot.file("0/./Packages").is_some() && snapshot.file("0/Packages").is_some());
        assert!(snapshot.packages().unwrap().contains_key("0/pool/last.deb"));
        let to = home.join("lists");
        fs::create_dir(&to).unwrap();
        snapshot.put_lists(&to).unwrap();
        assert!(to.join("127.0.0.1:3142_0_._Packages").is_file());
    }

    #[test]
    fn packages_are_found_by_the_path_that_apt_asks_for() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        let key = Snapshot::keep(home, &archives(), &lists(home, "first")).unwrap();
        let packages = Snapshot::open(home, &key).unwrap().packages().unwrap();
        let nginx = &packages["0/pool/n/nginx_1.22-9_all.deb"];
        assert_eq!(nginx.url, "http://a.test/debian/pool/n/nginx_1.22-9_all.deb");
        assert_eq!((nginx.package.version.as_str(), nginx.package.size), ("1:1.22-9", 7));
        assert_eq!(packages["0/pool/last.deb"].package.name, "last");
        assert_eq!(packages.len(), 2, "one that does not say where it is can't be asked for");
    }

    #[test]
    fn a_list_of_another_archive_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut lists = lists(folder.path(), "first");
        lists[0].repository = "http://b.test/".to_owned();
        assert!(Snapshot::keep(folder.path(), &archives(), &lists).is_err());
    }
}
