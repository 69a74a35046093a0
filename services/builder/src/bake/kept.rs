//! What is made once and used by later bakes, for as long as any does.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, utimensat};

use super::error::BakeError;

/// Says that a file or folder was used now.
pub(crate) fn touch(path: &Path) -> Result<(), BakeError> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    utimensat(CWD, path, &times, AtFlags::empty()).map_err(|errno| BakeError::io("touch", path)(errno.into()))
}

/// Removes what in `all` was not used for so long, and what was left there unfinished.
pub(crate) fn forget(all: &Path, unused_for: Duration) -> Result<(), BakeError> {
    let items = match fs::read_dir(all) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(BakeError::io("list", all))?,
    };
    for item in items.filter_map(Result::ok) {
        let used = item.metadata().and_then(|found| found.modified());
        // One of a time to come was used just now.
        let age = used.ok().and_then(|time| time.elapsed().ok()).unwrap_or_default();
        if age > unused_for {
            let path = item.path();
            let is_folder = item.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(BakeError::io("remove", &path))?;
        }
    }
    Ok(())
}
