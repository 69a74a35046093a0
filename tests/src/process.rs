//! Processes by their ids, which the kernel gives anew to others.

use std::fs::read_to_string;

/// When a process began, in ticks since the machine did: with its id that is no other process. None for one that is gone.
pub fn begun(process: u32) -> Option<String> {
    let stat = read_to_string(format!("/proc/{process}/stat")).ok()?;
    // After the name, which can hold anything, it is the twentieth field.
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(19).map(str::to_owned)
}

/// Whether a process is there.
pub fn alive(process: u32) -> bool {
    begun(process).is_some()
}
