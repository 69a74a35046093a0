//! The layers' trees: extracted once, used by many as read-only lowers.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use kiln_model::digest::Digest;
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use crate::error::Error;
use crate::extract::{Limits, extract};
use crate::lock::Lock;
use crate::store::ImageStore;
use crate::tar::Problem;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

impl ImageStore {
    /// The tree of a layer, extracted if it is not there yet; other processes that want it wait for the first one.
    ///
    /// Nothing is synced: a tree counts until the machine goes down. After a crash a half-written tree is thus never taken
    /// for a whole one; the layer's blob, which is synced, gives it anew.
    ///
    /// # Errors
    /// The layer is not in the store, or its tar is not one that can be extracted.
    pub fn layer_tree(&self, diff_id: &Digest) -> Result<PathBuf, Error> {
        self.layer_tree_within(diff_id, Limits::default())
    }

    /// The same within other limits.
    ///
    /// # Errors
    /// As for `layer_tree`.
    pub fn layer_tree_within(&self, diff_id: &Digest, limits: Limits) -> Result<PathBuf, Error> {
        let path = self.tree_path(diff_id);
        let marker = self.tree_marker(diff_id);
        let boot = boot_id()?;
        if is_whole(&marker, &boot) {
            return Ok(path);
        }
        let _lock = Lock::exclusive(&self.lock_path(&diff_id.hex()))?;
        if is_whole(&marker, &boot) {
            return Ok(path);
        }
        remove_tree(&path)?;
        let temporary = self.temporary().join(format!("layer-{}", diff_id.hex()));
        remove_tree(&temporary)?;
        fs::create_dir(&temporary).map_err(Error::io("make folder", &temporary))?;
        fs::set_permissions(&temporary, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(Error::io("set the mode of", &temporary))?;
        let done = self.extract_into(diff_id, &temporary, limits);
        if let Err(error) = done {
            // The reason for the failure counts more than what can't be cleaned away; the next try removes it.
            let _ = remove_tree(&temporary);
            return Err(error);
        }
        fs::rename(&temporary, &path).map_err(Error::io("name", &path))?;
        fs::write(&marker, &boot).map_err(Error::io("write", &marker))?;
        Ok(path)
    }

    fn extract_into(&self, diff_id: &Digest, folder: &Path, limits: Limits) -> Result<(), Error> {
        let (file, _) = self.open_blob(diff_id)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(folder, flags, Mode::empty())
            .map_err(|e| Error::io("open folder", folder)(e.into()))?;
        let mut hashing = Hashing { inner: file, hasher: Sha256::new() };
        extract(BufReader::with_capacity(1 << 18, &mut hashing), &root, limits).map_err(|problem| {
            match problem {
                Problem::Io(source) => Error::io("extract into", folder)(source),
                Problem::Refused { entry, why } => Error::Layer { layer: *diff_id, entry, why },
            }
        })?;
        // The reader goes to the very end, so everything has been hashed.
        let found = Digest::from_bytes(hashing.hasher.finalize().into());
        if found == *diff_id { Ok(()) } else { Err(Error::Corrupt { wanted: *diff_id, found }) }
    }

    fn tree_path(&self, diff_id: &Digest) -> PathBuf {
        self.root().join("layers").join(diff_id.hex())
    }

    fn tree_marker(&self, diff_id: &Digest) -> PathBuf {
        self.root().join("layers").join(format!("{}.boot", diff_id.hex()))
    }

    pub(crate) fn remove_layer_tree(&self, diff_id: &Digest) -> Result<(), Error> {
        let _lock = Lock::exclusive(&self.lock_path(&diff_id.hex()))?;
        let marker = self.tree_marker(diff_id);
        match fs::remove_file(&marker) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &marker)(error));
            }
            _ => {}
        }
        remove_tree(&self.tree_path(diff_id))
    }
}

fn boot_id() -> Result<String, Error> {
    fs::read_to_string(BOOT_ID).map(|id| id.trim().to_owned()).map_err(Error::io("read", BOOT_ID))
}

/// The marker is written after the tree is, and holds the boot that it was written in.
fn is_whole(marker: &Path, boot: &str) -> bool {
    fs::read_to_string(marker).is_ok_and(|id| id == boot)
}

fn remove_tree(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

struct Hashing {
    inner: File,
    hasher: Sha256,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        Ok(n)
    }
}
