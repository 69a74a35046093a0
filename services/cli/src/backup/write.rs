//! Writing a backup of a site that goes on meanwhile.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_model::event::Service;
use kiln_service::config::Site;
use zeroize::Zeroizing;

use super::{
    CONTEXTS, FORMAT, IMAGES, KEYS, Key, Manifest, Part, SERVICES, SITE, StorePart, blob_name, manifest_name,
    outside, store_name,
};
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::site::{broker, ledger, leftovers};

/// Of a tar.
const BLOCK: usize = 512;

/// What was written.
pub(crate) struct Written {
    pub(crate) bytes: u64,
    pub(crate) images: usize,
    /// Files that the settings name and that are not in it.
    pub(crate) left_out: Vec<PathBuf>,
}

/// Where a part's bytes are.
enum Source {
    File(PathBuf),
    Bytes(Vec<u8>),
    Blob(Digest),
}

/// Writes the archive whole or not at all, to a path that does not exist.
pub(crate) async fn write(site: &Site, key: &Key, to: &Path) -> Outcome<Written> {
    if to.exists() {
        return Err(Failure::new(Code::Refused, format!("writing {}", to.display()), "it is there already")
            .reason("exists")
            .todo("name another file"));
    }
    let folder = to.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let staging = tempfile::Builder::new().prefix(".kiln-backup-").tempdir_in(folder);
    let staging = staging.during(format_args!("making a folder in {}", folder.display()))?;
    let mut parts = vec![(SITE.to_owned(), Source::Bytes(read(&site.home.join("site.toml"))?))];
    let mut stores = Vec::new();
    for service in SERVICES {
        let file = staging.path().join(format!("{service}.db"));
        stores.push(copy_store(site, service, &file).await?);
        parts.push((store_name(service), Source::File(file)));
    }
    // After the stores, so that each context that they name is there.
    let contexts = staging.path().join(CONTEXTS);
    pack(&site.paths().service(Service::Builder).join("contexts"), &contexts)?;
    parts.push((CONTEXTS.to_owned(), Source::File(contexts)));

    let images = needed(site, &staging.path().join("builder.db")).await?;
    let store = ImageStore::open(&site.paths().images())
        .map_err(|error| Failure::failed("opening the image store", error))?;
    let failed = |error: kiln_image::Error| Failure::failed("reading an image", error);
    let mut blobs = BTreeSet::new();
    for image in &images {
        blobs.extend(store.blobs_of(image).map_err(failed)?);
    }
    parts.push((IMAGES.to_owned(), Source::Bytes(store.index_of(&images).map_err(failed)?)));
    parts.extend(blobs.into_iter().map(|blob| (blob_name(&blob), Source::Blob(blob))));

    let listed = parts.iter().map(|(name, source)| described(name, source, &store));
    let mut manifest = Manifest {
        format: FORMAT,
        kiln: env!("CARGO_PKG_VERSION").to_owned(),
        site: site.name.to_string(),
        id: site.id.to_string(),
        time: jiff::Timestamp::now(),
        own_broker: broker::config_file(site).exists(),
        stores,
        parts: listed.collect::<Outcome<_>>()?,
    };
    // A token is not without the record of who made it.
    let lock = ledger::lock(site)?;
    let files = outside::key_files(site)?;
    let secrets = secrets(site, &files)?;
    drop(lock);
    // Last: they are sealed together with the list of all others.
    let sealed = Source::Bytes(key.seal(&manifest.sealed_about()?, &secrets)?);
    manifest.parts.push(described(KEYS, &sealed, &store)?);
    parts.push((KEYS.to_owned(), sealed));
    let bytes = archive(&manifest, &parts, &store, &staging.path().join("archive"), to)?;
    Ok(Written { bytes, images: images.len(), left_out: outside::left_out(site, &files) })
}

async fn copy_store(site: &Site, service: Service, to: &Path) -> Outcome<StorePart> {
    let what = format!("copying the state of the {service}");
    let place = site.store_of(service).map_err(|error| Failure::new(Code::Invalid, &what, error))?;
    let copied = kiln_store::copy_out(&place, to).await.map_err(|error| Failure::failed(&what, error))?;
    Ok(StorePart { service, epoch: copied.epoch, sequence: copied.sequence, layout: copied.layout })
}

/// The builder says which images its copy needs: those in force and below them, and those that the deployer holds for
/// its fleets, rollouts and ways back.
async fn needed(site: &Site, copy: &Path) -> Outcome<Vec<Digest>> {
    let task = format!("--images-of={}", copy.display());
    let what = "asking which images are needed";
    let said = leftovers::asked("kiln-builder", site, &task, what).await?;
    said.lines().map(|line| line.parse().map_err(|error| Failure::failed(what, error))).collect()
}

fn read(path: &Path) -> Outcome<Vec<u8>> {
    std::fs::read(path).during(format_args!("reading {}", path.display()))
}

/// A folder as a tar, symbolic links as such.
fn pack(folder: &Path, to: &Path) -> Outcome {
    let what = format!("packing {}", folder.display());
    let mut tar = tar::Builder::new(BufWriter::new(File::create(to).during(&what)?));
    tar.follow_symlinks(false);
    if folder.exists() {
        for entry in std::fs::read_dir(folder).during(&what)? {
            let entry = entry.during(&what)?;
            // One that is being made is not named by anything yet.
            if !entry.file_name().to_string_lossy().starts_with('.') {
                tar.append_dir_all(entry.file_name(), entry.path()).during(&what)?;
            }
        }
    }
    tar.into_inner().and_then(|mut writer| writer.flush()).during(&what)
}

/// These files below `keys`, as a tar that never touches a disk.
fn secrets(site: &Site, paths: &[PathBuf]) -> Outcome<Zeroizing<Vec<u8>>> {
    let keys = site.paths().keys();
    let what = format!("reading {}", keys.display());
    let mut files = Vec::new();
    for path in paths {
        let name = path.strip_prefix(&keys).map_err(|error| Failure::failed(&what, error))?;
        files.push((name, kiln_secret::read_bytes(path).during(&what)?));
    }
    // Large enough never to be moved: what is left behind by that would not be wiped. Each file has a block before it and
    // one that it need not fill, and two end the whole.
    let room: usize = files.iter().map(|(_, content)| content.len() + 2 * BLOCK).sum();
    let mut packed = Zeroizing::new(Vec::with_capacity(room + 2 * BLOCK));
    for (name, content) in &files {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).during("packing the keys")?;
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_entry_type(tar::EntryType::Regular);
        header.set_cksum();
        // By hand: `tar::Builder` copies by way of a buffer that nobody wipes.
        packed.extend_from_slice(header.as_bytes());
        packed.extend_from_slice(content);
        let whole = packed.len().next_multiple_of(BLOCK);
        packed.resize(whole, 0);
    }
    let whole = packed.len() + 2 * BLOCK;
    packed.resize(whole, 0);
    Ok(packed)
}

fn described(name: &str, source: &Source, images: &ImageStore) -> Outcome<Part> {
    let (size, digest) = match source {
        Source::Bytes(bytes) => (bytes.len() as u64, Digest::of(bytes)),
        Source::File(path) => {
            let what = format!("reading {}", path.display());
            let mut hasher = Hashing::new(std::io::sink());
            std::io::copy(&mut File::open(path).during(&what)?, &mut hasher).during(&what)?;
            hasher.done()
        }
        Source::Blob(digest) => (open(images, digest)?.1, *digest),
    };
    Ok(Part { name: name.to_owned(), size, digest })
}

fn open(images: &ImageStore, digest: &Digest) -> Outcome<(File, u64)> {
    images.open_blob(digest).map_err(|error| Failure::failed("reading an image", error))
}

fn archive(
    manifest: &Manifest,
    parts: &[(String, Source)],
    images: &ImageStore,
    aside: &Path,
    to: &Path,
) -> Outcome<u64> {
    let what = format!("writing {}", to.display());
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.create_new(true).write(true).open(aside).during(&what)?;
    let mut tar = tar::Builder::new(BufWriter::new(file));
    let head = serde_json::to_vec_pretty(manifest).map_err(|error| Failure::failed(&what, error))?;
    append(&mut tar, &manifest_name(&head), head.len() as u64, head.as_slice()).during(&what)?;
    for ((name, source), part) in parts.iter().zip(&manifest.parts) {
        match source {
            Source::Bytes(bytes) => append(&mut tar, name, part.size, bytes.as_slice()).during(&what)?,
            Source::File(path) => {
                append(&mut tar, name, part.size, File::open(path).during(&what)?).during(&what)?;
            }
            Source::Blob(digest) => {
                // A damaged blob must not be found at the restore.
                let mut hashing = Hashing::new(std::io::sink());
                let tee = Tee { from: open(images, digest)?.0, to: &mut hashing };
                append(&mut tar, name, part.size, tee).during(&what)?;
                if hashing.done().1 != *digest {
                    return Err(Failure::failed(&what, format!("the blob {digest} is damaged on disk")));
                }
            }
        }
    }
    let writer = tar.into_inner().during(&what)?;
    let file = writer.into_inner().map_err(|error| Failure::failed(&what, error.error()))?;
    file.sync_all().during(&what)?;
    std::fs::rename(aside, to).during(&what)?;
    Ok(file.metadata().during(&what)?.len())
}

fn append(
    tar: &mut tar::Builder<impl Write>,
    name: &str,
    size: u64,
    content: impl Read,
) -> std::io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o600);
    header.set_entry_type(tar::EntryType::Regular);
    // What grew or shrank since it was looked at is another content than the manifest says.
    tar.append_data(&mut header, name, content.take(size))
}

/// Counts and hashes what goes through it.
pub(super) struct Hashing<W> {
    to: W,
    hasher: sha2::Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    pub(super) fn new(to: W) -> Self {
        Self { to, hasher: sha2::Digest::new(), size: 0 }
    }

    pub(super) fn done(self) -> (u64, Digest) {
        (self.size, Digest::from_bytes(sha2::Digest::finalize(self.hasher).into()))
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.to.write(bytes)?;
        sha2::Digest::update(&mut self.hasher, &bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

struct Tee<'a, W> {
    from: File,
    to: &'a mut W,
}

impl<W: Write> Read for Tee<'_, W> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.to.write_all(&buffer[..read])?;
        Ok(read)
    }
}
