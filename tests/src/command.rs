//! Kiln's own programs, and how others are run.

use std::path::{Path, PathBuf};

pub use kiln_test_servers::command::{both, run};

use crate::Result;

/// Where the built binaries of the workspace are: two folders above this test's own.
///
/// # Errors
/// Where the running executable can't be found, or the binary was not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(Path::parent).ok_or("the test binary lies in no target folder")?;
    // A binary of this package runs from the folder itself, a test from `deps` below it.
    for candidate in [folder.join(name), own.with_file_name(name)] {
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    Err(format!("{name} is not in {}: run `cargo build --release` first", folder.display()).into())
}
