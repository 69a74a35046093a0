use std::fs;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use proptest::prelude::*;

use super::*;

/// A header as anyone can write it, with a right checksum.
fn header(name: &[u8], flag: u8, size: &[u8], link: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 512];
    header[..name.len()].copy_from_slice(name);
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..124 + size.len()].copy_from_slice(size);
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = flag;
    header[157..157 + link.len()].copy_from_slice(link);
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}

fn member(name: &[u8], flag: u8, content: &[u8], link: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, flag, format!("{:011o}\0", content.len()).as_bytes(), link);
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &[u8]) -> Vec<u8> {
    member(name, b'0', b"x", b"")
}

fn pax(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut content = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let length = (rest + 1..rest + 5).find(|n| *n == rest + n.to_string().len()).unwrap();
        content.extend_from_slice(format!("{length} {key}=").as_bytes());
        content.extend_from_slice(value);
        content.push(b'\n');
    }
    member(b"PaxHeader", b'x', &content, b"")
}

fn tar(members: &[Vec<u8>]) -> Vec<u8> {
    [members.concat(), vec![0; 1024]].concat()
}

struct Place {
    above: tempfile::TempDir,
}

impl Place {
    /// A folder to extract into, beside one that nothing may change.
    fn new() -> Self {
        let above = tempfile::tempdir().unwrap();
        fs::create_dir(above.path().join("root")).unwrap();
        fs::create_dir(above.path().join("outside")).unwrap();
        fs::set_permissions(above.path().join("outside"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(above.path().join("outside/secret"), "secret").unwrap();
        Self { above }
    }

    fn root(&self) -> std::path::PathBuf {
        self.above.path().join("root")
    }

    fn extract(&self, tar: &[u8]) -> Result<(), Problem> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        extract(
            tar,
            &rfs::open(self.root(), flags, Mode::empty()).unwrap(),
            Limits { entries: 50, bytes: 4096 },
        )
    }

    fn outside_is_untouched(&self) {
        let outside = self.above.path().join("outside");
        assert_eq!(fs::metadata(&outside).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
        let names: Vec<_> = fs::read_dir(&outside).unwrap().map(|item| item.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
        assert_eq!(fs::read_dir(self.above.path()).unwrap().count(), 2);
    }
}

#[test]
fn what_is_hostile_is_refused_and_reaches_nothing_outside() {
    let outside = |place: &Place| place.above.path().join("outside").into_os_string().into_vec();
    let deep = "d/".repeat(2000) + "x";
    let long = [b"a/".as_slice(), &[b'n'; 256]].concat();
    type Content = Box<dyn Fn(&Place) -> Vec<u8>>;
    type Case = (&'static str, Content);
    let plain = |members: Vec<Vec<u8>>| -> Content { Box::new(move |_| tar(&members)) };
    let raw = |bytes: Vec<u8>| -> Content { Box::new(move |_| bytes.clone()) };
    let mut bad_sum = file(b"x");
    bad_sum[0] = b'y';
    let cases: Vec<Case> = vec![
        ("up", plain(vec![file(b"../outside/new")])),
        ("up in the middle", plain(vec![file(b"a/../../outside/new")])),
        ("absolute", plain(vec![file(b"/new")])),
        (
            "through a link",
            Box::new(move |place| tar(&[member(b"a", b'2', b"", &outside(place)), file(b"a/new")])),
        ),
        (
            "a folder in the place of a link",
            Box::new(move |place| {
                tar(&[member(b"a", b'2', b"", &outside(place)), member(b"a/", b'5', b"", b"")])
            }),
        ),
        (
            "a file in the place of a link",
            Box::new(move |place| {
                let target = [outside(place).as_slice(), b"/secret"].concat();
                tar(&[member(b"a", b'2', b"", &target), file(b"a")])
            }),
        ),
        (
            "a hard link through a link",
            Box::new(move |place| {
                tar(&[member(b"a", b'2', b"", &outside(place)), member(b"b", b'1', b"", b"a/secret")])
            }),
        ),
        ("a hard link up", plain(vec![member(b"a", b'1', b"", b"../outside/secret")])),
        ("an absolute hard link", plain(vec![member(b"a", b'1', b"", b"/etc/passwd")])),
        ("a hard link to nothing", plain(vec![member(b"a", b'1', b"", b"b")])),
        (
            "a hard link to a folder",
            plain(vec![member(b"d/", b'5', b"", b""), member(b"a", b'1', b"", b"d")]),
        ),
        ("two sizes", plain(vec![pax(&[("size", b"600")]), member(b"a", b'0', b"12345", b"")])),
        ("a record longer than the rest", plain(vec![member(b"P", b'x', b"99 path=a\n", b""), file(b"x")])),
        ("a record without `=`", plain(vec![member(b"P", b'x', b"7 path\n", b""), file(b"x")])),
        ("a record without its end", plain(vec![member(b"P", b'x', b"9 path=a ", b""), file(b"x")])),
        ("a record twice", plain(vec![pax(&[("path", b"a"), ("path", b"b")]), file(b"x")])),
        ("NUL in a name", plain(vec![pax(&[("path", b"a\0b")]), file(b"x")])),
        ("up by a record", plain(vec![pax(&[("path", b"../outside/new")]), file(b"x")])),
        (
            "two long names",
            plain(vec![member(b"L", b'L', b"a\0", b""), member(b"L", b'L', b"b\0", b""), file(b"x")]),
        ),
        ("an extension without its entry", plain(vec![pax(&[("path", b"a")])])),
        ("a global path", plain(vec![member(b"g", b'g', b"10 path=a\n\n"[..10].as_ref(), b""), file(b"x")])),
        ("a file twice", plain(vec![file(b"a"), file(b"a")])),
        ("a file, then a folder", plain(vec![file(b"a"), member(b"a/", b'5', b"", b"")])),
        ("below a file", plain(vec![file(b"a"), file(b"a/b")])),
        ("a device", plain(vec![member(b"a", b'3', b"", b"")])),
        ("a block device", plain(vec![member(b"a", b'4', b"", b"")])),
        ("sparse", plain(vec![member(b"a", b'S', b"", b"")])),
        ("sparse by a record", plain(vec![pax(&[("GNU.sparse.size", b"9")]), file(b"x")])),
        ("an unknown type", plain(vec![member(b"a", b'Z', b"", b"")])),
        ("a negative size", raw(tar(&[header(b"a", b'0', &[0xff; 12], b"")]))),
        ("a size that is no number", raw(tar(&[header(b"a", b'0', b"12x", b"")]))),
        (
            "overlayfs's own attribute",
            plain(vec![pax(&[("SCHILY.xattr.trusted.overlay.opaque", b"y")]), file(b"x")]),
        ),
        ("a redirect", plain(vec![pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")]), file(b"x")])),
        ("too many", plain((0..51).map(|n| file(format!("f{n}").as_bytes())).collect())),
        ("too much", plain(vec![member(b"a", b'0', &[b'x'; 4097], b"")])),
        ("too deep", plain(vec![pax(&[("path", deep.as_bytes())]), file(b"x")])),
        ("too long a name", plain(vec![pax(&[("path", &long)]), file(b"x")])),
        ("a whiteout of the folder above", plain(vec![member(b".wh...", b'0', b"", b"")])),
        ("a whiteout of nothing", plain(vec![member(b".wh.", b'0', b"", b"")])),
        ("an unknown whiteout", plain(vec![member(b".wh..wh.plnk", b'0', b"", b"")])),
        ("a whiteout with content", plain(vec![file(b".wh.a")])),
        ("a whiteout as a folder", plain(vec![file(b".wh.a/b")])),
        ("a whiteout of the same layer", plain(vec![file(b"a"), member(b".wh.a", b'0', b"", b"")])),
        ("cut in a header", raw(file(b"a")[..300].to_vec())),
        ("cut in the content", raw(file(b"a")[..512].to_vec())),
        ("without an end", raw(file(b"a"))),
        ("half an end", raw([file(b"a"), vec![0; 512]].concat())),
        ("something after the end", raw([tar(&[file(b"a")]), file(b"b")].concat())),
        ("a wrong checksum", raw(tar(&[bad_sum]))),
        ("an owner that means none", plain(vec![pax(&[("uid", b"4294967295")]), file(b"x")])),
    ];
    for (what, make) in cases {
        let place = Place::new();
        let bytes = make(&place);
        assert!(place.extract(&bytes).is_err(), "{what} was taken");
        place.outside_is_untouched();
    }
}

#[test]
fn names_that_are_not_text_stay_what_they_are() {
    let place = Place::new();
    place.extract(&tar(&[file(b"\xff\xfe")])).unwrap();
    let name = fs::read_dir(place.root()).unwrap().next().unwrap().unwrap().file_name();
    assert_eq!(name.into_vec(), b"\xff\xfe");
}

#[test]
fn whiteouts_become_what_overlayfs_knows() {
    let place = Place::new();
    let members = [
        member(b"d/", b'5', b"", b""),
        member(b"d/.wh..wh..opq", b'0', b"", b""),
        member(b"d/.wh.gone", b'0', b"", b""),
    ];
    place.extract(&tar(&members)).unwrap();
    let gone = fs::symlink_metadata(place.root().join("d/gone")).unwrap();
    assert!(FileType::from_raw_mode(gone.mode()) == FileType::CharacterDevice && gone.rdev() == 0);
    let mut value = [0; 8];
    let length = rfs::lgetxattr(place.root().join("d"), OVERLAY_OPAQUE, &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"y");
}

#[test]
fn folders_without_an_entry_are_made_and_later_entries_set_them() {
    let place = Place::new();
    let mut folder = member(b"a/b/", b'5', b"", b"");
    folder[100..108].copy_from_slice(b"0001750\0");
    let sum: u32 = folder[..148].iter().chain(&folder[156..512]).map(|b| u32::from(*b)).sum::<u32>() + 8 * 32;
    folder[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    place.extract(&tar(&[file(b"a/b/c"), folder])).unwrap();
    let mode =
        |path: &str| fs::metadata(Path::new(&place.root()).join(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("a"), mode("a/b")), (0o755, 0o1750));
}

/// As mmdebstrap and docker export write them, and what neither does.
#[test]
fn a_root_file_system_is_taken_as_others_pack_it() {
    let unpack = |members: &[Vec<u8>]| {
        let place = Place::new();
        let root = rfs::open(place.root(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let result = unpack_root(tar(members).as_slice(), &root, Limits { entries: 50, bytes: 4096 });
        place.outside_is_untouched();
        (place, result)
    };
    let label = pax(&[("SCHILY.xattr.security.selinux", b"system_u:object_r:etc_t:s0")]);
    let device = |name: &[u8]| member(name, b'3', b"", b"");
    let (place, taken) = unpack(&[
        member(b"./", b'5', b"", b""),
        member(b"dev/", b'5', b"", b""),
        device(b"dev/null"),
        label.clone(),
        file(b"etc/hostname"),
        // Links have labels too.
        label,
        member(b"etc/link", b'2', b"", b"hostname"),
    ]);
    assert_eq!(taken.unwrap(), 0, "the time of its youngest entry");
    assert_eq!(fs::read_dir(place.root().join("dev")).unwrap().count(), 0, "made at launch");
    assert_eq!(fs::read(place.root().join("etc/hostname")).unwrap(), b"x");

    let overlay = pax(&[("SCHILY.xattr.trusted.overlay.redirect", b"/etc")]);
    let nobody_s = pax(&[("uid", b"65536")]);
    for (what, members) in [
        ("a device elsewhere", vec![device(b"etc/sda")]),
        ("a whiteout", vec![file(b"etc/.wh.passwd")]),
        ("an attribute of overlayfs", vec![overlay, member(b"a/", b'5', b"", b"")]),
        ("twice", vec![file(b"a"), file(b"a")]),
        ("up", vec![file(b"../outside/new")]),
        ("of a user that no image has", vec![nobody_s, file(b"a")]),
    ] {
        assert!(unpack(&members).1.is_err(), "{what}");
    }
}

/// A layer of others on top of a tree; gives what is there then, and what was said.
fn above(below: &[Vec<u8>], layer: &[Vec<u8>]) -> (Place, Result<i64, Problem>) {
    let place = Place::new();
    let root = rfs::open(place.root(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let limits = Limits { entries: 50, bytes: 4096 };
    unpack_layer(tar(below).as_slice(), &root, limits).unwrap();
    let layer = tar(layer);
    let result = Hidden::read(layer.as_slice(), limits)
        .and_then(|hidden| hidden.remove_from(&root))
        .and_then(|()| unpack_layer(layer.as_slice(), &root, limits));
    place.outside_is_untouched();
    (place, result)
}

#[test]
fn a_layer_changes_hides_and_replaces_what_lies_below() {
    let folder = |name: &[u8]| member(name, b'5', b"", b"");
    let below = [
        folder(b"etc/"),
        file(b"etc/gone"),
        file(b"etc/stays"),
        folder(b"old/"),
        file(b"old/deep/file"),
        folder(b"cache/"),
        file(b"cache/a"),
        file(b"cache/b/c"),
        file(b"file"),
        folder(b"folder/"),
        file(b"folder/inner"),
        member(b"link", b'2', b"", b"../outside"),
    ];
    let (place, done) = above(
        &below,
        &[
            file(b"cache/new"),
            member(b"cache/.wh..wh..opq", b'0', b"", b""),
            member(b"etc/.wh.gone", b'0', b"", b""),
            member(b"etc/.wh.never", b'0', b"", b""),
            member(b".wh.old", b'0', b"", b""),
            member(b".wh..wh.plnk", b'5', b"", b""),
            member(b"etc/stays", b'0', b"other", b""),
            member(b"etc/again", b'1', b"", b"etc/stays"),
            folder(b"file/"),
            file(b"file/in"),
            file(b"folder"),
            folder(b"link/"),
            file(b"link/secret"),
            // The last of two with one name counts.
            member(b"twice", b'0', b"1", b""),
            member(b"twice", b'0', b"2", b""),
        ],
    );
    done.unwrap();
    let read = |path: &str| fs::read_to_string(place.root().join(path)).ok();
    for (path, content) in [
        ("etc/stays", Some("other")),
        ("etc/again", Some("other")),
        ("etc/gone", None),
        ("old/deep/file", None),
        ("cache/a", None),
        ("cache/b/c", None),
        ("cache/new", Some("x")),
        ("file/in", Some("x")),
        ("folder", Some("x")),
        ("link/secret", Some("x")),
        ("twice", Some("2")),
    ] {
        assert_eq!(read(path).as_deref(), content, "{path}");
    }
    assert!(!place.root().join("old").exists() && !place.root().join(".wh..wh.plnk").exists());
}

#[test]
fn nothing_of_a_layer_reaches_outside_of_the_tree_below() {
    let link = member(b"out", b'2', b"", b"../outside");
    for (what, layer) in [
        ("a file through a link", vec![file(b"out/new")]),
        ("a whiteout of nothing", vec![member(b"d/.wh.", b'0', b"", b"")]),
        ("a whiteout of the folder above", vec![member(b"d/.wh...", b'0', b"", b"")]),
        ("a whiteout in the place of a folder", vec![file(b".wh.d/x")]),
        ("up", vec![file(b"../outside/new")]),
        ("a hard link through a link", vec![member(b"h", b'1', b"", b"out/secret")]),
        ("a device", vec![member(b"etc/sda", b'4', b"", b"")]),
    ] {
        assert!(above(std::slice::from_ref(&link), &layer).1.is_err(), "{what} is taken");
    }
    // Behind a link lies nothing that a layer could hide.
    for layer in
        [vec![member(b"out/.wh.secret", b'0', b"", b"")], vec![member(b"out/.wh..wh..opq", b'0', b"", b"")]]
    {
        drop(above(std::slice::from_ref(&link), &layer));
    }
    let (place, done) = above(std::slice::from_ref(&link), &[file(b"out")]);
    done.unwrap();
    assert_eq!(fs::read(place.root().join("out")).unwrap(), b"x");
}

#[test]
fn what_a_layer_hides_is_known_before_it_is_unpacked() {
    let layer = tar(&[
        member(b"var/lib/.wh.dpkg", b'0', b"", b""),
        member(b"etc/.wh..wh..opq", b'0', b"", b""),
        file(b"usr/x"),
    ]);
    let hidden = Hidden::read(layer.as_slice(), Limits::default()).unwrap();
    for (path, is_hidden) in [
        ("var/lib/dpkg", true),
        ("var/lib/dpkg/status", true),
        ("var/lib/dpkg2", false),
        ("etc", false),
        ("etc/os-release", true),
        ("usr/x", false),
    ] {
        assert_eq!(hidden.hides(path.as_bytes()), is_hidden, "{path}");
    }
}

/// An entry of names that get in each other's way.
fn entry() -> impl Strategy<Value = Vec<u8>> {
    let name = || {
        prop::sample::select(vec![
            "a",
            "a/",
            "a/b",
            "a/b/c",
            "./",
            "./a",
            "out",
            "out/",
            "out/new",
            "out/secret",
            "../outside/new",
            "/a",
            "a/../../outside/new",
            ".wh.a",
            "a/.wh.b",
            "out/.wh.secret",
            "a/.wh..wh..opq",
            "out/.wh..wh..opq",
            ".wh...",
        ])
    };
    let link =
        || prop::sample::select(vec!["../outside", "../outside/secret", "a", "a/b", "out/secret", ".", ".."]);
    prop_oneof![
        3 => (name(), prop::sample::select(b"0125347xgLKSZ".to_vec()), link())
            .prop_map(|(name, flag, link)| member(name.as_bytes(), flag, b"", link.as_bytes())),
        3 => (name(), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(name, content)| member(name.as_bytes(), b'0', &content, b"")),
        2 => link().prop_map(|link| member(b"out", b'2', b"", link.as_bytes())),
        1 => (prop::sample::select(vec!["path", "linkpath", "size", "uid", "mtime", "SCHILY.xattr.user.x", "GNU.sparse.size"]), name())
            .prop_map(|(key, value)| pax(&[(key, value.as_bytes())])),
    ]
}

/// As if whoever made it had meant it.
fn with_right_checksums(mut tar: Vec<u8>) -> Vec<u8> {
    for block in tar.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    tar
}

proptest! {
    /// Whatever a tar holds, it is taken or refused, by whoever unpacks it.
    #[test]
    fn no_tar_ends_a_reader_or_reaches_outside(
        entries in prop::collection::vec(entry(), 1..8),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = tar(&entries);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let mut bytes = with_right_checksums(bytes);
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let limits = Limits { entries: 50, bytes: 4096 };
        let root = |place: &Place| rfs::open(place.root(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let place = Place::new();
        let _ = place.extract(&bytes);
        place.outside_is_untouched();
        let place = Place::new();
        let _ = unpack_root(bytes.as_slice(), &root(&place), limits);
        place.outside_is_untouched();
        // On top of what the same entries make.
        if let Ok(hidden) = Hidden::read(bytes.as_slice(), limits) {
            let _ = hidden.remove_from(&root(&place));
            place.outside_is_untouched();
        }
        let _ = unpack_layer(bytes.as_slice(), &root(&place), limits);
        place.outside_is_untouched();
    }
}
