//! An archive's release file: which one it is, and of when.

use jiff::Timestamp;
use jiff::fmt::rfc2822;

use crate::digest::Digest;

/// A release file of an archive as it was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReleaseFile {
    pub digest: Digest,
    /// When the archive made it, as it says itself.
    pub date: Option<Timestamp>,
}

/// The fields come first; the checksums after them are long.
const FIELDS: usize = 16 * 1024;

impl ReleaseFile {
    pub fn of(content: &[u8]) -> Self {
        Self { digest: Digest::of(content), date: time(content, "Date:") }
    }
}

/// Until when a release file holds, where it says so.
pub fn valid_until(content: &[u8]) -> Option<Timestamp> {
    time(content, "Valid-Until:")
}

/// Whether it is of an archive for security updates. Debian labels its own `Debian-Security`; Ubuntu's and those of other
/// distributions are suites such as `noble-security`.
pub fn is_for_security(content: &[u8]) -> bool {
    let is_named_so = |name: &str| {
        let name = field(content, name).unwrap_or_default().to_ascii_lowercase();
        name == "security" || name.ends_with("-security")
    };
    ["Label:", "Suite:", "Codename:"].into_iter().any(is_named_so)
}

fn field(content: &[u8], name: &str) -> Option<String> {
    let fields = String::from_utf8_lossy(&content[..content.len().min(FIELDS)]);
    Some(fields.lines().find_map(|line| line.strip_prefix(name))?.trim().to_owned())
}

fn time(content: &[u8], name: &str) -> Option<Timestamp> {
    let text = field(content, name)?;
    // RFC 2822 knows `GMT` and `UT`, and archives write `UTC`.
    let text = text.strip_suffix("UTC").map_or_else(|| text.clone(), |rest| format!("{rest}+0000"));
    rfc2822::parse(&text).ok().map(|date| date.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_for_security_updates_says_so() {
        for (text, is) in [
            ("Origin: Debian\nLabel: Debian-Security\nSuite: oldstable-security\n", true),
            ("Label: Debian-Security\nSuite: oldoldstable\nCodename: buster/updates\n", true),
            ("Origin: Ubuntu\nLabel: Ubuntu\nSuite: noble-security\n", true),
            ("Origin: Debian\nLabel: Debian\nSuite: stable\n", false),
            ("Origin: Ubuntu\nLabel: Ubuntu\nSuite: noble-updates\n", false),
            ("Label: insecurity\n", false),
            ("", false),
        ] {
            assert_eq!(is_for_security(text.as_bytes()), is, "{text}");
        }
    }

    #[test]
    fn the_date_is_the_archives_own() {
        let wanted = "2026-06-10T10:00:01Z".parse::<Timestamp>().ok();
        for text in [
            "Origin: Debian\nDate: Wed, 10 Jun 2026 10:00:01 UTC\nSHA256:\n",
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: x\nDate: Wed, 10 Jun 2026 10:00:01 +0000\n",
            "Date: Wed, 10 Jun 2026 12:00:01 +0200\n",
        ] {
            assert_eq!(ReleaseFile::of(text.as_bytes()).date, wanted, "{text}");
            assert_eq!(valid_until(text.as_bytes()), None, "{text}");
            assert_eq!(valid_until(text.replace("Date:", "Valid-Until:").as_bytes()), wanted, "{text}");
        }
        for text in
            ["", "Date: yesterday\n", "Date:\n", "Date: Wed, 99 Jun 2026 10:00:01 UTC\n", "\0\u{fffd}\n"]
        {
            assert_eq!(ReleaseFile::of(text.as_bytes()).date, None, "{text}");
        }
    }
}
