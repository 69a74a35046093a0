//! What an update fixes, out of the changelogs that packages bring.

use std::collections::BTreeSet;

/// Of one changelog.
const MOST: usize = 500;

/// The CVEs that the entries since a version name; none where that version has no entry, since then nobody knows which entries
/// are new.
///
/// Source: deb-changelog(5).
pub(crate) fn fixed(changelog: &str, since: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for line in changelog.lines() {
        if version(line) == Some(since) {
            return found;
        }
        if found.len() < MOST {
            found.extend(named(line));
        }
    }
    BTreeSet::new()
}

/// `nginx (1.22.1-9) bookworm; urgency=medium`
fn version(line: &str) -> Option<&str> {
    let (name, rest) = line.split_once(" (")?;
    let is_heading = !name.is_empty() && !name.contains(char::is_whitespace);
    rest.split_once(')').map(|(version, _)| version).filter(|_| is_heading)
}

fn named(line: &str) -> impl Iterator<Item = String> {
    line.split("CVE-").skip(1).filter_map(|rest| {
        let (year, rest) = rest.split_once('-')?;
        let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let is_year = year.len() == 4 && year.bytes().all(|b| b.is_ascii_digit());
        (is_year && (4..=12).contains(&number.len())).then(|| format!("CVE-{year}-{number}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGELOG: &str = "nginx (1.22.1-9+deb12u2) bookworm-security; urgency=high

  * Fix CVE-2024-7347 (buffer overread), CVE-2023-44487.
    Also CVE-20-1 and CVE-2024-12 are none.

 -- Somebody <a@b.test>  Mon, 01 Jan 2024 00:00:00 +0000

nginx (1.22.1-9+deb12u1) bookworm; urgency=medium

  * CVE-2022-41741

nginx (1.22.1-9) unstable; urgency=medium

  * CVE-2021-23017
";

    #[test]
    fn what_is_named_since_a_version_is_fixed() {
        let fixed = |since: &str| fixed(CHANGELOG, since).into_iter().collect::<Vec<_>>();
        assert_eq!(fixed("1.22.1-9+deb12u1"), ["CVE-2023-44487", "CVE-2024-7347"]);
        assert_eq!(fixed("1.22.1-9"), ["CVE-2022-41741", "CVE-2023-44487", "CVE-2024-7347"]);
        assert_eq!(fixed("1.22.1-9+deb12u2"), Vec::<String>::new());
        assert_eq!(fixed("1.18"), Vec::<String>::new(), "nobody knows which entries are new");
        assert_eq!(super::fixed("", "1"), BTreeSet::new());
    }
}
