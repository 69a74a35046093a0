//! Which archives packages come from: the definition's, the configuration's, or the host's own for the suite.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use kiln_formats::deb822;

use super::error::BakeError;
use super::{ConfiguredArchive, DebianRoot};

/// One line of what apt is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Archive {
    pub(crate) url: String,
    pub(crate) suite: String,
    pub(crate) components: Vec<String>,
    pub(crate) signed_by: Signer,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Signer {
    /// The keys that the host's apt trusts for every archive.
    HostKeys,
    File(PathBuf),
    /// A key block inside the host's own source file.
    Inline(String),
}

const HOST_SOURCES: &str = "/etc/apt/sources.list";
const HOST_SOURCES_PARTS: &str = "/etc/apt/sources.list.d";

/// The archives for a definition: its own, and those of the suite. Where one of its own is of the suite, that is all;
/// else the configuration's for the suite, else the host's.
pub(crate) fn archives(
    suite: &str,
    root: &DebianRoot,
    configured: &[ConfiguredArchive],
    keys: &Path,
) -> Result<Vec<Archive>, BakeError> {
    let mut all = root
        .archives
        .iter()
        .map(|archive| {
            let signer = signer(&archive.signed_by, &root.context, keys)?;
            checked(&archive.url, &archive.suite, &archive.components, signer)
        })
        .collect::<Result<Vec<_>, _>>()?;
    if !all.iter().any(|archive| belongs(&archive.suite, suite)) {
        all.extend(suite_archives(suite, configured, keys)?);
    }
    Ok(all)
}

/// Where the suite itself comes from, when the definition does not say.
fn suite_archives(
    suite: &str,
    configured: &[ConfiguredArchive],
    keys: &Path,
) -> Result<Vec<Archive>, BakeError> {
    let of_suite: Vec<_> = configured.iter().filter(|c| belongs(&c.archive.suite, suite)).collect();
    if !of_suite.is_empty() {
        return of_suite
            .into_iter()
            .map(|c| {
                let archive = &c.archive;
                checked(
                    &archive.url,
                    &archive.suite,
                    &archive.components,
                    signer(&archive.signed_by, &c.folder, keys)?,
                )
            })
            .collect();
    }
    let host: BTreeSet<Archive> =
        host_archives()?.into_iter().filter(|archive| belongs(&archive.suite, suite)).collect();
    if host.is_empty() {
        return Err(BakeError::Definition {
            what: format!("suite {suite}"),
            why: "neither the definition, nor the configuration, nor this machine's own apt sources have an archive for it"
                .to_owned(),
            remedy: "write `archives` below `from` in server.yaml, each with url, suite, components and signedBy"
                .to_owned(),
        });
    }
    host.into_iter().map(|a| checked(&a.url, &a.suite, &a.components, a.signed_by)).collect()
}

/// The suite itself, its updates and its security fixes.
fn belongs(suite: &str, wanted: &str) -> bool {
    match suite.strip_prefix(wanted) {
        Some(rest) => matches!(rest, "" | "-updates" | "-security" | "/updates"),
        None => false,
    }
}

fn signer(signed_by: &str, folder: &Path, keys: &Path) -> Result<Signer, BakeError> {
    if signed_by.is_empty() {
        return Ok(Signer::HostKeys);
    }
    Ok(Signer::File(super::context::key_ring(folder, signed_by, keys)?))
}

/// What goes into apt's file has to be one word each: a line end in a URL would be a source of its own.
fn checked(url: &str, suite: &str, components: &[String], signed_by: Signer) -> Result<Archive, BakeError> {
    let wrong = |why: &str| BakeError::Definition {
        what: format!("archive {}", url.escape_debug()),
        why: why.to_owned(),
        remedy: "write url, suite and components as they stand in an apt source, without spaces".to_owned(),
    };
    let word = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && b != b'#');
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    if !matches!(scheme, Some("http" | "https" | "file" | "copy")) && !url.starts_with("file:/") {
        return Err(wrong("only http, https and file are taken as its address"));
    }
    if !word(url) || !word(suite) || !components.iter().all(|component| word(component)) {
        return Err(wrong(
            "its address, suite or a component is empty, or holds a space, `#` or a control character",
        ));
    }
    if components.is_empty() != suite.ends_with('/') {
        return Err(wrong("a suite needs components, unless it is a path that ends with `/`"));
    }
    Ok(Archive { url: url.to_owned(), suite: suite.to_owned(), components: components.to_vec(), signed_by })
}

/// What apt reads, in its newer form.
pub(crate) fn render(archives: &[Archive]) -> String {
    let mut text = String::new();
    for archive in archives {
        // Writing into a String can't fail.
        let _ = writeln!(text, "Types: deb\nURIs: {}\nSuites: {}", archive.url, archive.suite);
        if !archive.components.is_empty() {
            let _ = writeln!(text, "Components: {}", archive.components.join(" "));
        }
        match &archive.signed_by {
            Signer::HostKeys => {}
            Signer::File(path) => {
                let _ = writeln!(text, "Signed-By: {}", path.display());
            }
            Signer::Inline(block) => {
                let _ = writeln!(text, "Signed-By:{block}");
            }
        }
        text.push('\n');
    }
    text
}

/// Those of this machine's own apt.
pub(crate) fn host_archives() -> Result<Vec<Archive>, BakeError> {
    let (list, parts) = (Path::new(HOST_SOURCES), Path::new(HOST_SOURCES_PARTS));
    let mut files = Vec::new();
    if list.is_file() {
        files.push(list.to_owned());
    }
    if let Ok(folder) = fs::read_dir(parts) {
        let mut names: Vec<PathBuf> = folder.filter_map(Result::ok).map(|item| item.path()).collect();
        names.sort();
        files.extend(names);
    }
    let mut found = Vec::new();
    for path in files {
        let parse = match path.extension().and_then(|e| e.to_str()) {
            Some("list") => one_line,
            Some("sources") => stanzas,
            _ => continue,
        };
        let text = fs::read_to_string(&path).map_err(BakeError::io("read", &path))?;
        // apt itself says what is wrong with a file of the host; a suite that is in another one can still be baked.
        match parse(&text) {
            Ok(archives) => found.extend(archives),
            Err(why) => tracing::warn!(path = %path.display(), why, "skipped a source of the host's apt"),
        }
    }
    Ok(found)
}

fn stanzas(text: &str) -> Result<Vec<Archive>, String> {
    let mut found = Vec::new();
    for stanza in deb822::parse(text)? {
        let words = |name: &str| -> Vec<String> {
            stanza.get(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        let disabled = stanza.get("Enabled").is_some_and(|v| matches!(v, "no" | "false" | "off" | "0"));
        if disabled || !words("Types").iter().any(|t| t == "deb") {
            continue;
        }
        let signed_by = match stanza.get("Signed-By").unwrap_or_default() {
            "" => Signer::HostKeys,
            path if path.trim().starts_with('/') && !path.trim().contains(char::is_whitespace) => {
                Signer::File(PathBuf::from(path.trim()))
            }
            block if block.contains("BEGIN PGP") => Signer::Inline(block.to_owned()),
            other => return Err(format!("Signed-By of an unknown kind: {other}")),
        };
        for url in words("URIs") {
            for suite in words("Suites") {
                found.push(Archive {
                    url: url.clone(),
                    suite,
                    components: words("Components"),
                    signed_by: signed_by.clone(),
                });
            }
        }
    }
    Ok(found)
}

/// `deb [option=value …] url suite component…`
fn one_line(text: &str) -> Result<Vec<Archive>, String> {
    let mut found = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb").filter(|rest| rest.starts_with([' ', '\t'])) else {
            continue;
        };
        let mut rest = rest.trim_start();
        let mut signed_by = Signer::HostKeys;
        if let Some(options) = rest.strip_prefix('[') {
            let (options, after) =
                options.split_once(']').ok_or_else(|| format!("line {}: `[` without `]`", at + 1))?;
            for option in options.split_whitespace() {
                if let Some(path) = option.strip_prefix("signed-by=") {
                    signed_by = Signer::File(PathBuf::from(path));
                }
            }
            rest = after;
        }
        let mut words = rest.split_whitespace().map(str::to_owned);
        let (Some(url), Some(suite)) = (words.next(), words.next()) else {
            return Err(format!("line {}: no address and suite", at + 1));
        };
        found.push(Archive { url, suite, components: words.collect(), signed_by });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_a_source_are_read_alike() {
        let newer = "Types: deb deb-src\n# comment\nURIs: http://a.test/debian\nSuites: x x-updates\nComponents: main contrib\nSigned-By: /k.gpg\n\nEnabled: no\nTypes: deb\nURIs: http://b.test\nSuites: x\nComponents: main\n";
        let older = "# comment\ndeb [arch=amd64 signed-by=/k.gpg] http://a.test/debian x main contrib # more\ndeb-src http://a.test x main\ndeb\t[signed-by=/k.gpg] http://a.test/debian x-updates main contrib\n";
        assert_eq!(stanzas(newer).unwrap(), one_line(older).unwrap());
        assert_eq!(stanzas(newer).unwrap().len(), 2);
    }

    #[test]
    fn a_key_block_stays_as_it_is() {
        let text = "Types: deb\nURIs: http://a.test\nSuites: x\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mQ\n";
        let archives = stanzas(text).unwrap();
        assert_eq!(stanzas(&render(&archives)).unwrap(), archives);
        assert!(matches!(archives[0].signed_by, Signer::Inline(_)));
    }

    #[test]
    fn only_the_suite_with_its_updates_and_fixes() {
        for good in ["bookworm", "bookworm-updates", "bookworm-security"] {
            assert!(belongs(good, "bookworm"), "{good}");
        }
        for bad in ["bookworm-backports", "bookworms", "trixie", "cloud-bookworm"] {
            assert!(!belongs(bad, "bookworm"), "{bad}");
        }
    }

    #[test]
    fn an_address_can_not_bring_a_line_of_its_own() {
        let main = ["main".to_owned()];
        assert!(checked("http://a.test/\nTrusted: yes", "x", &main, Signer::HostKeys).is_err());
        assert!(checked("http://a.test/", "x y", &main, Signer::HostKeys).is_err());
        assert!(checked("cdrom:[x]/", "x", &main, Signer::HostKeys).is_err());
        assert!(checked("http://a.test/", "x", &[], Signer::HostKeys).is_err());
        assert!(checked("http://a.test/", "./", &[], Signer::HostKeys).is_ok());
    }
}
