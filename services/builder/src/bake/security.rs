//! Which packages an archive for security updates has.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};

use kiln_model::digest::Digest;
use kiln_model::release_file::is_for_security;

use super::apt::{PackageList, Solved};
use super::error::BakeError;

/// Marks those that are in a list of such an archive, byte for byte.
///
/// # Errors
/// A list can't be read.
pub(crate) fn mark<'a>(
    lists: &[PackageList],
    solved: impl Iterator<Item = &'a mut Solved>,
) -> Result<(), BakeError> {
    let mut known = HashSet::new();
    for list in lists {
        let release = fs::read(&list.release).map_err(BakeError::io("read", &list.release))?;
        if is_for_security(&release) {
            read(list, &mut known)?;
        }
    }
    for solved in solved {
        solved.security = known.contains(&solved.package.sha256);
    }
    Ok(())
}

fn read(list: &PackageList, known: &mut HashSet<Digest>) -> Result<(), BakeError> {
    let failed = || BakeError::io("read", &list.file);
    let file = File::open(&list.file).map_err(failed())?;
    for line in BufReader::with_capacity(1 << 16, file).split(b'\n') {
        let line = line.map_err(failed())?;
        let digest = line.strip_prefix(b"SHA256: ").and_then(|hex| std::str::from_utf8(hex).ok());
        known.extend(digest.and_then(|hex| format!("sha256:{}", hex.trim()).parse::<Digest>().ok()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kiln_model::lock::LockedPackage;

    use super::*;

    #[test]
    fn a_package_is_marked_where_a_list_for_security_has_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let list = |name: &str, label: &str, content: &str| {
            let path = |what: &str| folder.path().join(format!("{name}-{what}"));
            fs::write(path("Packages"), content).unwrap();
            fs::write(path("InRelease"), format!("Label: {label}\n")).unwrap();
            PackageList {
                repository: String::new(),
                base: String::new(),
                key: String::new(),
                file: path("Packages"),
                release_name: "InRelease",
                release: path("InRelease"),
            }
        };
        let solved = |name: &str| Solved {
            package: LockedPackage {
                name: name.to_owned(),
                version: "1".to_owned(),
                architecture: "all".to_owned(),
                sha256: Digest::of(name.as_bytes()),
                size: 1,
            },
            url: String::new(),
            security: false,
        };
        let stanza = |name: &str| format!("Package: x\nSHA256: {}\n\n", Digest::of(name.as_bytes()).hex());
        let lists = [
            list("own", "Debian", &format!("{}{}", stanza("a"), stanza("b"))),
            list("security", "Debian-Security", &format!("SHA256: ?\n\n{}", stanza("b"))),
        ];
        let mut both = [solved("a"), solved("b")];
        mark(&lists, both.iter_mut()).unwrap();
        assert_eq!(both.map(|solved| solved.security), [false, true]);
    }
}
