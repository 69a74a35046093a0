//! Files that others see as a whole, or not at all.

use std::io::{self, Write as _};
use std::path::Path;

/// Writes a file, one part after the other, and names it when it is written. It is not synced: after the machine went down
/// it may be cut, and counts for what its readers make of that.
pub(crate) fn write(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new("/")))?;
    for part in parts {
        file.write_all(part)?;
    }
    file.persist(path)?;
    Ok(())
}
