//! What is on a system that packages are added to, as apt has to know it.

use std::path::{Path, PathBuf};

use kiln_image::Stack;
use kiln_model::digest::Digest;

use super::error::BakeError;
use super::{dpkg, kept, whole};

/// os-release(5): the first is mostly a link to the second.
pub(crate) const OS_RELEASE: [&[u8]; 2] = [b"etc/os-release", b"usr/lib/os-release"];

/// A hundred thousand packages.
pub(crate) const STATUS_LIMIT: u64 = 128 << 20;
pub(crate) const OS_RELEASE_LIMIT: u64 = 64 << 10;

/// Of all systems, dpkg's databases as files.
pub(crate) fn all(home: &Path) -> PathBuf {
    home.join("apt/parents")
}

#[derive(Debug, Default)]
pub(crate) struct System {
    /// dpkg's database.
    pub(crate) status: Option<Vec<u8>>,
    pub(crate) os_release: Option<Vec<u8>>,
}

impl System {
    /// Of an image.
    pub(crate) fn of_stack(stack: &Stack) -> Result<Self, BakeError> {
        let status = stack.read(dpkg::STATUS, STATUS_LIMIT)?;
        let os_release = stack.read_through_links(OS_RELEASE[0], OS_RELEASE_LIMIT)?;
        Ok(Self { status, os_release })
    }

    /// What os-release(5) says of something.
    pub(crate) fn os_value(&self, name: &str) -> Option<String> {
        let text = String::from_utf8_lossy(self.os_release.as_deref().unwrap_or_default()).into_owned();
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        values.next().map(|value| value.trim().trim_matches(['"', '\'']).to_owned())
    }

    /// The suite whose archives its packages come from.
    pub(crate) fn suite(&self, what: &str) -> Result<String, BakeError> {
        let plain = |name: &String| {
            name.starts_with(|first: char| first.is_ascii_lowercase())
                && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        self.os_value("VERSION_CODENAME").filter(plain).ok_or_else(|| BakeError::Definition {
            what: what.to_owned(),
            why: "its os-release names no suite, so nobody knows which archives packages come from"
                .to_owned(),
            remedy: "take a root file system of Debian, or leave the packages out".to_owned(),
        })
    }

    /// As a file, where apt reads it.
    pub(crate) fn keep_status(&self, what: &str, digest: &Digest, home: &Path) -> Result<PathBuf, BakeError> {
        let status = self.status.as_deref().ok_or_else(|| BakeError::Definition {
            what: what.to_owned(),
            why: "it holds no dpkg database, so no packages can be added".to_owned(),
            remedy: "begin with another one, or leave the packages out".to_owned(),
        })?;
        let folder = all(home);
        std::fs::create_dir_all(&folder).map_err(BakeError::io("make folder", &folder))?;
        let path = folder.join(digest.hex());
        if path.is_file() {
            kept::touch(&path)?;
        } else {
            whole::write(&path, &[status]).map_err(BakeError::io("write", &path))?;
        }
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_is_the_one_that_os_release_names() {
        let suite = |text: &str| {
            let system = System { os_release: Some(text.as_bytes().to_vec()), status: None };
            system.suite("it").ok()
        };
        assert_eq!(suite("ID=debian\nVERSION_CODENAME=bookworm\n"), Some("bookworm".to_owned()));
        assert_eq!(suite("VERSION_CODENAME=\"trixie\"\n"), Some("trixie".to_owned()));
        for wrong in ["", "VERSION_CODENAME=\n", "VERSION_CODENAME=../x\n", "VERSION_CODENAME=a b\n"] {
            assert_eq!(suite(wrong), None, "{wrong}");
        }
    }
}
