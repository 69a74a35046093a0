//! Packages that an archive with a good signature, or a broken disk, could bring: nothing of them reaches what is outside of
//! the tree.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_model::digest::Digest;
use kiln_model::lock::LockedPackage;
use proptest::prelude::*;
use tar::EntryType;
use tokio_util::sync::CancellationToken;

use super::deb::Deb;
use super::error::BakeError;
use super::packages::PackageStore;
use super::tree::Tree;
use super::unpack::unpack;

const CONTROL: &[u8] = b"Package: evil\nVersion: 1\nArchitecture: all\n";

/// A raw entry, so that names can be written which the tar crate would refuse to write.
pub(super) fn entry(name: &str, kind: EntryType, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
    header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().div_ceil(512) * 512, 0);
    bytes
}

fn tarred(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend_from_slice(&[0; 1024]);
    bytes
}

fn member(name: &str, size: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`\n", 0, 0, 0, "100644").into_bytes();
    bytes.extend_from_slice(content);
    if content.len() % 2 == 1 {
        bytes.push(b'\n');
    }
    bytes
}

fn whole(name: &str, content: &[u8]) -> Vec<u8> {
    member(name, &content.len().to_string(), content)
}

fn archive(members: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    members.iter().for_each(|member| bytes.extend_from_slice(member));
    bytes
}

fn control() -> Vec<u8> {
    whole("control.tar", &tarred(&[entry("./control", EntryType::Regular, "", CONTROL)]))
}

pub(super) fn deb(data: &[Vec<u8>]) -> Vec<u8> {
    archive(&[whole("debian-binary", b"2.0\n"), control(), whole("data.tar", &tarred(data))])
}

/// Puts a package that [`deb`] made into a store.
pub(super) fn put(store: &PackageStore, bytes: &[u8]) -> LockedPackage {
    let locked = LockedPackage {
        name: "evil".to_owned(),
        version: "1".to_owned(),
        architecture: "all".to_owned(),
        sha256: Digest::of(bytes),
        size: bytes.len() as u64,
    };
    fs::write(store.path(&locked.sha256), bytes).unwrap();
    locked
}

struct Bench {
    folder: tempfile::TempDir,
    store: PackageStore,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = PackageStore::open(&folder.path().join("packages")).unwrap();
        fs::create_dir(folder.path().join("outside")).unwrap();
        fs::write(folder.path().join("outside/victim"), "as it was").unwrap();
        Self { folder, store }
    }

    fn outside(&self) -> PathBuf {
        self.folder.path().join("outside")
    }

    fn open(&self, bytes: &[u8]) -> Result<Deb, BakeError> {
        Deb::open(&self.store, &put(&self.store, bytes))
    }

    /// Whether it was unpacked; whatever became of it, nothing outside is touched.
    fn unpack(&self, what: &str, data: &[Vec<u8>]) -> bool {
        self.unpack_it(what, self.open(&deb(data)).unwrap())
    }

    fn unpack_it(&self, what: &str, deb: Deb) -> bool {
        let root = self.folder.path().join("tree");
        fs::create_dir(&root).unwrap();
        let tree = Tree::open(&root, 0).unwrap();
        let unpacked = unpack(&[deb], &tree, &CancellationToken::new()).is_ok();
        use std::os::unix::fs::MetadataExt as _;
        let victim = self.outside().join("victim");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was", "{what}");
        let metadata = fs::metadata(&victim).unwrap();
        assert_eq!(metadata.nlink(), 1, "{what}");
        assert_eq!(fs::read_dir(self.outside()).unwrap().count(), 1, "{what}");
        assert_eq!(names(self.folder.path()), ["outside", "packages", "tree"], "{what}");
        fs::remove_dir_all(&root).unwrap();
        unpacked
    }
}

fn names(folder: &Path) -> Vec<String> {
    let items = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = items.map(|item| item.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn no_entry_of_a_package_leads_out_of_the_tree() {
    let bench = Bench::new();
    let outside = bench.outside().to_str().unwrap().to_owned();
    let file = |name: &str| entry(name, EntryType::Regular, "", b"evil");
    let link = |name: &str, target: &str| entry(name, EntryType::Symlink, target, b"");
    let hard = |name: &str, target: &str| entry(name, EntryType::Link, target, b"");
    let refused: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("up", vec![file("../outside/x")]),
        ("down and up", vec![file("./a/../../outside/x")]),
        ("a hard link up", vec![hard("./h", "../outside/victim")]),
        ("a hard link to an absolute path", vec![hard("./h", &format!("{outside}/victim"))]),
        ("a hard link through a link", vec![link("./l", &outside), hard("./h", "./l/victim")]),
        ("a file in the place of a link", vec![link("./v", &format!("{outside}/victim")), file("./v")]),
        ("a file below a file", vec![file("./f"), file("./f/x")]),
        ("a block device", vec![entry("./d", EntryType::Block, "", b"")]),
        ("a character device", vec![entry("./d", EntryType::Char, "", b"")]),
        ("a fifo", vec![entry("./p", EntryType::Fifo, "", b"")]),
    ];
    for (what, data) in refused {
        assert!(!bench.unpack(what, &data), "{what}");
    }
    // These may be taken as what they are inside.
    for (what, data) in [
        ("an absolute path", vec![file(&format!("{outside}/x"))]),
        ("through an absolute link", vec![link("./l", &outside), file("./l/x")]),
        ("through a relative link", vec![link("./l", "../../outside"), file("./l/x")]),
        (
            "a folder in the place of a link",
            vec![link("./l", &outside), entry("./l/", EntryType::Directory, "", b"")],
        ),
        (
            "a folder below a link",
            vec![link("./l", "../outside"), entry("./l/d/", EntryType::Directory, "", b"")],
        ),
        (
            "a hard link to a link",
            vec![link("./v", &format!("{outside}/victim")), hard("./h", "./v"), file("./w")],
        ),
    ] {
        bench.unpack(what, &data);
    }
    assert!(bench.unpack("a good one", &[file("./usr/x"), hard("./usr/y", "./usr/x"), link("./usr/z", "x")]));
}

#[test]
fn what_is_no_package_is_refused_before_anything_of_it_is_unpacked() {
    let bench = Bench::new();
    let version = || whole("debian-binary", b"2.0\n");
    let data = || whole("data.tar", &tarred(&[]));
    let named = |name: &str| {
        let files =
            [entry("./control", EntryType::Regular, "", CONTROL), entry(name, EntryType::Regular, "", b"x")];
        whole("control.tar", &tarred(&files))
    };
    let other = CONTROL.to_ascii_uppercase();
    let other = whole("control.tar", &tarred(&[entry("./control", EntryType::Regular, "", &other)]));
    let good = archive(&[version(), control(), data()]);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("no ar", b"PK\x03\x04 and so on".to_vec()),
        ("no members", archive(&[])),
        ("another format", archive(&[whole("debian-binary", b"3.0\n"), control(), data()])),
        ("no format", archive(&[control(), data()])),
        ("no control", archive(&[version(), data()])),
        ("no data", archive(&[version(), control()])),
        ("data before control", archive(&[version(), data(), control()])),
        ("an unknown member", archive(&[version(), control(), whole("evil", b"x"), data()])),
        ("an unknown compression", archive(&[version(), control(), whole("data.tar.lzma", b"x")])),
        ("a size that is none", archive(&[version(), member("control.tar", "-1", b""), data()])),
        ("a size past the end", archive(&[version(), control(), member("data.tar", "9999999999", b"")])),
        ("cut in a header", good[..good.len() - data().len() + 30].to_vec()),
        ("another package's control", archive(&[version(), other, data()])),
        ("a control file elsewhere", archive(&[version(), named("./../evil"), data()])),
        ("a control file of another package", archive(&[version(), named("./libc6.postinst"), data()])),
        ("a list of its own", archive(&[version(), named("./list"), data()])),
    ];
    for (what, bytes) in cases {
        assert!(bench.open(&bytes).is_err(), "{what}");
    }
    assert!(bench.open(&good).is_ok());
}

proptest! {
    /// A good one with a part cut out, doubled or changed.
    #[test]
    fn a_changed_package_ends_no_reader(
        at in any::<prop::sample::Index>(),
        length in 0_usize..80,
        by in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let bench = Bench::new();
        let file = entry("./usr/x", EntryType::Regular, "", b"content");
        let link = entry("./usr/y", EntryType::Symlink, "/etc/passwd", b"");
        let mut bytes = deb(&[file, link, entry("./usr/z", EntryType::Link, "./usr/x", b"")]);
        let at = at.index(bytes.len());
        let end = (at + length).min(bytes.len());
        bytes.splice(at..end, by);
        if let Ok(deb) = bench.open(&bytes) {
            bench.unpack_it("changed", deb);
        }
    }
}
