//! The layers' trees: extracted once, used by many as read-only lowers.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use kiln_model::digest::Digest;
use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::error::Error;
use crate::extract::{Limits, extract};
use crate::lock::Lock;
use crate::pack::{Packed, Packer};
use crate::relay;
use crate::store::ImageStore;
use crate::tar::Problem;

/// Longer than anything takes to be written.
const UNFINISHED_KEPT: Duration = Duration::from_secs(24 * 3600);
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
        // Under a name of its own: the next try finds what a killed one left.
        let name = format!("layer-{}", diff_id.hex());
        remove_tree(&self.temporary().join(&name))?;
        let temporary = self.temporary_tree(&name, 0)?;
        let (file, _) = self.open_blob(diff_id)?;
        let mut hashing = Hashing { inner: file, hasher: Sha256::new() };
        extract_into(temporary.path(), BufReader::with_capacity(1 << 18, &mut hashing), limits)
            .map_err(|problem| layer_error(problem, diff_id, temporary.path()))?;
        // The reader goes to the very end, so everything has been hashed.
        let found = Digest::from_bytes(hashing.hasher.finalize().into());
        if found != *diff_id {
            return Err(Error::Corrupt { wanted: *diff_id, found });
        }
        self.name_tree(temporary, &path, &marker, &boot)?;
        Ok(path)
    }

    /// Packs a tree into a layer, and makes the layer's own tree from the same bytes meanwhile: making files takes as long
    /// as reading, hashing and writing them. Says how long hashing took.
    ///
    /// # Errors
    /// As for `Packer::pack` and `layer_tree`.
    pub fn put_layer(&self, packer: &Packer, tree: &Path) -> Result<(Packed, Duration), Error> {
        let temporary = self.temporary_tree("tree-", 8)?;
        let (sender, receiver) = relay::pair();
        let (packed, extracted) = thread::scope(|scope| {
            let extracting = scope.spawn(|| extract_into(temporary.path(), receiver, Limits::default()));
            (packer.pack_and_copy(self, tree, sender), extracting.join())
        });
        let (packed, hashing) = packed?;
        match extracted {
            Ok(extracted) => {
                extracted.map_err(|problem| layer_error(problem, &packed.diff_id, temporary.path()))?;
            }
            Err(panic) => std::panic::resume_unwind(panic),
        }
        let (path, marker, boot) =
            (self.tree_path(&packed.diff_id), self.tree_marker(&packed.diff_id), boot_id()?);
        let _lock = Lock::exclusive(&self.lock_path(&packed.diff_id.hex()))?;
        if !is_whole(&marker, &boot) {
            remove_tree(&path)?;
            self.name_tree(temporary, &path, &marker, &boot)?;
        }
        Ok((packed, hashing))
    }

    /// Removes blobs and trees in the making that nobody has touched for a day, as their process was killed, or only looks at
    /// them, and says how many and of how many bytes, without those of trees.
    ///
    /// # Errors
    /// Something can't be looked at or removed.
    pub fn forget_unfinished(&self, remove: bool) -> Result<(u64, u64), Error> {
        let folder = self.temporary();
        let (mut forgotten, mut bytes) = (0, 0);
        for found in fs::read_dir(&folder).map_err(Error::io("list", &folder))? {
            let path = found.map_err(Error::io("list", &folder))?.path();
            let found = match fs::symlink_metadata(&path) {
                Ok(found) => found,
                // Finished meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("look at", &path)(error)),
            };
            let age = found.modified().ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
            if age > UNFINISHED_KEPT {
                forgotten += 1;
                if found.is_file() {
                    bytes += found.len();
                }
                if !remove {
                    continue;
                }
                if found.is_dir() {
                    remove_tree(&path)?;
                } else if let Err(error) = fs::remove_file(&path)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    return Err(Error::io("remove", &path)(error));
                }
            }
        }
        Ok((forgotten, bytes))
    }

    /// Gone when dropped. A name without `random` bytes has to be free.
    fn temporary_tree(&self, name: &str, random: usize) -> Result<TempDir, Error> {
        let folder = tempfile::Builder::new()
            .prefix(name)
            .rand_bytes(random)
            .tempdir_in(self.temporary())
            .map_err(Error::io("make a folder in", self.temporary()))?;
        // Whatever the process's umask is.
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755))
            .map_err(Error::io("set the mode of", folder.path()))?;
        Ok(folder)
    }

    /// The tree's lock has to be held, and nothing may be at `path`.
    fn name_tree(&self, temporary: TempDir, path: &Path, marker: &Path, boot: &str) -> Result<(), Error> {
        fs::rename(temporary.path(), path).map_err(Error::io("name", path))?;
        // It is elsewhere now.
        let _ = temporary.keep();
        fs::write(marker, boot).map_err(Error::io("write", marker))
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

fn extract_into(folder: &Path, tar: impl Read, limits: Limits) -> Result<(), Problem> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(folder, flags, Mode::empty()).map_err(|e| Problem::Io(e.into()))?;
    extract(tar, &root, limits)
}

fn layer_error(problem: Problem, layer: &Digest, folder: &Path) -> Error {
    match problem {
        Problem::Io(source) => Error::io("extract into", folder)(source),
        Problem::Refused { entry, why } => Error::Layer { layer: *layer, entry, why },
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
