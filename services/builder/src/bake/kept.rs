//! What is made once and used by later bakes, for as long as any does.

use std::fs::{self, Metadata};
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};

use super::error::BakeError;
use crate::collect::{Collected, How};

/// Says that a file or folder was used now.
pub(crate) fn touch(path: &Path) -> Result<(), BakeError> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    utimensat(CWD, path, &times, AtFlags::empty()).map_err(|errno| BakeError::io("touch", path)(errno.into()))
}

/// How long ago it was used. What was used at a time to come was used just now.
pub(crate) fn unused_for(found: &Metadata) -> Duration {
    found.modified().ok().and_then(|time| time.elapsed().ok()).unwrap_or_default()
}

/// Removes what in `all` was not used for so long, and what was left there unfinished.
pub(crate) fn forget(
    what: &'static str,
    all: &Path,
    unused: Duration,
    how: How,
) -> Result<Collected, BakeError> {
    let mut collected = Collected::new(what);
    let items = match fs::read_dir(all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(collected),
        other => other.map_err(BakeError::io("list", all))?,
    };
    for item in items.filter_map(Result::ok) {
        let Ok(found) = item.metadata() else { continue };
        if unused_for(&found) <= unused {
            continue;
        }
        let path = item.path();
        let bytes = if found.is_dir() { size_of(&path) } else { found.len() };
        if how == How::Remove {
            let removed = if found.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(BakeError::io("remove", &path))?;
        }
        collected.add(1, bytes);
    }
    Ok(collected)
}

/// What the files in a folder have, in bytes, as far as they can be looked at.
fn size_of(folder: &Path) -> u64 {
    let Ok(items) = fs::read_dir(folder) else { return 0 };
    let sizes = items.filter_map(Result::ok).map(|item| match item.metadata() {
        Ok(found) if found.is_dir() => size_of(&item.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    });
    sizes.sum()
}
