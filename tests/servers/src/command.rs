//! Commands that must succeed, with their output in the error where they don't.

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
