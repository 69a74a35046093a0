//! Tar streams, read strictly and written in one canonical form.
//!
//! A reader of our own, since what is hostile has to be refused and not interpreted: two readers that disagree on one
//! archive are how something gets past a check.

mod reader;
mod writer;

use std::collections::BTreeMap;
use std::io;

pub use reader::Reader;
pub use writer::Writer;

const BLOCK: usize = 512;
/// Linux's PATH_MAX.
const PATH_LIMIT: usize = 4096;
const DEPTH_LIMIT: usize = 128;
const NAME_LIMIT: usize = 255;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    Directory,
    Symlink,
    Hardlink,
    Fifo,
    CharDevice,
    BlockDevice,
}

/// One member of an archive; a file's content follows it in the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Clean: relative, no `.` or `..`, no slash at the end; empty for the root itself.
    pub path: Vec<u8>,
    pub kind: Kind,
    pub size: u64,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    /// A symlink's target as it is, a hardlink's as a clean path.
    pub link: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("entry `{entry}`: {why}")]
    Refused { entry: String, why: String },
}

impl Problem {
    /// An entry that is not taken.
    pub fn refused(entry: &[u8], why: impl Into<String>) -> Self {
        let shown: String =
            String::from_utf8_lossy(entry).chars().take(120).flat_map(char::escape_default).collect();
        Self::Refused { entry: shown, why: why.into() }
    }
}

/// The path without `./`, doubled slashes and a slash at the end.
///
/// # Errors
/// It is absolute, goes up, holds a NUL, is too long or too deep.
pub fn clean_path(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    if path.first() == Some(&b'/') {
        return Err("its name is absolute");
    }
    if path.len() > PATH_LIMIT {
        return Err("its name is longer than 4096 bytes");
    }
    if path.contains(&0) {
        return Err("its name holds a NUL");
    }
    let mut clean = Vec::with_capacity(path.len());
    let mut depth = 0;
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => return Err("its name goes up by `..`"),
            _ if part.len() > NAME_LIMIT => return Err("a part of its name is longer than 255 bytes"),
            _ => {
                depth += 1;
                if depth > DEPTH_LIMIT {
                    return Err("it lies deeper than 128 folders");
                }
                if !clean.is_empty() {
                    clean.push(b'/');
                }
                clean.extend_from_slice(part);
            }
        }
    }
    Ok(clean)
}

/// Folder and name of a clean path.
pub fn split_path(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|b| *b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}
