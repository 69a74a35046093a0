//! Making a site out of a backup. Every byte of it is checked like hostile input.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, Permissions};
use std::io::{BufReader, Read, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_model::event::Service;
use kiln_service::config::{Site, SiteFile};
use serde_json::{Value, json};

use super::write::Hashing;
use super::{
    CONTEXTS, FORMAT, IMAGES, KEYS, Key, Manifest, Part, SERVICES, SITE, blob_name, manifest_name, store_name,
};
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::site::ledger::{Deed, Ledger};
use crate::site::{broker, keys};

const MANIFEST_LIMIT: u64 = 64 << 20;
/// Of what is held in memory: the keys, the settings, the part of the index.
const SMALL_LIMIT: u64 = 64 << 20;

pub(crate) struct Restored {
    pub(crate) site: Site,
    pub(crate) time: jiff::Timestamp,
    pub(crate) blobs: usize,
}

/// Makes the site in a folder that is empty or not there. What fails leaves it so.
pub(crate) async fn restore(archive: &Path, key: &Key, home: &Path, by: &str) -> Outcome<Restored> {
    let what = format!("restoring into {}", home.display());
    if std::fs::read_dir(home).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Failure::new(Code::Refused, what, "it is not empty, and what is there would be lost")
            .reason("not_empty")
            .todo("kiln down --delete-state, or name another folder with --home"));
    }
    DirBuilder::new().recursive(true).mode(0o700).create(home).during(&what)?;
    std::fs::set_permissions(home, Permissions::from_mode(0o700)).during(&what)?;
    let home = home.canonicalize().during(&what)?;
    let restored = into_empty(archive, key, &home, by).await;
    if restored.is_err() {
        for entry in std::fs::read_dir(&home).during(&what)? {
            let path = entry.during(&what)?.path();
            let removed =
                if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.during(format_args!("clearing {}", path.display()))?;
        }
    }
    restored
}

async fn into_empty(archive: &Path, key: &Key, home: &Path, by: &str) -> Outcome<Restored> {
    let staging = home.join("restore");
    let images = home.join("images");
    for folder in [&staging, &images, &home.join("keys"), &home.join("nats")] {
        make_folder(folder)?;
    }
    let images =
        ImageStore::open(&images).map_err(|error| Failure::failed("making the image store", error))?;
    let (archive, into, store) = (archive.to_owned(), staging.clone(), images.clone());
    let taken = tokio::task::spawn_blocking(move || take(&archive, &into, &store)).await;
    let Taken { manifest, mut small, blobs } =
        taken.map_err(|error| Failure::failed("reading the backup", error))??;

    let mut small = |name: &str| small.remove(name).ok_or_else(|| damaged(format!("it has no {name}")));
    let text = String::from_utf8(small(SITE)?).map_err(|_| damaged("its site.toml is no text".to_owned()))?;
    // Before the settings are used: they name programs that run as root, and only this shows that nobody changed them.
    unpack_keys(&key.open(&manifest.sealed_about()?, &small(KEYS)?)?, &home.join("keys"))?;
    let wrong =
        |why: String| Failure::new(Code::Invalid, "the settings in the backup", why).reason("bad_config");
    let file = SiteFile::parse(&text).map_err(wrong)?;
    let site = file.check(home).map_err(|error| wrong(error.to_string()))?;
    for service in SERVICES {
        make_folder(&site.paths().service(service))?;
        let what = format!("restoring the state of the {service}");
        let place = site.store_of(service).map_err(|error| Failure::new(Code::Invalid, &what, error))?;
        let copy = staging.join(format!("{service}.db"));
        kiln_store::copy_in(&copy, &place, by, jiff::Timestamp::now())
            .await
            .map_err(|error| Failure::new(Code::Refused, &what, error))?;
    }
    let contexts = site.paths().service(Service::Builder).join("contexts");
    make_folder(&contexts)?;
    let what = "unpacking the definitions";
    // What a name or a link says to be outside is left out by `unpack`.
    let mut packed = tar::Archive::new(BufReader::new(File::open(staging.join(CONTEXTS)).during(what)?));
    packed.set_preserve_permissions(true);
    packed.set_overwrite(false);
    packed.unpack(&contexts).during(what)?;
    images.take_over(&small(IMAGES)?).map_err(|error| Failure::failed("taking over the images", error))?;
    if manifest.own_broker {
        // What is in it `kiln up` makes anew; that it is there says whose the broker is.
        keys::write(&broker::config_file(&site), "")?;
    }
    // Tokens that were revoked after the backup are good again.
    let deed = Deed {
        action: "restore",
        subject: "keys".to_owned(),
        before: Value::Null,
        after: json!({ "backup_of": manifest.time }),
    };
    Ledger::open(&site)?.record(&deed)?;
    std::fs::remove_dir_all(&staging).during("removing what was staged")?;
    let handle = File::open(home).during("opening the site's folder")?;
    rustix::fs::syncfs(&handle).map_err(|error| Failure::failed("writing the site to disk", error))?;
    // Last: a folder with a site.toml is a whole one.
    keys::write(&home.join("site.toml"), &text)?;
    Ok(Restored { site, time: manifest.time, blobs })
}

fn make_folder(path: &Path) -> Outcome {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .during(format_args!("making {}", path.display()))
}

fn damaged(why: String) -> Failure {
    Failure::new(Code::Refused, "the backup can't be used", why)
        .reason("bad_backup")
        .todo("take another copy of the file, or an older backup")
}

struct Taken {
    manifest: Manifest,
    small: BTreeMap<String, Vec<u8>>,
    blobs: usize,
}

/// Reads the archive to its end, with every digest compared before anything is used.
fn take(archive: &Path, staging: &Path, images: &ImageStore) -> Outcome<Taken> {
    let file = File::open(archive).during(format_args!("opening {}", archive.display()))?;
    let mut archive = tar::Archive::new(BufReader::new(file));
    let mut entries = archive.entries().map_err(|error| unreadable(&error))?;
    let mut next = || -> Outcome<Option<(String, tar::Entry<'_, BufReader<File>>)>> {
        let Some(entry) = entries.next() else { return Ok(None) };
        let entry = entry.map_err(|error| unreadable(&error))?;
        let name = entry.path().map_err(|error| unreadable(&error))?.to_string_lossy().into_owned();
        Ok(Some((name, entry)))
    };
    let Some((name, entry)) = next()? else { return Err(damaged("it is empty".to_owned())) };
    let manifest = read_manifest(&name, entry)?;
    let mut small = BTreeMap::new();
    let mut blobs = 0;
    for part in &manifest.parts {
        let Some((name, entry)) = next()? else {
            return Err(damaged(format!("it is cut off before {}", part.name)));
        };
        if name != part.name {
            return Err(damaged(format!("it has {name} where {} should be", part.name)));
        }
        if part.name.starts_with("blobs/") {
            if part.name != blob_name(&part.digest) {
                return Err(damaged(format!("{} is named after another digest", part.name)));
            }
            let mut content = entry.take(part.size);
            images
                .put_blob(&mut content, Some(&part.digest))
                .map_err(|error| damaged(format!("{}: {error}", part.name)))?;
            blobs += 1;
        } else if let Some(path) = staged(&part.name, staging) {
            let what = format!("writing {}", path.display());
            let mut to = Hashing::new(File::create_new(&path).during(&what)?);
            std::io::copy(&mut entry.take(part.size), &mut to).map_err(|error| unreadable(&error))?;
            to.flush().during(&what)?;
            compare(part, to.done())?;
        } else {
            small.insert(part.name.clone(), read_small(part, entry)?);
        }
    }
    match next()? {
        None => Ok(Taken { manifest, small, blobs }),
        Some((name, _)) => Err(damaged(format!("it has {name}, which nothing speaks of"))),
    }
}

fn unreadable(error: &std::io::Error) -> Failure {
    damaged(format!("it can't be read to its end, it is cut off or no backup: {error}"))
}

/// Where a large part goes until it is used. No part of an archive's name becomes a path.
fn staged(name: &str, staging: &Path) -> Option<PathBuf> {
    if name == CONTEXTS {
        return Some(staging.join(CONTEXTS));
    }
    let service = SERVICES.into_iter().find(|service| name == store_name(*service))?;
    Some(staging.join(format!("{service}.db")))
}

fn read_manifest(name: &str, entry: impl Read) -> Outcome<Manifest> {
    if !name.starts_with("kiln-backup-") {
        return Err(damaged("it was not made by `kiln backup`".to_owned()));
    }
    let mut content = Vec::new();
    entry.take(MANIFEST_LIMIT).read_to_end(&mut content).map_err(|error| unreadable(&error))?;
    if manifest_name(&content) != name {
        return Err(damaged("its list of parts is damaged".to_owned()));
    }
    // The number first: another format may have other fields.
    let wrong = |error: serde_json::Error| damaged(format!("its list of parts can't be read: {error}"));
    let fields: serde_json::Value = serde_json::from_slice(&content).map_err(wrong)?;
    match fields.get("format").and_then(serde_json::Value::as_u64) {
        Some(found) if found == u64::from(FORMAT) => {}
        found => {
            let by = fields.get("kiln").and_then(|it| it.as_str()).unwrap_or("unknown");
            return Err(match found {
                Some(1) => damaged(format!(
                    "its format is 1, written by Kiln {by}: nothing in it shows whether somebody changed it since"
                ))
                .todo("restore it with the Kiln that wrote it, and back that site up with this one"),
                found => damaged(format!(
                    "its format is {}, written by Kiln {by}, and this one knows {FORMAT}: use the Kiln that wrote \
                     it, or a newer one",
                    found.unwrap_or_default()
                )),
            });
        }
    }
    serde_json::from_value(fields).map_err(wrong)
}

fn read_small(part: &Part, entry: impl Read) -> Outcome<Vec<u8>> {
    if ![SITE, KEYS, IMAGES].contains(&part.name.as_str()) || part.size > SMALL_LIMIT {
        return Err(damaged(format!("{} is no part of a backup", part.name)));
    }
    let mut content = Vec::new();
    entry.take(part.size).read_to_end(&mut content).map_err(|error| unreadable(&error))?;
    compare(part, (content.len() as u64, Digest::of(&content)))?;
    Ok(content)
}

fn compare(part: &Part, found: (u64, Digest)) -> Outcome {
    if found == (part.size, part.digest) {
        return Ok(());
    }
    let (size, digest) = found;
    let why = if size < part.size {
        format!("{} is cut off after {size} of {} bytes", part.name, part.size)
    } else {
        format!("{} is damaged: its digest is {digest}, not {}", part.name, part.digest)
    };
    Err(damaged(why))
}

fn unpack_keys(tar: &[u8], keys: &Path) -> Outcome {
    let what = "unpacking the keys";
    for entry in tar::Archive::new(tar).entries().during(what)? {
        let mut entry = entry.during(what)?;
        let path = entry.path().during(what)?.into_owned();
        let is_plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !is_plain || !entry.header().entry_type().is_file() {
            return Err(damaged(format!("{} is no key", path.display())));
        }
        let path = keys.join(path);
        make_folder(path.parent().unwrap_or(keys))?;
        keys::write(&path, &kiln_secret::read_bytes_from(&mut entry).during(what)?)?;
    }
    Ok(())
}
