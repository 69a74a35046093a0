//! What `files` steps take out of a definition's folder. The folder came from a commit or an upload, so nothing in it is
//! opened but by a handle of the folder, and never outside.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use kiln_model::definition::{FileSpec, render};
use kiln_model::digest::Digest;
use kiln_model::lock::{LockedFile, LockedFileKind};
use kiln_model::name::ServerName;
use rustix::fs::{self as rfs, AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::error::BakeError;
use super::tree::names_in;
use super::{kept, whole};

const DEPTH_LIMIT: usize = 64;
const FILES_LIMIT: usize = 100_000;
const FILE_LIMIT: u64 = 1 << 30;
const TEMPLATE_LIMIT: u64 = 1 << 20;
const KEY_LIMIT: u64 = 4 << 20;

/// Contents of files steps, by digest, so that a lock can be baked without the folder it was made from.
#[derive(Debug, Clone)]
pub(crate) struct Contents {
    root: PathBuf,
}

/// Those of a builder.
pub(crate) fn all(home: &Path) -> PathBuf {
    home.join("files")
}

impl Contents {
    pub(crate) fn open(home: &Path) -> Result<Self, BakeError> {
        let root = all(home);
        fs::create_dir_all(&root).map_err(BakeError::io("make folder", &root))?;
        Ok(Self { root })
    }

    pub(crate) fn get(&self, digest: &Digest) -> Result<File, BakeError> {
        let path = self.root.join(digest.hex());
        let file = File::open(&path).map_err(BakeError::io("open", &path))?;
        kept::touch(&path)?;
        Ok(file)
    }

    /// Gives a content that is here a second name, on the same file system.
    pub(crate) fn link(&self, digest: &Digest, to: &Path) -> Result<(), BakeError> {
        fs::hard_link(self.root.join(digest.hex()), to).map_err(BakeError::io("link to", to))
    }

    /// For what is written here before it gets its name.
    pub(crate) fn folder(&self) -> Result<tempfile::TempDir, BakeError> {
        tempfile::tempdir_in(&self.root).map_err(BakeError::io("make a folder in", &self.root))
    }

    /// Keeps a file of any size, read twice where it is not here yet.
    pub(crate) fn put_file(&self, file: &File, limit: u64, shown: &str) -> Result<(Digest, u64), BakeError> {
        let failed = || BakeError::io("read", shown);
        let length = file.metadata().map_err(failed())?.len();
        if length > limit {
            return Err(wrong(shown, &format!("it is larger than {limit} bytes"), "make it smaller"));
        }
        let mut reader = HashingReader::new(file.take(limit));
        let size = io::copy(&mut reader, &mut io::sink()).map_err(failed())?;
        let digest = reader.digest();
        let path = self.root.join(digest.hex());
        if fs::metadata(&path).is_ok_and(|found| found.len() == size) {
            kept::touch(&path)?;
            return Ok((digest, size));
        }
        let mut copy =
            tempfile::NamedTempFile::new_in(&self.root).map_err(BakeError::io("make a file for", &path))?;
        let mut file = file;
        file.seek(SeekFrom::Start(0)).map_err(failed())?;
        let mut reader = HashingReader::new(file.take(limit));
        io::copy(&mut reader, copy.as_file_mut()).map_err(BakeError::io("write", &path))?;
        // It may have been changed in between.
        if reader.digest() != digest {
            return Err(wrong(shown, "it changes while it is read", "try again when it is whole"));
        }
        copy.as_file().sync_data().map_err(BakeError::io("write", &path))?;
        copy.persist(&path).map_err(|e| BakeError::io("name", &path)(e.error))?;
        Ok((digest, size))
    }

    pub(crate) fn put(&self, content: &[u8]) -> Result<Digest, BakeError> {
        let digest = Digest::of(content);
        let path = self.root.join(digest.hex());
        if path.is_file() {
            kept::touch(&path)?;
        } else {
            let mut file = tempfile::NamedTempFile::new_in(&self.root)
                .map_err(BakeError::io("make a file for", &path))?;
            file.write_all(content)
                .and_then(|()| file.as_file().sync_data())
                .map_err(BakeError::io("write", &path))?;
            file.persist(&path).map_err(|e| BakeError::io("name", &path)(e.error))?;
        }
        Ok(digest)
    }
}

/// Hashes what is read.
pub(crate) struct HashingReader<R> {
    inner: R,
    hasher: Sha256,
}

impl<R: Read> HashingReader<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256::new() }
    }

    pub(crate) fn digest(self) -> Digest {
        Digest::from_bytes(self.hasher.finalize().into())
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}

/// Reads the files of one step.
pub(crate) struct Context<'a> {
    folder: OwnedFd,
    shown: &'a Path,
    contents: &'a Contents,
    name: &'a ServerName,
    env: &'a BTreeMap<String, String>,
}

impl<'a> Context<'a> {
    pub(crate) fn open(
        folder: &'a Path,
        contents: &'a Contents,
        name: &'a ServerName,
        env: &'a BTreeMap<String, String>,
    ) -> Result<Self, BakeError> {
        Ok(Self { folder: open_folder(folder)?, shown: folder, contents, name, env })
    }

    /// In the order of the step, and of the names in each folder. What comes later with the same path wins.
    pub(crate) fn files(&self, specs: &[FileSpec]) -> Result<Vec<LockedFile>, BakeError> {
        let mut found = Vec::new();
        for spec in specs {
            let source = spec.src.trim_end_matches('/');
            let source = if source.is_empty() { "." } else { source };
            let fd = beneath(&self.folder, source.as_bytes(), OFlags::RDONLY | OFlags::NONBLOCK)
                .map_err(|errno| self.refused(&spec.src, errno))?;
            let mut dest = spec.dest.trim_end_matches('/').to_owned();
            let is_folder = kind(&fd) == Some(FileType::Directory);
            if spec.dest.ends_with('/') && !is_folder {
                let name = source.rsplit('/').next().unwrap_or(source);
                dest = format!("{dest}/{name}");
            }
            check_dest(&dest, &spec.src)?;
            if is_folder {
                self.folder(fd, source, &dest, spec, 0, &mut found)?;
            } else {
                self.file(fd, source, dest, spec, &mut found)?;
            }
        }
        Ok(found)
    }

    fn folder(
        &self,
        fd: OwnedFd,
        source: &str,
        dest: &str,
        spec: &FileSpec,
        depth: usize,
        found: &mut Vec<LockedFile>,
    ) -> Result<(), BakeError> {
        if depth > DEPTH_LIMIT {
            return Err(wrong(source, "it lies deeper than 64 folders", "move it up"));
        }
        if !dest.is_empty() {
            // Who may read a file may enter its folder.
            let mode = spec.mode.map_or(0o755, |mode| mode | (mode & 0o444) >> 2);
            self.push(found, dest, LockedFileKind::Directory, mode, spec)?;
        }
        let mut names = names_in(&fd).map_err(BakeError::io("read", self.shown.join(source)))?;
        names.sort();
        for name in names {
            let Ok(name) = String::from_utf8(name) else {
                return Err(wrong(source, "a name in it is not UTF-8", "rename it"));
            };
            if name == ".git" {
                continue;
            }
            let source = format!("{source}/{name}");
            let dest = format!("{dest}/{name}");
            check_dest(&dest, &source)?;
            let stat = rfs::statat(&fd, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|errno| self.refused(&source, errno))?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Symlink => {
                    let target = rfs::readlinkat(&fd, name.as_str(), Vec::new())
                        .map_err(|errno| self.refused(&source, errno))?;
                    let Ok(target) = target.into_string() else {
                        return Err(wrong(&source, "the link's target is not UTF-8", "make it anew"));
                    };
                    self.push(found, &dest, LockedFileKind::Symlink { target }, 0o777, spec)?;
                }
                FileType::Directory => {
                    let below = beneath(&fd, name.as_bytes(), OFlags::RDONLY | OFlags::NOFOLLOW)
                        .map_err(|errno| self.refused(&source, errno))?;
                    self.folder(below, &source, &dest, spec, depth + 1, found)?;
                }
                _ => {
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
                    let file =
                        beneath(&fd, name.as_bytes(), flags).map_err(|errno| self.refused(&source, errno))?;
                    self.file(file, &source, dest, spec, found)?;
                }
            }
        }
        Ok(())
    }

    fn file(
        &self,
        fd: OwnedFd,
        source: &str,
        dest: String,
        spec: &FileSpec,
        found: &mut Vec<LockedFile>,
    ) -> Result<(), BakeError> {
        if kind(&fd) != Some(FileType::RegularFile) {
            return Err(wrong(source, "it is not a file, a folder or a link", "leave it out"));
        }
        let executable = rfs::fstat(&fd).is_ok_and(|stat| stat.st_mode & 0o100 != 0);
        let limit = if spec.template { TEMPLATE_LIMIT } else { FILE_LIMIT };
        let mut content = read(fd, limit).map_err(|why| wrong(source, &why, "make it smaller"))?;
        if spec.template {
            let text = String::from_utf8(content)
                .map_err(|_| wrong(source, "a template has to be UTF-8", "say `template: false`"))?;
            content = render(&text, self.name, self.env)
                .map_err(|error| BakeError::Definition {
                    what: format!("template {source}:{}:{}", error.line, error.column),
                    why: error.reason,
                    remedy: "mend the template, or say `template: false`".to_owned(),
                })?
                .into_bytes();
        }
        let size = content.len() as u64;
        let digest = self.contents.put(&content)?;
        let mode = spec.mode.unwrap_or(if executable { 0o755 } else { 0o644 });
        self.push(found, &dest, LockedFileKind::Regular { digest, size }, mode, spec)
    }

    fn push(
        &self,
        found: &mut Vec<LockedFile>,
        dest: &str,
        kind: LockedFileKind,
        mode: u32,
        spec: &FileSpec,
    ) -> Result<(), BakeError> {
        if found.len() == FILES_LIMIT {
            return Err(wrong(&spec.src, "the step takes more than 100,000 files", "pack them as one"));
        }
        found.push(LockedFile { dest: dest.to_owned(), kind, mode, owner: spec.owner.clone() });
        Ok(())
    }

    fn refused(&self, source: &str, errno: Errno) -> BakeError {
        refused(source, errno)
    }
}

fn refused(source: &str, errno: Errno) -> BakeError {
    match errno {
        Errno::NOENT => wrong(source, "it is not in the definition's folder", "add it, or correct `src`"),
        Errno::XDEV | Errno::LOOP => {
            wrong(source, "it leads out of the definition's folder", "put the file itself into the folder")
        }
        errno => {
            wrong(source, &format!("it can't be read: {errno}"), "see that it is a plain file or folder")
        }
    }
}

fn wrong(source: &str, why: &str, remedy: &str) -> BakeError {
    BakeError::Definition {
        what: format!("file {}", source.escape_debug()),
        why: why.to_owned(),
        remedy: remedy.to_owned(),
    }
}

fn check_dest(dest: &str, source: &str) -> Result<(), BakeError> {
    let clean = dest.is_empty()
        || dest.strip_prefix('/').is_some_and(|rest| {
            kiln_image::tar::clean_path(rest.as_bytes()).is_ok_and(|clean| clean == rest.as_bytes())
        });
    if clean {
        return Ok(());
    }
    Err(wrong(
        source,
        &format!("its place in the image, {}, is not a plain absolute path", dest.escape_debug()),
        "write `dest` as an absolute path without `.` and `..`",
    ))
}

fn open_folder(folder: &Path) -> Result<OwnedFd, BakeError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rfs::open(folder, flags, Mode::empty()).map_err(|e| BakeError::io("open", folder)(e.into()))
}

fn beneath(folder: &OwnedFd, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    loop {
        match rfs::openat2(folder, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::BENEATH) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

fn kind(fd: &OwnedFd) -> Option<FileType> {
    rfs::fstat(fd).ok().map(|stat| FileType::from_raw_mode(stat.st_mode))
}

fn read(fd: OwnedFd, limit: u64) -> Result<Vec<u8>, String> {
    let mut content = Vec::new();
    File::from(fd).take(limit + 1).read_to_end(&mut content).map_err(|e| format!("it can't be read: {e}"))?;
    if content.len() as u64 > limit {
        return Err(format!("it is larger than {limit} bytes"));
    }
    Ok(content)
}

/// A file of a definition's folder.
pub(crate) fn open_in(folder: &Path, path: &str) -> Result<File, BakeError> {
    let fd = beneath(&open_folder(folder)?, path.as_bytes(), OFlags::RDONLY | OFlags::NONBLOCK)
        .map_err(|errno| refused(path, errno))?;
    if kind(&fd) != Some(FileType::RegularFile) {
        return Err(wrong(path, "it is not a file", "name the file itself"));
    }
    Ok(File::from(fd))
}

/// Copies a key ring out of a definition's folder, to a place that is the same for the same keys: what apt keeps for an
/// archive hangs on it.
pub(crate) fn key_ring(folder: &Path, path: &str, keys: &Path) -> Result<PathBuf, BakeError> {
    let content = read(open_in(folder, path)?.into(), KEY_LIMIT)
        .map_err(|why| wrong(path, &why, "name the file with the archive's public keys"))?;
    // apt goes by the ending.
    let extension = if content.starts_with(b"-----BEGIN PGP") { "asc" } else { "gpg" };
    fs::create_dir_all(keys).map_err(BakeError::io("make folder", keys))?;
    let kept = keys.join(format!("{}.{extension}", Digest::of(&content).hex()));
    if !kept.is_file() {
        whole::write(&kept, &[&content]).map_err(BakeError::io("write", &kept))?;
    }
    Ok(kept)
}
