//! A root file system that somebody else has packed as tar: taken, looked into, unpacked.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;

use kiln_image::tar::{Kind, Problem, Reader};
use kiln_image::{Limits, unpack_root};
use kiln_model::definition::ArchivePlace;
use kiln_model::digest::Digest;
use rustix::fs::{Mode, OFlags};
use tokio_util::sync::CancellationToken;

use super::LogSink;
use super::compression::Compression;
use super::context::{Contents, open_in};
use super::dpkg;
use super::error::BakeError;
use super::fetch::{Wanted, fetch};
use super::system::{OS_RELEASE, System};

/// Compressed or not.
const FILE_LIMIT: u64 = 16 << 30;
/// Of what is looked at without being unpacked.
const LOOKED_AT_LIMIT: u64 = 64 << 20;
const ENTRIES: u64 = 2_000_000;
const BLOCK: usize = 1 << 18;

/// The archive among the contents, with its size in bytes.
pub(crate) fn take(
    place: &ArchivePlace,
    context: &Path,
    contents: &Contents,
    log: &LogSink,
    cancel: &CancellationToken,
) -> Result<(Digest, u64), BakeError> {
    match place {
        ArchivePlace::File(path) => contents.put_file(&open_in(context, path)?, FILE_LIMIT, path),
        ArchivePlace::Url { url, sha256 } => {
            if let Ok(file) = contents.get(sha256) {
                return Ok((*sha256, length(&file)?));
            }
            let folder = contents.folder()?;
            let to = folder.path().join("archive");
            let wanted = [Wanted { url: url.clone(), to: to.clone(), sha256: *sha256 }];
            fetch(&wanted, log, cancel)?.map_err(|why| BakeError::Archive {
                archive: url.clone(),
                why,
                remedy: "see that this machine reaches it, and that `sha256` is that of the file it gives"
                    .to_owned(),
            })?;
            let file = File::open(&to).map_err(BakeError::io("open", &to))?;
            let (found, size) = contents.put_file(&file, FILE_LIMIT, url)?;
            if found == *sha256 {
                return Ok((found, size));
            }
            Err(BakeError::Archive {
                archive: url.clone(),
                why: format!("it gives {found}, wanted {sha256}"),
                remedy: "correct `sha256`, if it is what you want".to_owned(),
            })
        }
    }
}

/// What apt has to know of it to add packages.
pub(crate) fn look(file: File, digest: &Digest) -> Result<System, BakeError> {
    let mut reader = Reader::new(open(file, digest)?);
    let mut system = System::default();
    let refused = |problem: Problem| malformed(digest, &problem);
    while let Some(entry) = reader.next_entry().map_err(refused)? {
        let is_status = entry.path == dpkg::STATUS;
        let is_release = OS_RELEASE.contains(&entry.path.as_slice());
        if entry.kind == Kind::File && (is_status || is_release) {
            let mut content = Vec::new();
            let read = reader.by_ref().take(LOOKED_AT_LIMIT).read_to_end(&mut content);
            read.map_err(|error| refused(error.into()))?;
            if is_status {
                system.status = Some(content);
            } else {
                system.os_release = Some(content);
            }
        }
    }
    Ok(system)
}

/// Into an empty folder; gives the time of its youngest file, in seconds.
pub(crate) fn unpack(file: File, digest: &Digest, to: &Path, bytes: u64) -> Result<i64, BakeError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(to, flags, Mode::empty());
    let root = root.map_err(|errno| BakeError::io("open", to)(errno.into()))?;
    let limits = Limits { entries: ENTRIES, bytes };
    unpack_root(open(file, digest)?, &root, limits).map_err(|problem| malformed(digest, &problem))
}

fn open(file: File, digest: &Digest) -> Result<BufReader<Box<dyn Read + Send>>, BakeError> {
    let failed = |error| malformed(digest, &Problem::Io(error));
    let mut raw = BufReader::with_capacity(BLOCK, file);
    let compression = Compression::of(raw.fill_buf().map_err(failed)?);
    Ok(BufReader::with_capacity(BLOCK, compression.open(raw).map_err(failed)?))
}

fn length(file: &File) -> Result<u64, BakeError> {
    file.metadata().map(|found| found.len()).map_err(BakeError::io("look at", "an archive"))
}

fn malformed(digest: &Digest, problem: &Problem) -> BakeError {
    BakeError::Definition {
        what: format!("archive {}", digest.short()),
        why: problem.to_string(),
        remedy: "pack the root file system as tar, plain or by gzip, xz or zstd, without what it can't hold"
            .to_owned(),
    }
}
