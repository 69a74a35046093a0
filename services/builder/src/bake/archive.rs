//! A root file system that somebody else has packed as tar: taken, looked into, unpacked.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read};
use std::path::Path;

use kiln_formats::compression::Compression;
use kiln_image::tar::{Kind, Problem, Reader};
use kiln_image::{Limits, unpack_root};
use kiln_model::definition::ArchivePlace;
use kiln_model::digest::Digest;
use tokio_util::sync::CancellationToken;

use super::context::{Contents, open_in};
use super::dpkg;
use super::error::BakeError;
use super::fetch::{Transport, Wanted};
use super::system::{OS_RELEASE, OS_RELEASE_LIMIT, STATUS_LIMIT, System};
use super::tree::open_root;

/// Compressed or not.
const FILE_LIMIT: u64 = 16 << 30;
/// All of the tar.
const UNPACKED_LIMIT: u64 = 64 << 30;
const BLOCK: usize = 1 << 18;

/// The archive among the contents, with its size in bytes.
pub(crate) fn take(
    place: &ArchivePlace,
    context: &Path,
    contents: &Contents,
    transport: Transport<'_>,
) -> Result<(Digest, u64), BakeError> {
    match place {
        ArchivePlace::File(path) => contents.put_file(&open_in(context, path)?, FILE_LIMIT, path),
        ArchivePlace::Url { url, sha256 } => {
            if let Ok(file) = contents.get(sha256) {
                return Ok((*sha256, length(&file)?));
            }
            let folder = contents.folder()?;
            let to = folder.path().join("archive");
            let wanted =
                [Wanted { url: url.clone(), to: to.clone(), sha256: Some(*sha256), largest: FILE_LIMIT }];
            transport.fetch(&wanted, &[])?.map_err(|why| BakeError::Archive {
                archive: url.clone(),
                why,
                remedy: "see that this machine reaches it, and that `sha256` is that of the file it gives"
                    .to_owned(),
            })?;
            let file = File::open(&to).map_err(BakeError::io("open", &to))?;
            contents.put_file(&file, FILE_LIMIT, url)
        }
    }
}

/// What apt has to know of it to add packages.
pub(crate) fn look(file: File, digest: &Digest, cancel: &CancellationToken) -> Result<System, BakeError> {
    let mut reader = Reader::new(open(file, digest, cancel)?);
    let mut system = System::default();
    let mut release = [const { None }; OS_RELEASE.len()];
    let refused = |problem: Problem| malformed(digest, &problem);
    while let Some(entry) = reader.next_entry().map_err(refused)? {
        let (into, limit) = match OS_RELEASE.iter().position(|path| entry.path == *path) {
            Some(at) => (&mut release[at], OS_RELEASE_LIMIT),
            None if entry.path == dpkg::STATUS => (&mut system.status, STATUS_LIMIT),
            None => continue,
        };
        if entry.kind == Kind::File {
            if entry.size > limit {
                let why = format!("it has more than the {limit} bytes that are read of it");
                return Err(refused(Problem::refused(&entry.path, why)));
            }
            let mut content = Vec::new();
            reader.by_ref().read_to_end(&mut content).map_err(|error| refused(error.into()))?;
            *into = Some(content);
        }
    }
    system.os_release = release.into_iter().flatten().next();
    Ok(system)
}

/// Into an empty folder; gives the time of its youngest file, in seconds.
pub(crate) fn unpack(
    file: File,
    digest: &Digest,
    to: &Path,
    bytes: u64,
    cancel: &CancellationToken,
) -> Result<i64, BakeError> {
    let root = open_root(to).map_err(BakeError::io("open", to))?;
    let limits = Limits { bytes, ..Limits::default() };
    let tar = open(file, digest, cancel)?;
    unpack_root(tar, &root, limits).map_err(|problem| malformed(digest, &problem))
}

/// The tar, whatever it is compressed by.
pub(crate) fn open(
    file: File,
    digest: &Digest,
    cancel: &CancellationToken,
) -> Result<BufReader<Bounded>, BakeError> {
    let failed = |error| malformed(digest, &Problem::Io(error));
    let mut raw = BufReader::with_capacity(BLOCK, file);
    let compression = Compression::of(raw.fill_buf().map_err(failed)?);
    let inner = compression.open(raw).map_err(failed)?;
    Ok(BufReader::with_capacity(BLOCK, Bounded { inner, left: UNPACKED_LIMIT, cancel: cancel.clone() }))
}

/// A stream that ends with an error where it is longer than it may be, or where nobody waits for it any more.
pub(crate) struct Bounded {
    inner: Box<dyn Read + Send>,
    left: u64,
    cancel: CancellationToken,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other("the build was cancelled"));
        }
        let read = self.inner.read(buffer)?;
        self.left = (self.left.checked_sub(read as u64))
            .ok_or_else(|| io::Error::other(format!("it unpacks to more than {UNPACKED_LIMIT} bytes")))?;
        Ok(read)
    }
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
