//! One check of one instance: asked by the monitor, by the node on its way back, and by the tests of an image.
//!
//! What answers is not ours. An answer is bounded in time, head and body, and whatever it is, a result comes back.

mod evaluate;
mod http;
mod system;
mod tcp;

use std::borrow::Cow;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_model::check::{Check, CheckResult};
use kiln_model::time::Millis;

pub use evaluate::{CommandSeen, FileSeen, MAX_CONTENT, PresentFile, command, file};
pub use system::{LogSearch, ProcessSeen, UsersSeen, package, port, process, user};

/// What a check found, before it has a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub passed: bool,
    /// For people: `status 502, wanted 200`.
    pub detail: String,
}

impl Verdict {
    pub fn passed(detail: impl Into<String>) -> Self {
        Self { passed: true, detail: detail.into() }
    }

    pub fn failed(detail: impl Into<String>) -> Self {
        Self { passed: false, detail: detail.into() }
    }

    /// The result of a check that began at `started` and ended just now.
    pub fn since(self, started: Instant) -> CheckResult {
        CheckResult {
            passed: self.passed,
            detail: self.detail,
            took: Millis::from(started.elapsed()),
            time: Timestamp::now(),
        }
    }
}

/// Asks the instance at `address` once, and has an answer within `timeout`, whatever answers there.
///
/// All but `http` and `tcp` need what is inside an instance: the node runs them, and gives what it saw to [`command`],
/// [`file`] and the others. Asked here, they fail and say so.
pub async fn probe(address: IpAddr, check: &Check, timeout: Duration) -> CheckResult {
    let started = Instant::now();
    let verdict = match check {
        Check::Http(check) => http::get(address, check, timeout).await,
        Check::Tcp(check) => tcp::connect(address, check.port, timeout).await,
        Check::Command(_)
        | Check::File(_)
        | Check::Package(_)
        | Check::User(_)
        | Check::Port(_)
        | Check::Process(_)
        | Check::Log(_) => Verdict::failed("such a check is run by the node, not over the network"),
    };
    verdict.since(started)
}

/// A text of a definition or an answer as it stands in a detail: one line of at most 80 characters.
fn clip(text: &str) -> Cow<'_, str> {
    const MOST: usize = 80;
    let plain = |c: char| !c.is_control();
    if text.chars().all(plain) && text.chars().nth(MOST).is_none() {
        return Cow::Borrowed(text);
    }
    let mut clipped: String = text.chars().take(MOST).map(|c| if plain(c) { c } else { ' ' }).collect();
    if text.chars().nth(MOST).is_some() {
        clipped.push('…');
    }
    Cow::Owned(clipped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_one_short_line() {
        assert_eq!(clip("Hello"), "Hello");
        assert_eq!(clip("a\nb\u{1b}[31m"), "a b [31m");
        assert_eq!(clip(&"ä".repeat(81)).chars().count(), 81);
    }
}
