//! Where a store is.

use std::path::PathBuf;

#[derive(Debug, Clone)]
pub enum Place {
    /// An SQLite file.
    File(PathBuf),
}
