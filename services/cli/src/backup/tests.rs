//! Archives that are not what was written. A whole one makes a whole site in `tests/scenarios/backup.rs`.

use std::path::Path;

use super::*;

fn part(name: &str, content: &[u8]) -> Part {
    Part { name: name.to_owned(), size: content.len() as u64, digest: Digest::of(content) }
}

fn tar_of(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        tar.append_data(&mut header, name, content.as_slice()).unwrap();
    }
    tar.into_inner().unwrap()
}

fn manifest(format: u32, listed: &[Part]) -> Manifest {
    Manifest {
        format,
        kiln: "9.9".to_owned(),
        site: "home".to_owned(),
        id: "0a1b2c3d".to_owned(),
        time: jiff::Timestamp::UNIX_EPOCH,
        own_broker: true,
        stores: Vec::new(),
        parts: listed.to_vec(),
    }
}

/// An archive of these parts, its list written for `listed`.
fn archive(format: u32, listed: &[Part], entries: &[(&str, &[u8])]) -> Vec<u8> {
    archive_with(&manifest(format, listed), entries)
}

fn archive_with(manifest: &Manifest, entries: &[(&str, &[u8])]) -> Vec<u8> {
    let head = serde_json::to_vec(manifest).unwrap();
    let mut all = vec![(manifest_name(&head), head)];
    all.extend(entries.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())));
    tar_of(&all)
}

async fn refusal(folder: &Path, archive: &[u8]) -> String {
    let (file, home) = (folder.join("archive"), folder.join("home"));
    std::fs::write(&file, archive).unwrap();
    let (key, _) = Key::ensure(&folder.join("key")).unwrap();
    let refused = restore(&file, &key, &home, "root").await.err().unwrap();
    // Nothing is left of what was begun.
    assert_eq!(std::fs::read_dir(&home).unwrap().count(), 0);
    refused.line()
}

#[tokio::test]
async fn what_is_no_whole_backup_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let site = b"name = \"home\"".as_slice();
    let listed = [part(SITE, site), part(KEYS, b"k")];
    let entries = [(SITE, site), (KEYS, b"k".as_slice())];
    let whole = archive(FORMAT, &listed, &entries);
    let mut flipped = whole.clone();
    // In the content of the list of parts, behind its header.
    flipped[700] ^= 1;
    let blob = [part("blobs/00", b"x")];
    for (what, archive, said) in [
        ("nothing", Vec::new(), "empty"),
        ("no tar", vec![7; 2000], "no backup"),
        ("another tar", tar_of(&[("x".to_owned(), Vec::new())]), "not made by `kiln backup`"),
        ("cut in a part", whole[..whole.len() - 1900].to_vec(), "cut off"),
        ("cut between parts", archive(FORMAT, &listed, &entries[..1]), "cut off before keys.sealed"),
        ("a flipped bit", flipped, "its list of parts is damaged"),
        (
            "another content",
            archive(FORMAT, &listed, &[(SITE, b"name = \"hope\""), (KEYS, b"k")]),
            "is damaged",
        ),
        (
            "another order",
            archive(FORMAT, &listed, &[(KEYS, b"k"), (SITE, site)]),
            "where site.toml should be",
        ),
        ("more than listed", archive(FORMAT, &listed[..1], &entries), "nothing speaks of"),
        ("an earlier format", archive(1, &listed, &entries), "whether somebody changed it"),
        ("a later format", archive(FORMAT + 1, &listed, &entries), "written by Kiln 9.9"),
        ("a foreign name", archive(FORMAT, &[part("../x", b"x")], &[]), "cut off before"),
        ("a path", archive(FORMAT, &[part("etc/x", b"x")], &[("etc/x", b"x")]), "no part of a backup"),
        ("a blob's name", archive(FORMAT, &blob, &[("blobs/00", b"x")]), "named after another digest"),
        ("a lack", archive(FORMAT, &listed[..1], &entries[..1]), "it has no keys.sealed"),
        ("another key", whole, "another key"),
    ] {
        let found = refusal(folder.path(), &archive).await;
        assert!(found.contains(said), "{what}: {found}");
    }
    let home = folder.path().join("home");
    std::fs::write(home.join("mine"), "").unwrap();
    let (key, _) = Key::ensure(&folder.path().join("key")).unwrap();
    let refused = restore(&folder.path().join("archive"), &key, &home, "root").await.err().unwrap();
    assert!(refused.line().contains("not empty"), "{}", refused.line());
    assert!(home.join("mine").exists());
}

#[tokio::test]
async fn what_was_changed_and_listed_anew_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (key, _) = Key::ensure(&folder.path().join("key")).unwrap();
    let name = store_name(Service::Builder);
    let (site, store) =
        ((SITE, b"name = \"home\"".as_slice()), (name.as_str(), b"what was built".as_slice()));
    let listed = |entries: &[(&str, &[u8])]| -> Vec<Part> {
        entries.iter().map(|(name, content)| part(name, content)).collect()
    };
    let about = manifest(FORMAT, &listed(&[site, store])).sealed_about().unwrap();
    let sealed = key.seal(&about, b"").unwrap();
    // The digests are always those of what is there.
    let with_keys = |others: &[(&str, &[u8])], change: fn(&mut Manifest)| {
        let mut entries = others.to_vec();
        entries.push((KEYS, &sealed));
        let mut manifest = manifest(FORMAT, &listed(&entries));
        change(&mut manifest);
        archive_with(&manifest, &entries)
    };
    // The keys are opened, and what is wrong is found behind them.
    let found = refusal(folder.path(), &with_keys(&[site, store], |_| {})).await;
    assert!(found.contains("the settings in the backup"), "{found}");
    for (what, archive) in [
        ("the settings", with_keys(&[(SITE, b"name = \"hope\""), store], |_| {})),
        ("a store", with_keys(&[site, (&name, b"what was forged")], |_| {})),
        ("a store less", with_keys(&[site], |_| {})),
        ("another order", with_keys(&[store, site], |_| {})),
        ("a part more", with_keys(&[site, store, (CONTEXTS, b"")], |_| {})),
        ("the id", with_keys(&[site, store], |it| it.id = "ffffffff".to_owned())),
        ("whose the broker is", with_keys(&[site, store], |it| it.own_broker = false)),
    ] {
        let found = refusal(folder.path(), &archive).await;
        assert!(found.contains("was changed after it was made"), "{what}: {found}");
    }
}
