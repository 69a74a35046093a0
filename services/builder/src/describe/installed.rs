//! dpkg's database, as what is installed.

use kiln_formats::deb822::{self, Paragraph};

/// A package that is installed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Installed {
    pub(crate) name: String,
    pub(crate) architecture: String,
    pub(crate) version: String,
    /// What it was built from.
    pub(crate) source: String,
    pub(crate) source_version: String,
}

/// Those whose files are there, configured or not, by name.
///
/// # Errors
/// It is not made of paragraphs, or a package has no name or version.
pub(crate) fn parse(status: &str) -> Result<Vec<Installed>, String> {
    let paragraphs = deb822::parse(status).map_err(|why| format!("dpkg's status: {why}"))?;
    let is_installed = |paragraph: &&Paragraph| {
        let state = paragraph.get("Status").and_then(|status| status.split_ascii_whitespace().nth(2));
        state.is_some_and(|state| !matches!(state, "not-installed" | "config-files"))
    };
    let mut all = paragraphs.iter().filter(is_installed).map(one).collect::<Result<Vec<_>, _>>()?;
    all.sort();
    Ok(all)
}

fn one(paragraph: &Paragraph) -> Result<Installed, String> {
    let name = paragraph.get("Package").ok_or("dpkg's status: a package without a name")?;
    // As dpkg takes them; names of files are made of it.
    let is_inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '.' | '-' | '_');
    if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(is_inner) {
        return Err(format!("dpkg's status: `{}` is no package's name", name.escape_debug()));
    }
    let version = paragraph.get("Version").ok_or_else(|| format!("dpkg's status: {name} has no version"))?;
    // `source`, or `source (version)` where that differs.
    let source = paragraph.get("Source").unwrap_or(name);
    let (source, source_version) = match source.split_once(" (") {
        Some((source, version)) => (source, version.trim_end_matches(')')),
        None => (source, version),
    };
    Ok(Installed {
        name: name.to_owned(),
        architecture: paragraph.get("Architecture").unwrap_or("all").to_owned(),
        version: version.to_owned(),
        source: source.trim().to_owned(),
        source_version: source_version.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_installed_is_found_with_its_source() {
        let status = "Package: zlib1g\nStatus: install ok installed\nArchitecture: amd64\nSource: zlib\nVersion: 1:1.2\n\n\
                      Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\n\
                      Package: libc-bin\nStatus: hold ok installed\nArchitecture: amd64\nSource: glibc (2.36-9)\nVersion: 2.36-9+b1\n\n\
                      Package: tzdata\nStatus: install ok triggers-pending\nVersion: 2024a\n\n\
                      Package: Old_Name\nStatus: purge ok not-installed\nVersion: 1\n";
        let found = parse(status).unwrap();
        let short: Vec<_> = found
            .iter()
            .map(|it| (it.name.as_str(), it.source.as_str(), it.source_version.as_str()))
            .collect();
        assert_eq!(
            short,
            [("libc-bin", "glibc", "2.36-9"), ("tzdata", "tzdata", "2024a"), ("zlib1g", "zlib", "1:1.2")]
        );
        assert_eq!(found[1].architecture, "all");
        assert_eq!(parse("").unwrap(), []);
    }

    #[test]
    fn what_is_no_database_is_refused() {
        let installed = "Status: install ok installed\n";
        for wrong in [
            "no field\n".to_owned(),
            format!("{installed}Version: 1\n"),
            format!("Package: a\n{installed}"),
            format!("Package: ../../etc\nVersion: 1\n{installed}"),
            format!("Package: .\nVersion: 1\n{installed}"),
        ] {
            assert!(parse(&wrong).unwrap_err().starts_with("dpkg's status: "), "{wrong}");
        }
    }
}
