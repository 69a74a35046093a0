//! Licences out of a Debian `copyright` file, as SPDX names them where it does.
//!
//! Source: Debian's machine-readable copyright format 1.0. Files in another form are searched for the licences that
//! Debian ships once for all, in `/usr/share/common-licenses`.

use std::collections::BTreeSet;

use kiln_formats::deb822;

/// Of one package; more is of no use to anybody.
const MOST: usize = 64;
const LONGEST: usize = 200;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Licence {
    /// An identifier of SPDX's list.
    Spdx(&'static str),
    /// As the package calls it.
    Named(String),
}

/// Each licence that the file names, once.
pub(crate) fn parse(copyright: &str) -> Vec<Licence> {
    let fields = copyright.starts_with("Format:").then(|| deb822::parse(copyright).ok()).flatten();
    let names: BTreeSet<String> = match fields {
        Some(paragraphs) => {
            let licences = paragraphs.iter().filter_map(|paragraph| paragraph.get("License"));
            licences.flat_map(|text| synopsis(text.lines().next().unwrap_or_default())).collect()
        }
        None => common(copyright),
    };
    let known: BTreeSet<Licence> = names.into_iter().map(licence).collect();
    known.into_iter().take(MOST).collect()
}

/// `GPL-2+ or Artistic, and BSD-3-clause`: which ones, not how they go together.
fn synopsis(line: &str) -> Vec<String> {
    let words = line.split([',', ' ', '|']).filter(|word| !word.is_empty());
    let mut names: Vec<String> = Vec::new();
    let mut excepted = false;
    for word in words {
        match word.to_ascii_lowercase().as_str() {
            "or" | "and" | "and/or" => excepted = false,
            // `GPL-3+ with GCC exception`: the exception is no licence of its own.
            "with" => excepted = true,
            _ if excepted => {}
            _ => names.push(word.chars().take(LONGEST).collect()),
        }
    }
    names
}

fn common(text: &str) -> BTreeSet<String> {
    let of_name = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    let after = text.split("/usr/share/common-licenses/").skip(1);
    let names = after.filter_map(|rest| rest.split(|c| !of_name(c)).next());
    names.map(|name| name.trim_end_matches('.').to_owned()).filter(|name| !name.is_empty()).collect()
}

fn licence(name: String) -> Licence {
    spdx_name(&name).map_or(Licence::Named(name), Licence::Spdx)
}

/// Debian's short names are mostly those of SPDX of before it told `only` from `or later`.
fn spdx_name(name: &str) -> Option<&'static str> {
    let listed = |name: &str| {
        let mut all = spdx::identifiers::LICENSES.iter().map(|licence| licence.name);
        all.find(|known| known.eq_ignore_ascii_case(name))
    };
    let (stem, later) = name.strip_suffix('+').map_or((name, false), |stem| (stem, true));
    let (family, version) = stem.rsplit_once('-').unwrap_or((stem, ""));
    let whole = if version.len() == 1 { format!("{version}.0") } else { version.to_owned() };
    let end = if later { "or-later" } else { "only" };
    match family {
        "GPL" | "LGPL" | "AGPL" | "GFDL" => listed(&format!("{family}-{whole}-{end}")),
        "GFDL-NIV" => listed(&format!("GFDL-{whole}-no-invariants-{end}")),
        _ if later => None,
        "Expat" => listed("MIT"),
        _ => listed(name).or_else(|| listed(&format!("{family}-{whole}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(copyright: &str) -> Vec<String> {
        let told = |licence| match licence {
            Licence::Spdx(id) => format!("id {id}"),
            Licence::Named(name) => name,
        };
        parse(copyright).into_iter().map(told).collect()
    }

    #[test]
    fn fields_of_the_machine_readable_form_are_read() {
        let text = "Format: 1.0\n\nFiles: *\nCopyright: somebody\nLicense: GPL-2+ or Artistic, and BSD-3-clause\n\n\
                    Files: debian/*\nLicense: Expat\n Permission is hereby granted\n\nLicense: GPL-3+ with GCC exception\n";
        assert_eq!(
            told(text),
            ["id BSD-3-Clause", "id GPL-2.0-or-later", "id GPL-3.0-or-later", "id MIT", "Artistic"]
        );
    }

    #[test]
    fn prose_tells_by_the_licences_that_debian_ships() {
        let text = "This is free.\nSee /usr/share/common-licenses/GPL-2. And `/usr/share/common-licenses/LGPL-2.1'\n";
        assert_eq!(told(text), ["id GPL-2.0-only", "id LGPL-2.1-only"]);
        assert_eq!(told("nothing at all"), Vec::<String>::new());
        assert_eq!(told(""), Vec::<String>::new());
    }

    #[test]
    fn debian_names_become_those_of_spdx() {
        for (debian, id) in [
            ("GPL-1+", Some("GPL-1.0-or-later")),
            ("LGPL-2.1", Some("LGPL-2.1-only")),
            ("GFDL-NIV-1.3+", Some("GFDL-1.3-no-invariants-or-later")),
            ("Apache-2", Some("Apache-2.0")),
            ("Apache-2.0", Some("Apache-2.0")),
            ("zlib", Some("Zlib")),
            ("public-domain", None),
            ("BSD-like+", None),
            ("", None),
        ] {
            assert_eq!(spdx_name(debian), id, "{debian}");
        }
    }

    #[test]
    fn whatever_is_written_gives_so_many_names_of_so_many_letters() {
        let long = format!("Format: 1\n\nLicense: {}\n", "x".repeat(1 << 16));
        assert_eq!(told(&long), ["x".repeat(LONGEST)]);
        let many: String = (0..1000).map(|n| format!("License: n{n}\n\n")).collect();
        assert_eq!(told(&format!("Format: 1\n\n{many}")).len(), MOST);
    }
}
