use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kiln_model::digest::Digest;
use sha2::{Digest as _, Sha256};
use tempfile::NamedTempFile;

use crate::error::Error;

/// An OCI image layout in a folder, and the layers' trees.
///
/// ```text
/// oci-layout  index.json  blobs/sha256/<hex>  layers/<hex>/  tmp/  locks/
/// ```
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

impl ImageStore {
    /// Opens the store, and makes what is not there yet.
    ///
    /// # Errors
    /// The folder can't be made or written.
    pub fn open(root: &Path) -> Result<Self, Error> {
        for folder in ["blobs/sha256", "layers", "tmp", "locks"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(Error::io("make folder", &path))?;
        }
        let marker = root.join("oci-layout");
        if !marker.exists() {
            replace(&root.join("tmp"), &marker, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok(Self { root: root.to_owned() })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub(crate) fn lock_path(&self, name: &str) -> PathBuf {
        self.root.join("locks").join(name)
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }

    pub fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    /// A blob that is written piece by piece; it gets its name, and is there for others, when it is finished.
    ///
    /// # Errors
    /// The folder can't be written.
    pub fn blob_writer(&self) -> Result<BlobWriter, Error> {
        let folder = self.temporary();
        let file = NamedTempFile::new_in(&folder).map_err(Error::io("make a file in", &folder))?;
        Ok(BlobWriter { store: self.clone(), file, hasher: Sha256::new(), hashing: Duration::ZERO, size: 0 })
    }

    /// Stores what `content` gives, and checks that it is what was `expected`.
    ///
    /// # Errors
    /// It can't be written, or its digest is not the expected one; nothing is stored then.
    pub fn put_blob(
        &self,
        content: &mut impl Read,
        expected: Option<&Digest>,
    ) -> Result<(Digest, u64), Error> {
        let mut writer = self.blob_writer()?;
        io::copy(content, &mut writer).map_err(Error::io("write a blob in", self.temporary()))?;
        match expected {
            None => writer.finish(),
            Some(wanted) => {
                let found = writer.digest();
                if found == *wanted {
                    writer.finish()
                } else {
                    Err(Error::Corrupt { wanted: *wanted, found })
                }
            }
        }
    }

    /// Takes over a blob of another folder, without copying where both are on one file system. `false` where it is not there.
    /// Its digest is checked first: a second name of what is damaged is damaged as well.
    ///
    /// # Errors
    /// It can't be written, or is something else.
    pub fn adopt_blob(&self, from: &Path, digest: &Digest) -> Result<bool, Error> {
        let path = self.blob_path(digest);
        match File::open(from) {
            Ok(file) => check(file, from, digest)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io("open", from)(error)),
        }
        match fs::hard_link(from, &path) {
            Ok(()) => Ok(true),
            Err(error) => match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(true),
                io::ErrorKind::NotFound => Ok(false),
                io::ErrorKind::CrossesDevices => {
                    let mut file = File::open(from).map_err(Error::io("open", from))?;
                    self.put_blob(&mut file, Some(digest)).map(|_| true)
                }
                _ => Err(Error::io("link", &path)(error)),
            },
        }
    }

    /// Gives a blob a second name outside of the store, on the same file system.
    ///
    /// # Errors
    /// It is not there, or the other place is on another file system.
    pub fn link_blob(&self, digest: &Digest, to: &Path) -> Result<(), Error> {
        match fs::hard_link(self.blob_path(digest), to) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(Error::io("link", to)(error)),
            _ => Ok(()),
        }
    }

    /// Opens a blob and gives its size. What is read still has to be checked against the digest.
    ///
    /// # Errors
    /// It is not there.
    pub fn open_blob(&self, digest: &Digest) -> Result<(File, u64), Error> {
        let path = self.blob_path(digest);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Error::NoBlob(*digest),
            _ => Error::io("open blob", &path)(error),
        })?;
        let metadata = file.metadata().map_err(Error::io("read", &path))?;
        if !metadata.is_file() {
            return Err(Error::malformed(format!("blob {digest}"), "it is not a regular file"));
        }
        Ok((file, metadata.len()))
    }

    /// Reads a small blob, whole and checked.
    pub(crate) fn small_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>, Error> {
        let (file, size) = self.open_blob(digest)?;
        if size > limit {
            return Err(Error::malformed(
                format!("blob {digest}"),
                format!("{size} bytes, where at most {limit} are taken"),
            ));
        }
        let mut content = Vec::new();
        file.take(limit).read_to_end(&mut content).map_err(Error::io("read", self.blob_path(digest)))?;
        let found = Digest::of(&content);
        if found != *digest {
            return Err(Error::Corrupt { wanted: *digest, found });
        }
        Ok(content)
    }

    /// Reads a blob from end to end and compares its digest.
    pub(crate) fn rehash(&self, digest: &Digest) -> Result<(), Error> {
        check(self.open_blob(digest)?.0, &self.blob_path(digest), digest)
    }
}

/// Reads a file from end to end and compares its digest.
fn check(mut file: File, path: &Path, wanted: &Digest) -> Result<(), Error> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if n == 0 {
            break;
        }
        hasher.update(&buffer[..n]);
    }
    let found = Digest::from_bytes(hasher.finalize().into());
    if found == *wanted { Ok(()) } else { Err(Error::Corrupt { wanted: *wanted, found }) }
}

/// A blob in the making. Dropped before it is finished, it leaves nothing.
#[derive(Debug)]
pub struct BlobWriter {
    store: ImageStore,
    file: NamedTempFile,
    hasher: Sha256,
    hashing: Duration,
    size: u64,
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        let began = Instant::now();
        self.hasher.update(&bytes[..n]);
        self.hashing += began.elapsed();
        self.size += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl BlobWriter {
    pub fn digest(&self) -> Digest {
        Digest::from_bytes(self.hasher.clone().finalize().into())
    }

    /// How long the digest of what was written so far took.
    pub(crate) fn hashing(&self) -> Duration {
        self.hashing
    }

    /// Names the blob by its digest; that it has this name is durable once the index names it. One that is there stays where it
    /// is whole; a damaged one is replaced, which is how an image that is baked again mends it.
    ///
    /// # Errors
    /// It can't be written.
    pub fn finish(self) -> Result<(Digest, u64), Error> {
        let digest = self.digest();
        let path = self.store.blob_path(&digest);
        let is_whole = |size| size == self.size && self.store.rehash(&digest).is_ok();
        if fs::metadata(&path).is_ok_and(|found| found.is_file() && is_whole(found.len())) {
            return Ok((digest, self.size));
        }
        self.file.as_file().sync_data().map_err(Error::io("sync", self.file.path()))?;
        fs::set_permissions(self.file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .map_err(Error::io("set the mode of", self.file.path()))?;
        self.file.persist(&path).map_err(|e| Error::io("name", &path)(e.error))?;
        Ok((digest, self.size))
    }
}

/// Writes a file so that it is either the old one or the new one, whatever happens.
pub(crate) fn replace(temporary: &Path, path: &Path, content: &[u8]) -> Result<(), Error> {
    let mut file = NamedTempFile::new_in(temporary).map_err(Error::io("make a file in", temporary))?;
    file.write_all(content).map_err(Error::io("write", path))?;
    file.as_file().sync_data().map_err(Error::io("sync", path))?;
    fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .map_err(Error::io("set the mode of", path))?;
    file.persist(path).map_err(|e| Error::io("name", path)(e.error))?;
    sync_folder(path.parent().unwrap_or(Path::new("/")))
}

pub(crate) fn sync_folder(folder: &Path) -> Result<(), Error> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(Error::io("sync", folder))
}

#[cfg(test)]
pub(crate) mod tests;
