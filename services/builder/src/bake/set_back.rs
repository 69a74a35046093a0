//! Release files that went back in time. apt goes on with the newer one that it knows, without a word: nobody would see that
//! a mirror stands still, or that somebody holds it back.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use kiln_model::digest::Digest;
use kiln_model::release_file::ReleaseFile;

use super::apt::list_name;
use super::error::BakeError;
use super::fetch::{Transport, Wanted};

/// Debian's own has 150 kB.
const LARGEST: u64 = 16 << 20;
const NAME: &str = "InRelease";

/// Those that apt had before it asked for newer ones.
pub(crate) struct Known<'a> {
    lists: &'a Path,
    files: HashMap<PathBuf, Digest>,
}

impl<'a> Known<'a> {
    pub(crate) fn of(lists: &'a Path) -> Result<Self, BakeError> {
        let mut files = HashMap::new();
        for item in fs::read_dir(lists).map_err(BakeError::io("read", lists))? {
            let path = item.map_err(BakeError::io("read", lists))?.path();
            if path.as_os_str().as_encoded_bytes().ends_with(NAME.as_bytes()) {
                let content = fs::read(&path).map_err(BakeError::io("read", &path))?;
                files.insert(path, Digest::of(&content));
            }
        }
        Ok(Self { lists, files })
    }

    /// Compares with what archives have given since, as `said` by apt, and tells the log which is older than what was known.
    /// It is no failure: the newer one counts, and a mirror that lags behind must not hold builds up.
    ///
    /// # Errors
    /// The disk, or the build was cancelled.
    pub(crate) fn tell(&self, said: &str, transport: Transport<'_>) -> Result<(), BakeError> {
        // What was given took the place of what was known, or is the same, or is one that apt has thrown away. An archive that
        // knows no conditional requests gives the same one each time.
        let mut kept = Vec::new();
        for url in given(said) {
            let path = self.lists.join(file_name(&url));
            let Some(known) = self.files.get(&path) else { continue };
            let now = ReleaseFile::of(&fs::read(&path).map_err(BakeError::io("read", &path))?);
            if now.digest == *known {
                kept.push((url, path, now.date));
            }
        }
        if kept.is_empty() {
            return Ok(());
        }
        let folder =
            tempfile::tempdir_in(self.lists).map_err(BakeError::io("make a folder in", self.lists))?;
        let to = |at: usize| folder.path().join(at.to_string());
        let wanted = kept.iter().enumerate();
        let wanted = wanted.map(|(at, (url, ..))| Wanted {
            url: url.clone(),
            to: to(at),
            sha256: None,
            largest: LARGEST,
        });
        if let Err(why) = transport.fetch(&wanted.collect::<Vec<_>>())? {
            (transport.log)(&format!("W: whether an archive went back in time can't be seen: {why}"));
            return Ok(());
        }
        for (at, (url, path, kept)) in kept.into_iter().enumerate() {
            let given = ReleaseFile::of(&fs::read(to(at)).map_err(BakeError::io("read", to(at)))?);
            if let (Some(given), Some(kept)) = (given.date, kept)
                && given < kept
            {
                (transport.log)(&format!(
                    "W: archive {url} went back in time: its release file is of {given}, and the one of {kept} stays in force; \
                     where it was put back on purpose, delete {}",
                    path.display()
                ));
            }
        }
        Ok(())
    }
}

/// The addresses of release files that apt did not find unchanged: `Get:1 http://archive.example/debian bookworm InRelease
/// [147 kB]`.
fn given(said: &str) -> Vec<String> {
    let one = |line: &str| {
        let mut words = line.strip_prefix("Get:")?.split(' ').skip(1);
        let (url, suite, name) = (words.next()?, words.next()?, words.next()?);
        let below = if suite.ends_with('/') { suite.to_owned() } else { format!("dists/{suite}/") };
        (name == NAME).then(|| format!("{}/{below}{NAME}", url.trim_end_matches('/')))
    };
    said.lines().filter_map(one).collect()
}

/// In apt's folder of lists.
fn file_name(url: &str) -> String {
    let (_, rest) = url.split_once(':').unwrap_or(("", url));
    list_name(rest.strip_prefix("//").unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_has_got_is_found_among_its_lists() {
        let said = "Get:1 http://archive.example/debian bookworm InRelease [147 kB]\n\
                    Hit:2 http://archive.example/debian bookworm-updates InRelease\n\
                    Get:3 http://flat.example:8080/own ./ InRelease [2 kB]\n\
                    Get:4 http://archive.example/debian bookworm/main amd64 Packages [12 MB]\n";
        let urls = given(said);
        assert_eq!(
            urls,
            [
                "http://archive.example/debian/dists/bookworm/InRelease",
                "http://flat.example:8080/own/./InRelease"
            ]
        );
        let names: Vec<_> = urls.iter().map(|url| file_name(url)).collect();
        assert_eq!(names[0], "archive.example_debian_dists_bookworm_InRelease");
        assert_eq!(names[1], "flat.example:8080_own_._InRelease");
    }
}
