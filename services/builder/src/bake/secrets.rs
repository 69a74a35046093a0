//! What a step is told and its image must not hold: files in memory while it runs, hidden in its log, and looked for in what it
//! leaves.

use std::borrow::Cow;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memchr::memmem::{self, Finder};
use rustix::fs::{self as rfs, AtFlags, FileType, Mode, OFlags};
use zeroize::Zeroizing;

use super::error::BakeError;
use super::tree::{SHIFT, names_in, open_root};
use super::{BakeConfig, LogSink};

/// Where a step sees them.
pub(crate) const INSIDE: &str = "/run/secrets";
/// What is shorter could not be told from other text.
const SHORTEST: usize = 8;
/// A line of a longer secret, such as a key in PEM, that is looked for by itself.
const SHORTEST_LINE: usize = 16;
const BLOCK: usize = 1 << 18;
const STARS: &str = "***";

struct Secret {
    name: String,
    value: Zeroizing<Vec<u8>>,
}

/// Those of one step.
#[derive(Default)]
pub(crate) struct Secrets(Arc<Vec<Secret>>);

/// Whether the site has all of them.
pub(crate) fn are_known(names: &[String], config: &BakeConfig) -> Result<(), BakeError> {
    names.iter().find(|name| !config.secrets.contains_key(*name)).map_or(Ok(()), |name| {
        Err(BakeError::Definition {
            what: format!("secret {name}"),
            why: "the site has none of that name".to_owned(),
            remedy: "put it into a file of mode 0600 in the site's folder, and name it under `[secrets]` in site.toml"
                .to_owned(),
        })
    })
}

impl Secrets {
    pub(crate) fn read(names: &[String], config: &BakeConfig) -> Result<Self, BakeError> {
        are_known(names, config)?;
        let secrets = names.iter().filter_map(|name| Some((name, config.secrets.get(name)?)));
        let read = secrets.map(|(name, path)| {
            let value = kiln_secret::read_bytes(path).map_err(BakeError::io("read", path))?;
            if value.trim_ascii().len() < SHORTEST {
                return Err(BakeError::Definition {
                    what: format!("secret {name}"),
                    why: format!(
                        "it has less than {SHORTEST} bytes, so that it can't be told from other text"
                    ),
                    remedy: "take a longer one".to_owned(),
                });
            }
            Ok(Secret { name: name.clone(), value })
        });
        Ok(Self(Arc::new(read.collect::<Result<_, BakeError>>()?)))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Writes them where the sandbox's root alone can read them.
    pub(crate) fn put(&self, folder: &Path) -> Result<(), BakeError> {
        for secret in self.0.iter() {
            let path = folder.join(&secret.name);
            fs::write(&path, &*secret.value)
                .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o400)))
                .and_then(|()| chown(&path, Some(SHIFT), Some(SHIFT)))
                .map_err(BakeError::io("write", &path))?;
        }
        Ok(())
    }

    /// What of a secret is told in one line, or would be looked for in a file.
    fn parts(secret: &Secret) -> impl Iterator<Item = &[u8]> {
        let lines = secret.value.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        let long = lines.filter(|line| line.len() >= SHORTEST_LINE);
        std::iter::once(secret.value.trim_ascii()).chain(long)
    }

    /// A line without them.
    pub(crate) fn hide<'a>(&self, line: &'a str) -> Cow<'a, str> {
        let mut hidden = Cow::Borrowed(line);
        for part in self.0.iter().flat_map(Self::parts).filter_map(|part| std::str::from_utf8(part).ok()) {
            if memmem::find(hidden.as_bytes(), part.as_bytes()).is_some() {
                hidden = Cow::Owned(hidden.replace(part, STARS));
            }
        }
        hidden
    }

    pub(crate) fn hide_in(&self, log: &LogSink) -> LogSink {
        let (secrets, log) = (Self(Arc::clone(&self.0)), Arc::clone(log));
        Arc::new(move |line| log(&secrets.hide(line)))
    }

    /// Refuses a tree that holds one: as content, name or link.
    pub(crate) fn look_for(&self, step: &str, tree: &Path) -> Result<(), BakeError> {
        if self.is_empty() {
            return Ok(());
        }
        let finders: Vec<(&str, Finder<'_>)> = self
            .0
            .iter()
            .flat_map(|secret| Self::parts(secret).map(|part| (secret.name.as_str(), Finder::new(part))))
            .collect();
        let root = open_root(tree).map_err(BakeError::io("open", tree))?;
        let mut folders = vec![(PathBuf::from("/"), root)];
        while let Some((path, folder)) = folders.pop() {
            let failed = || BakeError::io("look through", &path);
            for name in names_in(&folder).map_err(failed())? {
                let shown = path.join(String::from_utf8_lossy(&name).as_ref());
                if let Some(secret) =
                    held_by(&folder, &name, &finders, &mut folders, &shown).map_err(failed())?
                {
                    return Err(BakeError::Step {
                        step: step.to_owned(),
                        why: format!(
                            "it leaves the secret {secret} in {}",
                            self.hide(&shown.to_string_lossy())
                        ),
                        last_lines: Vec::new(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// The name of the secret that something in a folder holds. A folder in it is put on the list of those to look through.
fn held_by<'a>(
    folder: &OwnedFd,
    name: &[u8],
    finders: &[(&'a str, Finder<'_>)],
    folders: &mut Vec<(PathBuf, OwnedFd)>,
    shown: &Path,
) -> io::Result<Option<&'a str>> {
    let found = |bytes: &[u8]| {
        finders.iter().find(|(_, finder)| finder.find(bytes).is_some()).map(|(secret, _)| *secret)
    };
    if let Some(secret) = found(name) {
        return Ok(Some(secret));
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let stat = rfs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            folders.push((
                shown.to_owned(),
                rfs::openat(folder, name, flags | OFlags::DIRECTORY, Mode::empty())?,
            ));
            Ok(None)
        }
        FileType::Symlink => Ok(found(rfs::readlinkat(folder, name, Vec::new())?.as_bytes())),
        FileType::RegularFile => {
            let mut file = File::from(rfs::openat(folder, name, flags, Mode::empty())?);
            let longest = finders.iter().map(|(_, finder)| finder.needle().len()).max().unwrap_or_default();
            // What lies across two blocks is found in the second, which begins with the end of the first.
            let mut buffer = vec![0; longest + BLOCK];
            let mut kept = 0;
            loop {
                let read = file.read(&mut buffer[kept..])?;
                if read == 0 {
                    return Ok(None);
                }
                let end = kept + read;
                if let Some(secret) = found(&buffer[..end]) {
                    return Ok(Some(secret));
                }
                kept = longest.saturating_sub(1).min(end);
                buffer.copy_within(end - kept..end, 0);
            }
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const VALUE: &str = "s3cret-of-the-test\n";

    fn secrets(value: &str) -> Secrets {
        let value = Zeroizing::new(value.as_bytes().to_vec());
        Secrets(Arc::new(vec![Secret { name: "token".to_owned(), value }]))
    }

    #[test]
    fn a_line_shows_none_of_them() {
        let pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ\n-----END PRIVATE KEY-----\n";
        assert_eq!(secrets(VALUE).hide("with s3cret-of-the-test?"), "with ***?");
        assert_eq!(secrets(pem).hide("key MC4CAQAwBQYDK2VwBCIEIJ here"), "key *** here");
        assert_eq!(secrets(VALUE).hide("nothing of it"), "nothing of it");
    }

    #[test]
    fn what_a_step_leaves_is_found_wherever_it_lies() {
        let found = |fill: &dyn Fn(&Path)| {
            let tree = tempfile::tempdir().unwrap();
            fs::create_dir(tree.path().join("etc")).unwrap();
            fill(tree.path());
            secrets(VALUE).look_for("run x", tree.path()).err().map(|error| error.to_string())
        };
        let across = [vec![b'x'; BLOCK + 5], VALUE.as_bytes().to_vec()].concat();
        for (what, fill) in [
            ("a file", &(|tree: &Path| fs::write(tree.join("etc/a"), VALUE).unwrap()) as &dyn Fn(&Path)),
            ("two blocks", &|tree| fs::write(tree.join("etc/a"), &across).unwrap()),
            ("a name", &|tree| fs::write(tree.join("etc/s3cret-of-the-test"), "").unwrap()),
            ("a link", &|tree| symlink("/x/s3cret-of-the-test", tree.join("etc/a")).unwrap()),
        ] {
            let error = found(fill).unwrap();
            assert!(error.contains("secret token in /etc/") && !error.contains("s3cret"), "{what}: {error}");
        }
        assert_eq!(found(&|tree| fs::write(tree.join("etc/a"), "s3cret-of-the-").unwrap()), None);
        assert_eq!(found(&|tree| symlink("/proc/self/root", tree.join("etc/a")).unwrap()), None);
    }
}
