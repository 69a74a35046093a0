//! One question to one instance, in the words of server-spec tools.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::time::Millis;

#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Check {
    Http(HttpCheck),
    Tcp(TcpCheck),
    Command(CommandCheck),
    File(FileCheck),
}

/// A GET whose answer is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HttpCheck {
    pub port: u16,
    pub path: String,
    /// The status that is wanted; without it any from 200 to 399.
    pub status: Option<u16>,
    /// A text that the body contains.
    pub body: Option<String>,
}

/// A connection that is accepted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TcpCheck {
    pub port: u16,
}

/// A command given to `/bin/sh -c` inside the instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CommandCheck {
    pub run: String,
    pub status: i32,
    /// A text that standard output contains.
    pub stdout: Option<String>,
}

/// A file of the instance's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileCheck {
    pub path: String,
    /// Octal, as in `"0644"`.
    pub mode: Option<String>,
    /// A user's name or number.
    pub owner: Option<String>,
    pub contains: Option<String>,
    /// The path must not exist.
    pub absent: bool,
}

/// What one check saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckResult {
    pub passed: bool,
    /// For people: `status 502, wanted 200`.
    pub detail: String,
    pub took: Millis,
    pub time: Timestamp,
}
