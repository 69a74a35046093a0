//! One question to one instance, in the words of server-spec tools.

use std::net::IpAddr;

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
    Package(PackageCheck),
    User(UserCheck),
    Port(PortCheck),
    Process(ProcessCheck),
    Log(LogCheck),
}

impl Check {
    /// Whether an instance that is still coming up may answer otherwise a moment later. What an image holds stays as it is.
    pub fn comes_up(&self) -> bool {
        match self {
            Self::Http(_) | Self::Tcp(_) | Self::Command(_) | Self::Port(_) | Self::Process(_) => true,
            Self::Log(_) => !self.is_of_the_whole_log(),
            Self::File(_) | Self::Package(_) | Self::User(_) => false,
        }
    }

    /// Whether it is about something that must never have been logged: what was stays logged.
    pub fn is_of_the_whole_log(&self) -> bool {
        matches!(self, Self::Log(log) if log.absent)
    }
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

/// A Debian package, as dpkg in the instance has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PackageCheck {
    pub name: String,
    /// The version, or what it begins with up to the end of a number: `1.22` is not `1.220`.
    pub version: Option<String>,
    /// It must not be installed.
    pub absent: bool,
}

/// A user of the instance's own database.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct UserCheck {
    pub name: String,
    pub uid: Option<u32>,
    /// One that it belongs to, as its own or as one of its members.
    pub group: Option<String>,
    pub home: Option<String>,
    pub shell: Option<String>,
    /// There must be no such user.
    pub absent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port that something in the instance listens on, also where nothing outside reaches it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PortCheck {
    pub port: u16,
    pub protocol: Transport,
    /// The address that it must be bound to; without it any.
    pub address: Option<IpAddr>,
    /// Nothing must listen there.
    pub absent: bool,
}

/// Processes of the instance, by the name of their program.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessCheck {
    pub name: String,
    /// Who each of them must run as: a user's name or number.
    pub user: Option<String>,
    /// How many there must be; without it at least one.
    pub count: Option<u32>,
    /// There must be none.
    pub absent: bool,
}

/// What the instance wrote to its log.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LogCheck {
    /// A text within one line.
    pub contains: String,
    /// No line must contain it.
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
