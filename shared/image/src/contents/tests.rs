use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

use rustix::fs::{CWD, XattrFlags};

use super::*;
use crate::store::tests::{of_layers, store};
use crate::{Layer, Packer, Whiteouts};

/// A layer of what `fill` puts into a folder, in the form of an overlay's upper.
fn layer(store: &ImageStore, fill: impl Fn(&Path)) -> Layer {
    let tree = tempfile::tempdir().unwrap();
    fill(tree.path());
    let packed =
        Packer { whiteouts: Whiteouts::Overlay, newest: 1000, shift: 0 }.pack(store, tree.path()).unwrap();
    let created = "1970-01-01T00:00:00Z".to_owned();
    Layer { diff_id: packed.diff_id, size: packed.size, created_by: String::new(), created }
}

fn write(folder: &Path, path: &str, content: &str) {
    let path = folder.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn hide(folder: &Path, path: &str) {
    let path = folder.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    rfs::mknodat(CWD, &path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

fn base(folder: &Path) {
    write(folder, "etc/one", "1");
    write(folder, "etc/two", "2");
    write(folder, "etc/two0", "beside");
    write(folder, "old/a/b", "b");
    write(folder, "gone/x", "x");
    write(folder, "turns/into", "a file");
    symlink("one", folder.join("etc/link")).unwrap();
}

fn paths(contents: &Contents) -> Vec<String> {
    let is_file = |node: &Node| node.kind != NodeKind::Directory;
    let files = contents.nodes().filter(|(_, node)| is_file(node));
    files.map(|(path, _)| String::from_utf8(path.to_vec()).unwrap()).collect()
}

#[test]
fn a_layer_lies_over_the_ones_before_it() {
    let (_folder, store) = store();
    let upper = layer(&store, |folder| {
        write(folder, "etc/one", "changed");
        hide(folder, "etc/two");
        hide(folder, "gone");
        write(folder, "old/new", "n");
        rfs::setxattr(folder.join("old"), OVERLAY_OPAQUE, b"y", XattrFlags::empty()).unwrap();
        write(folder, "turns", "it is one");
    });
    let image = of_layers(&store, vec![layer(&store, base), upper]);
    let contents = store.contents(&image).unwrap();
    assert_eq!(paths(&contents), ["etc/link", "etc/one", "etc/two0", "old/new", "turns"]);
    assert_eq!(contents.read(b"etc/one", 7).unwrap().unwrap(), b"changed");
    assert_eq!(contents.read(b"etc/two0", 100).unwrap().unwrap(), b"beside");
    assert!(
        contents.read(b"etc/one", 6).unwrap_err().to_string().contains("/etc/one: more than the 6 bytes")
    );
    assert_eq!(contents.read(b"etc/two", 100).unwrap(), None);
    // A link is not followed, and a folder is no file.
    assert_eq!(contents.read(b"etc/link", 100).unwrap(), None);
    assert_eq!(contents.read(b"etc", 100).unwrap(), None);
    let stack = store.stack(&image).unwrap();
    for (path, node) in contents.nodes() {
        let found = stack.read(path, 100).unwrap();
        assert_eq!(found.is_some(), matches!(node.kind, NodeKind::File { .. }), "{}", path.escape_ascii());
        assert_eq!(found, contents.read(path, 100).unwrap());
    }
    for gone in [&b"etc/two"[..], b"gone/x", b"gone", b"old/a/b", b"turns/into", b"never", b"etc/link/x"] {
        assert_eq!(stack.read(gone, 100).unwrap(), None, "{}", gone.escape_ascii());
    }
    assert_eq!(stack.link(b"etc/link").unwrap().unwrap(), b"one");
    assert_eq!(stack.link(b"etc/one").unwrap(), None);
    assert_eq!(contents.get(b"etc/link").unwrap().kind, NodeKind::Symlink { target: b"one".to_vec() });
}

#[test]
fn two_images_differ_where_a_process_in_them_would_see_it() {
    let (_folder, store) = store();
    let common = layer(&store, base);
    let before = of_layers(&store, vec![common.clone()]);
    let upper = layer(&store, |folder| {
        // The same again, in a layer of its own.
        write(folder, "etc/one", "1");
        write(folder, "etc/two", "3");
        write(folder, "etc/two0", "beside");
        fs::set_permissions(folder.join("etc/two0"), fs::Permissions::from_mode(0o600)).unwrap();
        chown(folder.join("etc/two0"), Some(7), None).unwrap();
        hide(folder, "gone");
        write(folder, "new", "n");
    });
    let after = of_layers(&store, vec![common, upper]);
    let alone = [&before, &after].map(|image| store.contents(image).unwrap());
    let (before, after) = store.contents_of_both(&before, &after).unwrap();
    for (alone, both) in alone.iter().zip([&before, &after]) {
        assert!(alone.nodes().eq(both.nodes()));
    }
    let told = |differences: Vec<Difference>| {
        let one = |it: Difference| {
            let path = String::from_utf8(it.path).unwrap();
            let sides = (it.before.is_some(), it.after.is_some(), it.content);
            (path, sides)
        };
        differences.into_iter().map(one).collect::<Vec<_>>()
    };
    let found = before.differences(&after).unwrap();
    let modes = found.iter().find(|it| it.path == b"etc/two0").unwrap().clone();
    let (old, new) = (modes.before.unwrap(), modes.after.unwrap());
    assert_eq!((old.mode, old.uid, new.mode, new.uid), (0o644, 0, 0o600, 7));
    let wanted = [
        ("etc/two", (true, true, true)),
        ("etc/two0", (true, true, false)),
        ("gone", (true, false, false)),
        ("gone/x", (true, false, false)),
        ("new", (false, true, false)),
    ];
    assert_eq!(told(found), wanted.map(|(path, sides)| (path.to_owned(), sides)));
    let back = told(after.differences(&before).unwrap());
    assert_eq!(back.len(), wanted.len());
    assert_eq!(back.last().unwrap(), &("new".to_owned(), (true, false, false)));
    assert_eq!(after.differences(&after).unwrap(), []);
}

#[test]
fn a_root_that_is_exported_is_what_the_image_holds() {
    let (_folder, store) = store();
    let upper = layer(&store, |folder| {
        write(folder, "etc/one", "changed");
        fs::hard_link(folder.join("etc/one"), folder.join("etc/same")).unwrap();
        hide(folder, "etc/two");
        hide(folder, "gone");
        write(folder, "bin/tool", "runs");
        fs::set_permissions(folder.join("bin/tool"), fs::Permissions::from_mode(0o4755)).unwrap();
        chown(folder.join("etc/one"), Some(7), Some(8)).unwrap();
    });
    let image = of_layers(&store, vec![layer(&store, base), upper]);
    let mut tar = Vec::new();
    store.export_root(&image, &mut tar).unwrap();
    let out = tempfile::tempdir().unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let root = rfs::open(out.path(), flags, Mode::empty()).unwrap();
    crate::unpack_root(tar.as_slice(), &root, crate::Limits::default()).unwrap();
    let packed = Packer { whiteouts: Whiteouts::None, newest: 1000, shift: 0 };
    let packed = packed.pack(&store, out.path()).unwrap();
    let (created_by, created) = (String::new(), "1970-01-01T00:00:00Z".to_owned());
    let again =
        of_layers(&store, vec![Layer { diff_id: packed.diff_id, size: packed.size, created_by, created }]);
    let (before, after) = (store.contents(&image).unwrap(), store.contents(&again).unwrap());
    assert_eq!(before.differences(&after).unwrap(), []);
    let link = |path: &str| rfs::lstat(out.path().join(path)).unwrap();
    assert_eq!((link("etc/one").st_ino, link("etc/one").st_nlink), (link("etc/same").st_ino, 2));
    assert_eq!(link("etc/link").st_mode & 0o170_000, 0o120_000);
}

#[test]
fn links_are_followed_within_the_root_and_whatever_layer_has_them() {
    let (_folder, store) = store();
    let lower = layer(&store, |folder| {
        write(folder, "doc/one/copyright", "1");
        write(folder, "doc/two/copyright", "2");
        write(folder, "doc/three/copyright", "3");
        write(folder, "etc/passwd", "the image's");
        symlink("one", folder.join("doc/same")).unwrap();
        symlink("/etc", folder.join("doc/far")).unwrap();
        symlink("../../../../etc", folder.join("doc/up")).unwrap();
        symlink("round", folder.join("doc/round")).unwrap();
    });
    let upper = layer(&store, |folder| {
        hide(folder, "doc/two");
        fs::create_dir_all(folder.join("doc")).unwrap();
        symlink("one", folder.join("doc/three")).unwrap();
        write(folder, "doc/one/more", "m");
    });
    let image = of_layers(&store, vec![lower, upper]);
    let stack = store.stack(&image).unwrap();
    let read = |path: &str| {
        let content = stack.read_through_links(path.as_bytes(), 100).unwrap();
        content.map(|bytes| String::from_utf8(bytes).unwrap())
    };
    for (path, wanted) in [
        ("doc/one/copyright", Some("1")),
        ("doc/one/more", Some("m")),
        ("doc/two/copyright", None),
        ("doc/three/copyright", Some("1")),
        ("doc/same/copyright", Some("1")),
        ("doc/same/../one/./copyright", Some("1")),
        ("doc/far/passwd", Some("the image's")),
        ("doc/up/passwd", Some("the image's")),
        ("../../../etc/passwd", Some("the image's")),
        ("doc/round/x", None),
        ("doc", None),
        ("", None),
    ] {
        assert_eq!(read(path).as_deref(), wanted, "{path}");
    }
    assert!(stack.read_through_links(b"etc/passwd", 3).is_err());
}
