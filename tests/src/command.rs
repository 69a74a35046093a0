//! Commands that must succeed, with their output in the error where they don't.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::Result;

/// Runs a command to its end.
///
/// # Errors
/// Where it can't be started, or its exit status is not 0; the error holds what it printed.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|error| format!("{command:?} can't be started: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    Err(format!("{command:?} ended with {}:\n{}", output.status, both(&output)).into())
}

/// What a command printed, for a message.
pub fn both(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

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
