use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::thread;

use ed25519_dalek::SigningKey;
use rustix::fs::{self as rfs, AtFlags, FileType, Mode, XattrFlags};

use super::*;
use crate::index::Index;
use crate::{COSIGN_SIGNATURE, Error, Layer, NewImage, Packer, Part, Signer, Thoroughness, Whiteouts};

pub(crate) fn key(seed: u8) -> SigningKey {
    SigningKey::from_bytes(&[seed; 32])
}

pub(crate) fn store() -> (tempfile::TempDir, ImageStore) {
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(&folder.path().join("images")).unwrap();
    (folder, store)
}

fn packer(whiteouts: Whiteouts) -> Packer {
    Packer { whiteouts, newest: 1_000_000, shift: 0 }
}

/// A layer with one file.
fn layer(store: &ImageStore, content: &str) -> Layer {
    let tree = tempfile::tempdir().unwrap();
    fs::write(tree.path().join("file"), content).unwrap();
    let packed = packer(Whiteouts::None).pack(store, tree.path()).unwrap();
    Layer {
        diff_id: packed.diff_id,
        size: packed.size,
        created_by: format!("step {content}"),
        created: "1970-01-12T13:46:40Z".to_owned(),
    }
}

pub(crate) fn image(store: &ImageStore, contents: &[&str]) -> Digest {
    of_layers(store, contents.iter().map(|content| layer(store, content)).collect())
}

pub(crate) fn of_layers(store: &ImageStore, layers: Vec<Layer>) -> Digest {
    store
        .put_image(&NewImage {
            architecture: "amd64".to_owned(),
            created: "2026-01-01T00:00:00Z".to_owned(),
            env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            user: "0".to_owned(),
            command: vec!["true".to_owned()],
            labels: BTreeMap::from([("one".to_owned(), "1".to_owned()), ("two".to_owned(), "2".to_owned())]),
            layers,
        })
        .unwrap()
}

#[test]
fn the_same_image_has_the_same_digest_and_is_there_once() {
    let (_a, first) = store();
    let (_b, second) = store();
    let digest = image(&first, &["x", "y"]);
    assert_eq!(digest, image(&second, &["x", "y"]));
    assert_eq!(digest, image(&first, &["x", "y"]));
    assert_eq!(first.images().unwrap(), [digest]);
    let read = first.image(&digest).unwrap();
    assert_eq!(read.layers[1].created_by, "step y");
    assert_eq!(read.config.created().as_deref(), Some("2026-01-01T00:00:00Z"));
}

#[test]
fn a_blob_is_what_its_name_says_or_not_there() {
    let (_folder, store) = store();
    let wanted = Digest::of(b"wanted");
    assert!(matches!(store.put_blob(&mut &b"other"[..], Some(&wanted)), Err(Error::Corrupt { .. })));
    assert!(!store.has_blob(&wanted));
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
    store.put_blob(&mut &b"wanted"[..], Some(&wanted)).unwrap();
    assert!(store.has_blob(&wanted));
}

#[test]
fn a_damaged_blob_is_not_taken_over_and_is_mended_by_a_whole_one() {
    let (folder, store) = store();
    let wanted = Digest::of(b"wanted");
    let cached = folder.path().join("cached");
    for damaged in [&b"damage"[..], b"cut"] {
        fs::write(&cached, damaged).unwrap();
        let refused = store.adopt_blob(&cached, &wanted);
        assert!(matches!(refused, Err(Error::Corrupt { .. })) && !store.has_blob(&wanted), "{refused:?}");
    }
    assert!(!store.adopt_blob(&folder.path().join("nowhere"), &wanted).unwrap());
    fs::write(&cached, b"wanted").unwrap();
    assert!(store.adopt_blob(&cached, &wanted).unwrap());

    // On disk, behind the store's back.
    for damaged in [&b"damage"[..], b"cut"] {
        fs::write(store.blob_path(&wanted), damaged).unwrap();
        store.put_blob(&mut &b"wanted"[..], Some(&wanted)).unwrap();
        assert_eq!(fs::read(store.blob_path(&wanted)).unwrap(), b"wanted");
    }
}

#[test]
fn packing_what_was_extracted_gives_the_same_bytes() {
    let (folder, store) = store();
    let tree = folder.path().join("tree");
    fs::create_dir_all(tree.join("d/e")).unwrap();
    let put = |path: &str, mode: u32, uid: u32| {
        let path = tree.join(path);
        fs::write(&path, path.display().to_string()).unwrap();
        chown(&path, Some(uid), Some(uid + 1)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    put("d/setuid", 0o4755, 0);
    put("d/secret", 0o600, 5);
    put("d/large-id", 0o640, 3_000_000);
    put(&format!("d/{}", "n".repeat(200)), 0o644, 0);
    put("d/capable", 0o755, 0);
    // cap_net_raw=ep, revision 2.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rfs::lsetxattr(tree.join("d/capable"), "security.capability", &capability, XattrFlags::empty()).unwrap();
    fs::hard_link(tree.join("d/secret"), tree.join("d/e/again")).unwrap();
    symlink("../../etc/passwd", tree.join("d/link")).unwrap();
    rfs::mknodat(rfs::CWD, tree.join("d/fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    rfs::mknodat(rfs::CWD, tree.join("d/gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    rfs::lsetxattr(tree.join("d/e"), "trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();

    let packed = packer(Whiteouts::Overlay).pack(&store, &tree).unwrap();
    let extracted = store.layer_tree(&packed.diff_id).unwrap();
    let again = packer(Whiteouts::Overlay).pack(&store, &extracted).unwrap();
    assert_eq!(packed, again);

    use std::os::unix::fs::MetadataExt as _;
    let stat = |path: &str| fs::symlink_metadata(extracted.join(path)).unwrap();
    assert_eq!(stat("d/setuid").mode() & 0o7777, 0o4755);
    assert_eq!((stat("d/large-id").uid(), stat("d/large-id").gid()), (3_000_000, 3_000_001));
    assert_eq!(stat("d/secret").ino(), stat("d/e/again").ino());
    assert_eq!(stat("d/secret").mtime(), 1_000_000, "younger than `newest`");
    let mut value = [0; 32];
    let length = rfs::lgetxattr(extracted.join("d/capable"), "security.capability", &mut value[..]).unwrap();
    assert_eq!(value[..length], capability);
}

#[test]
fn owners_below_the_shift_are_not_packed() {
    let (folder, store) = store();
    let tree = folder.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "x").unwrap();
    let shifted = Packer { whiteouts: Whiteouts::Overlay, newest: 0, shift: 200_000 };
    assert!(shifted.pack(&store, &tree).is_err());
    chown(tree.join("file"), Some(200_007), Some(200_000)).unwrap();
    let packed = shifted.pack(&store, &tree).unwrap();
    let extracted = store.layer_tree(&packed.diff_id).unwrap();
    assert_eq!(rfs::statat(rfs::CWD, extracted.join("file"), AtFlags::empty()).unwrap().st_uid, 7);
}

#[test]
fn only_a_trusted_signature_of_this_image_counts() {
    let (_folder, store) = store();
    let (good, other) = (image(&store, &["good"]), image(&store, &["other"]));
    let (ours, theirs) = (key(1), key(2));
    let trusted = [ours.verifying_key()];
    let verify = |digest| store.verify(digest, &trusted, 1, Thoroughness::Blobs);

    assert!(matches!(verify(&good), Err(Error::Unsigned(_))));
    store.sign(&good, &theirs.into()).unwrap();
    assert!(matches!(verify(&good), Err(Error::Untrusted { .. })));
    let ours = Signer::from(ours);
    let id = store.sign(&good, &ours).unwrap();
    assert_eq!(verify(&good).unwrap(), BTreeSet::from([id]));
    assert_eq!(store.sign(&good, &ours).unwrap(), id);
    assert!(store.verify(&good, &[], 1, Thoroughness::Manifest).is_err());

    // Somebody who can write the index says that the signature is the other image's.
    assert!(matches!(verify(&other), Err(Error::Unsigned(_))));
    store
        .change_index(|entries| {
            for entry in entries.iter_mut().filter(|entry| entry.artifact_type.is_some()) {
                entry.annotations.insert(crate::index::SUBJECT.to_owned(), other.to_string());
            }
        })
        .unwrap();
    assert!(matches!(verify(&other), Err(Error::Untrusted { .. })));
    assert!(matches!(verify(&good), Err(Error::Unsigned(_))));
}

#[test]
fn a_threshold_is_of_distinct_keys() {
    let (_folder, store) = store();
    let digest = image(&store, &["good"]);
    let trusted = [key(1).verifying_key(), key(2).verifying_key(), key(1).verifying_key()];
    let verify = |threshold| store.verify(&digest, &trusted, threshold, Thoroughness::Manifest);
    store.sign(&digest, &key(1).into()).unwrap();
    store.sign(&digest, &key(1).into()).unwrap();
    store.sign(&digest, &key(3).into()).unwrap();
    assert_eq!(verify(1).unwrap().len(), 1);
    // Nor does a threshold of none let anything through.
    assert!(store.verify(&digest, &[key(4).verifying_key()], 0, Thoroughness::Manifest).is_err());
    let refused = verify(2).unwrap_err().to_string();
    assert!(refused.contains("1 of the 2 keys"), "{refused}");
    store.sign(&digest, &key(2).into()).unwrap();
    assert_eq!(verify(2).unwrap().len(), 2);
    assert!(verify(3).is_err(), "a key that is named twice counts once");
}

/// A command with the key, as a shell script that answers with what was made before.
#[test]
fn a_command_signs_and_what_it_prints_is_checked() {
    use std::os::unix::fs::PermissionsExt as _;
    let (folder, store) = store();
    let digest = image(&store, &["good"]);
    let signed = store.sign(&digest, &key(1).into()).unwrap();
    let envelope = store.referrer_blobs(&store.signatures_of(&digest).unwrap()[0]).unwrap()[1];
    let envelope = store.small_blob(&envelope, 1 << 16).unwrap();
    let envelope: serde_json::Value = serde_json::from_slice(&envelope).unwrap();
    let signature = envelope["signatures"][0]["sig"].as_str().unwrap();
    let referrers = store.referrers_of(&digest).unwrap();
    let for_cosign = referrers.iter().find(|it| it.artifact_type == COSIGN_SIGNATURE).unwrap();
    let for_cosign: serde_json::Value =
        serde_json::from_slice(&store.manifest(&for_cosign.digest).unwrap()).unwrap();
    let annotations = for_cosign["layers"][0]["annotations"].as_object().unwrap();
    let for_cosign = annotations.values().next().unwrap().as_str().unwrap();
    let public = |seed| {
        use ed25519_dalek::pkcs8::EncodePublicKey as _;
        let path = folder.path().join(format!("{seed}.pub"));
        let pem = key(seed).verifying_key().to_public_key_pem(Default::default()).unwrap();
        std::fs::write(&path, pem).unwrap();
        path
    };
    let command = |name: &str, does: &str, seed| {
        let path = folder.path().join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{does}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Signer::command(vec![path.display().to_string()], &public(seed)).unwrap()
    };
    // Asked to sign twice: in each form.
    let answer = format!("case \"$(cat)\" in DSSEv1*) echo {signature};; *) echo {for_cosign};; esac");
    let good = command("good", &answer, 1);
    assert_eq!(store.sign(&digest, &good).unwrap(), signed);
    for (name, does, seed, said) in [
        ("another", format!("echo {signature}"), 2, "not one of the public key"),
        ("junk", "echo junk".to_owned(), 1, "no signature in base64"),
        ("fails", "exit 3".to_owned(), 1, "exit status: 3"),
    ] {
        let refused = store.sign(&digest, &command(name, &format!("cat > /dev/null; {does}"), seed));
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(said), "{name}: {refused}");
    }
}

/// Images, their blobs and their signatures in another store, each blob once.
#[test]
fn what_an_image_is_made_of_makes_it_elsewhere() {
    let (_folder, store) = store();
    let (one, two) = (image(&store, &["base", "one"]), image(&store, &["base", "two"]));
    for digest in [&one, &two] {
        store.sign(digest, &key(1).into()).unwrap();
    }
    let mut blobs = BTreeSet::new();
    blobs.extend(store.blobs_of(&one).unwrap());
    let (_other, elsewhere) = self::store();
    let part = store.index_of(&[one]).unwrap();
    assert!(elsewhere.take_over(&part).is_err(), "what it names is not there yet");
    for blob in &blobs {
        let (mut content, _) = store.open_blob(blob).unwrap();
        elsewhere.put_blob(&mut content, Some(blob)).unwrap();
    }
    elsewhere.take_over(&part).unwrap();
    elsewhere.take_over(&part).unwrap();
    assert_eq!(elsewhere.images().unwrap(), [one]);
    elsewhere.verify(&one, &[key(1).verifying_key()], 1, Thoroughness::Blobs).unwrap();
    let both = blobs.len() + store.blobs_of(&two).unwrap().len();
    blobs.extend(store.blobs_of(&two).unwrap());
    assert!(blobs.len() < both, "the base is there once");
}

#[test]
fn a_changed_blob_is_found() {
    let (_folder, store) = store();
    let digest = image(&store, &["x"]);
    store.sign(&digest, &key(1).into()).unwrap();
    let trusted = [key(1).verifying_key()];
    let layer = store.image(&digest).unwrap().layers[0].diff_id;
    let path = store.blob_path(&layer);
    let mut content = fs::read(&path).unwrap();
    // In the file's content, so that the tar stays well-formed.
    let at = content.iter().position(|b| *b == b'x').unwrap();
    content[at] = b'y';
    fs::write(&path, &content).unwrap();
    // Of the same size, so looking at the manifest alone does not show it; extracting does.
    store.verify(&digest, &trusted, 1, Thoroughness::Manifest).unwrap();
    assert!(matches!(store.verify(&digest, &trusted, 1, Thoroughness::Blobs), Err(Error::Corrupt { .. })));
    assert!(store.layer_tree(&layer).is_err());
    assert!(!store.root().join("layers").join(layer.hex()).exists());
    content.push(0);
    fs::write(&path, &content).unwrap();
    assert!(store.verify(&digest, &trusted, 1, Thoroughness::Manifest).is_err());
}

#[test]
fn manifests_that_lie_are_refused() {
    let (_folder, store) = store();
    let digest = image(&store, &["x"]);
    let content = fs::read_to_string(store.blob_path(&digest)).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&content).unwrap();
    let change = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut changed = manifest.clone();
        change(&mut changed);
        let (digest, _) = store.put_json(&changed).unwrap();
        store.image(&digest)
    };
    assert!(change(&|_| {}).is_ok());
    type Case<'a> = (&'a str, &'a dyn Fn(&mut serde_json::Value));
    let bad: [Case<'_>; 10] = [
        ("index too", &|m| m["manifests"] = serde_json::json!([])),
        ("type", &|m| m["mediaType"] = "application/vnd.oci.image.index.v1+json".into()),
        ("schema", &|m| m["schemaVersion"] = 1.into()),
        ("layer type", &|m| {
            m["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip".into()
        }),
        ("layer size", &|m| m["layers"][0]["size"] = 1.into()),
        ("layer digest", &|m| m["layers"][0]["digest"] = "sha256:../../../etc/passwd".into()),
        ("upper case", &|m| {
            m["layers"][0]["digest"] = m["layers"][0]["digest"].as_str().unwrap().to_uppercase().into();
        }),
        ("elsewhere", &|m| m["layers"][0]["urls"] = serde_json::json!(["https://example.test/"])),
        ("fewer layers", &|m| m["layers"] = serde_json::json!([])),
        ("config size", &|m| m["config"]["size"] = 3.into()),
    ];
    for (what, lie) in bad {
        assert!(change(lie).is_err(), "{what}");
    }
    let twice = content.replacen('{', r#"{"layers":[],"#, 1);
    let (digest, _) = store.put_blob(&mut twice.as_bytes(), None).unwrap();
    assert!(store.image(&digest).is_err(), "a key that is there twice");
}

#[test]
fn many_who_want_one_tree_get_the_same() {
    let (_folder, store) = store();
    let layer = layer(&store, "x").diff_id;
    let trees: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| store.layer_tree(&layer).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(trees.iter().all(|tree| *tree == trees[0]));
    assert_eq!(fs::read_to_string(trees[0].join("file")).unwrap(), "x");
}

#[test]
fn a_layer_that_is_put_has_its_tree_already() {
    let (_folder, store) = store();
    let tree = tempfile::tempdir().unwrap();
    fs::create_dir(tree.path().join("folder")).unwrap();
    // Longer than what is on the way at once.
    let long = vec![7; 8 << 20];
    fs::write(tree.path().join("folder/long"), &long).unwrap();
    symlink("long", tree.path().join("folder/link")).unwrap();

    let (put, _) = store.put_layer(&packer(Whiteouts::None), tree.path()).unwrap();
    let marker = store.root().join("layers").join(format!("{}.boot", put.diff_id.hex()));
    assert!(marker.exists());
    let made = store.layer_tree(&put.diff_id).unwrap();
    assert_eq!(fs::read(made.join("folder/long")).unwrap(), long);
    let (_other, elsewhere) = self::store();
    assert_eq!(
        packer(Whiteouts::None).pack(&elsewhere, &made).unwrap(),
        put,
        "the tree gives the layer again"
    );
    assert_eq!(store.put_layer(&packer(Whiteouts::None), tree.path()).unwrap().0, put);
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);

    // What can't be a layer is refused as it would be by anyone who takes the layer, however much comes after it.
    fs::write(tree.path().join("folder/.wh.x"), "not empty").unwrap();
    let refused = store.put_layer(&packer(Whiteouts::None), tree.path());
    assert!(matches!(refused, Err(Error::Layer { .. })), "{refused:?}");
    fs::remove_file(tree.path().join("folder/.wh.x")).unwrap();
    let mode = Mode::from_raw_mode(0o600);
    rfs::mknodat(rfs::CWD, tree.path().join("z"), FileType::CharacterDevice, mode, rfs::makedev(1, 3))
        .unwrap();
    let refused = store.put_layer(&packer(Whiteouts::None), tree.path());
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

#[test]
fn what_a_crash_left_unfinished_is_forgotten_after_a_day() {
    let (_folder, store) = store();
    let layer = layer(&store, "x").diff_id;
    let tree = store.root().join("tmp/tree-left");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("file"), "").unwrap();
    let (blob, recent) = (store.root().join("tmp/left"), store.root().join("tmp/recent"));
    for path in [&blob, &recent] {
        fs::write(path, "").unwrap();
    }
    for path in [&tree, &blob] {
        let yesterday = std::time::SystemTime::now() - std::time::Duration::from_secs(25 * 3600);
        fs::File::open(path).unwrap().set_modified(yesterday).unwrap();
    }
    assert_eq!(store.forget_unfinished(false).unwrap().0, 2);
    assert_eq!(store.forget_unfinished(true).unwrap().0, 2);
    assert!(!tree.exists() && !blob.exists() && recent.exists() && store.has_blob(&layer));
}

#[test]
fn a_tree_of_before_the_last_boot_is_made_anew() {
    let (_folder, store) = store();
    let layer = layer(&store, "x").diff_id;
    let tree = store.layer_tree(&layer).unwrap();
    fs::write(tree.join("file"), "").unwrap();
    store.layer_tree(&layer).unwrap();
    assert_eq!(fs::read_to_string(tree.join("file")).unwrap(), "", "the same boot: not looked at again");
    fs::write(tree.with_extension("boot"), "another boot").unwrap();
    store.layer_tree(&layer).unwrap();
    assert_eq!(fs::read_to_string(tree.join("file")).unwrap(), "x");
}

#[test]
fn deleting_keeps_what_others_have() {
    let (_folder, store) = store();
    let (one, two) = (image(&store, &["shared", "one"]), image(&store, &["shared", "two"]));
    store.sign(&one, &key(1).into()).unwrap();
    store.sign(&two, &key(1).into()).unwrap();
    let layers = |digest| store.image(digest).unwrap().layers;
    let (gone, kept) = (layers(&one), layers(&two));
    for layer in &gone {
        store.layer_tree(&layer.diff_id).unwrap();
    }
    store.delete(&one).unwrap();
    assert!(matches!(store.image(&one), Err(Error::NoImage(_))));
    assert_eq!(store.images().unwrap(), [two]);
    assert!(!store.has_blob(&gone[1].diff_id) && store.has_blob(&kept[0].diff_id));
    assert!(!store.root().join("layers").join(gone[1].diff_id.hex()).exists());
    store.verify(&two, &[key(1).verifying_key()], 1, Thoroughness::Blobs).unwrap();
}

#[test]
fn an_export_is_a_layout_with_just_this_image() {
    let (folder, store) = store();
    let digest = image(&store, &["x", "y"]);
    image(&store, &["z"]);
    store.sign(&digest, &key(1).into()).unwrap();
    let mut bytes = Vec::new();
    store.export(&digest, "web", &mut bytes).unwrap();
    let mut reader = crate::tar::Reader::new(bytes.as_slice());
    let mut names = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let name = String::from_utf8(entry.path).unwrap();
        let mut content = Vec::new();
        reader.read_to_end(&mut content).unwrap();
        if let Some(hex) = name.strip_prefix("blobs/sha256/") {
            assert_eq!(Digest::of(&content).hex(), hex);
        } else if name == "index.json" {
            let index: Index = serde_json::from_slice(&content).unwrap();
            assert_eq!(index.manifests.iter().map(|entry| entry.digest).collect::<Vec<_>>(), [digest]);
        }
        names.push(name);
    }
    assert_eq!(names.iter().filter(|name| name.starts_with("blobs/")).count(), 4);
    drop(folder);
}

#[test]
fn what_is_attached_to_an_image_is_found_by_its_type_and_goes_with_it() {
    let (_folder, store) = store();
    let (one, two) = (image(&store, &["one"]), image(&store, &["two"]));
    store.sign(&one, &key(1).into()).unwrap();
    let attach = |image, content: &str| {
        let part = Part { media_type: "text/plain", content: content.as_bytes(), ..Part::default() };
        store.attach(image, "a/type", &part).unwrap()
    };
    let first = attach(&one, "first");
    assert_eq!(attach(&one, "first"), first);
    attach(&two, "of another");
    let second = attach(&one, "second");
    let types: Vec<_> = store.referrers_of(&one).unwrap().into_iter().map(|it| it.artifact_type).collect();
    assert_eq!(types, [crate::COSIGN_SIGNATURE, crate::SIGNATURE, "a/type", "a/type"]);
    assert_eq!(store.signatures_of(&one).unwrap().len(), 1);
    assert_eq!(store.attached(&one, "a/type", 6).unwrap().unwrap(), b"second");
    assert!(store.attached(&one, "a/type", 5).is_err());
    assert_eq!(store.attached(&one, "another/type", 6).unwrap(), None);
    assert!(store.referring(&second, &two, 6).unwrap_err().to_string().contains("is not about image"));
    let parts = store.parts_of(&second).unwrap();
    assert!(parts.iter().all(|(part, _)| store.blobs_of(&one).unwrap().contains(part)));
    store.delete(&one).unwrap();
    assert!(!store.has_blob(&first) && !store.has_blob(&second) && !store.has_blob(&Digest::of(b"second")));
    assert_eq!(store.attached(&two, "a/type", 20).unwrap().unwrap(), b"of another");
}
