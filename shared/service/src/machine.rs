//! What a service finds on its machine, as its program prints it for the `kiln` command: whether it can work there, and
//! what it has left there.

use std::fmt;

use kiln_model::event::Service;
use kiln_model::name::SiteId;
use serde::{Deserialize, Serialize};

/// One thing that was looked at before anything is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    pub name: String,
    pub ok: bool,
    /// What was seen.
    pub detail: String,
    /// What to do about it; empty where it is fine.
    pub fix: String,
}

impl Finding {
    pub fn good(name: &str, detail: impl Into<String>) -> Self {
        Self { name: name.to_owned(), ok: true, detail: detail.into(), fix: String::new() }
    }

    pub fn bad(name: &str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name: name.to_owned(), ok: false, detail: detail.into(), fix: fix.into() }
    }

    pub fn of(name: &str, ok: bool, detail: impl Into<String>, fix: &str) -> Self {
        if ok { Self::good(name, detail) } else { Self::bad(name, detail, fix) }
    }
}

/// Something of a site that is on the machine; printed one a line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Leftover {
    /// `process`, `mount`, `cgroup`, `netns`, ...
    pub kind: String,
    pub name: String,
}

impl Leftover {
    pub fn new(kind: &str, name: impl fmt::Display) -> Self {
        Self { kind: kind.to_owned(), name: name.to_string() }
    }

    /// With the name that the process gives itself, where it still runs.
    pub fn process(pid: impl fmt::Display) -> Self {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Self::new("process", format!("{pid} {}", name.trim()).trim_end())
    }

    /// A line that [`Display`](fmt::Display) made.
    pub fn parse(line: &str) -> Option<Self> {
        let (kind, name) = line.split_once(": ")?;
        Some(Self::new(kind, name))
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.name)
    }
}

/// A variable of a service's environment, by which programs that it started are known for its own when it was killed.
pub const STARTED_BY: &str = "KILN_STARTED_BY";

/// The value of [`STARTED_BY`].
pub fn started_by(service: Service, site: &SiteId) -> String {
    format!("{service}.{site}")
}

/// Whether a process has ended and waits for its parent to ask how, holding nothing but its number; also where there is
/// no such process.
pub fn is_over(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in front of the state may hold anything, also `)`.
    stat.rsplit(')')
        .next()
        .is_none_or(|rest| matches!(rest.trim_start().chars().next(), Some('Z' | 'X') | None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_back() {
        let left = Leftover::new("nft table", "ip kiln_0a1b2c3d: x");
        assert_eq!(Leftover::parse(&left.to_string()), Some(left));
        assert_eq!(Leftover::parse("nonsense"), None);
        let own = Leftover::process(std::process::id());
        assert!(own.name.starts_with(&format!("{} ", std::process::id())), "{own}");
    }
}
