//! Release files that archives give now, beside those that the lists were made from. Where they are the same, apt has nothing
//! to bring up to date. Where one went back in time, apt goes on with the newer one that it knows, without a word: nobody
//! would see that a mirror stands still, or that somebody holds it back.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_model::release_file::{ReleaseFile, valid_until};

use super::LogSink;
use super::apt::list_name;
use super::error::BakeError;
use super::fetch::{Transport, Wanted};
use super::sources::Archive;

/// Debian's own has 150 kB.
const LARGEST: u64 = 16 << 20;
const NAME: &str = "InRelease";
/// Whatever does not answer is asked again by apt, which also says what is wrong.
const ONCE: [&str; 3] = ["Acquire::Retries=0", "Acquire::http::Timeout=20", "Acquire::https::Timeout=20"];

/// One that apt has, whose signature it has verified.
struct Held {
    url: String,
    path: PathBuf,
    file: ReleaseFile,
    valid_until: Option<Timestamp>,
}

/// Those that apt has.
pub(crate) struct Known<'a> {
    lists: &'a Path,
    held: Vec<Held>,
    /// Each of the archives has one.
    is_whole: bool,
}

/// What the archives gave for them, in their order, or why they did not.
pub(crate) type Given = Result<Vec<ReleaseFile>, String>;

impl<'a> Known<'a> {
    pub(crate) fn of(lists: &'a Path, archives: &[Archive]) -> Result<Self, BakeError> {
        let urls: BTreeSet<String> = archives.iter().map(address).collect();
        let mut held = Vec::new();
        for url in &urls {
            let path = lists.join(file_name(url));
            let content = match fs::read(&path) {
                Ok(content) => content,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(BakeError::io("read", &path)(error)),
            };
            let (file, valid_until) = (ReleaseFile::of(&content), valid_until(&content));
            held.push(Held { url: url.clone(), path, file, valid_until });
        }
        let is_whole = held.len() == urls.len();
        Ok(Self { lists, held, is_whole })
    }

    /// Asks each archive once.
    ///
    /// # Errors
    /// The disk, or the build was cancelled.
    pub(crate) fn ask(&self, transport: Transport<'_>) -> Result<Given, BakeError> {
        if self.held.is_empty() {
            return Ok(Ok(Vec::new()));
        }
        let folder =
            tempfile::tempdir_in(self.lists).map_err(BakeError::io("make a folder in", self.lists))?;
        let to = |at: usize| folder.path().join(at.to_string());
        let wanted = self.held.iter().enumerate();
        let wanted = wanted.map(|(at, held)| Wanted {
            url: held.url.clone(),
            to: to(at),
            sha256: None,
            largest: LARGEST,
        });
        if let Err(why) = transport.fetch(&wanted.collect::<Vec<_>>(), &ONCE)? {
            return Ok(Err(why));
        }
        let read = |at| fs::read(to(at)).map_err(BakeError::io("read", to(at)));
        (0..self.held.len()).map(|at| Ok(ReleaseFile::of(&read(at)?))).collect::<Result<_, _>>().map(Ok)
    }

    /// Whether they are what each archive has, and hold at `now`: apt refuses one that has expired.
    pub(crate) fn is_still(&self, given: &Given, now: Timestamp) -> bool {
        let same = |(held, given): (&Held, &ReleaseFile)| {
            held.file.digest == given.digest && held.valid_until.is_none_or(|until| now < until)
        };
        let Ok(given) = given else { return false };
        self.is_whole && self.held.iter().zip(given).all(same)
    }

    /// Tells the log which archive gave an older one than apt has. It is no failure: the newer one counts, and a mirror that
    /// lags behind must not hold builds up.
    pub(crate) fn tell(&self, given: &Given, log: &LogSink) {
        let given = match given {
            Ok(given) => given,
            Err(why) => {
                return log(&format!("W: whether an archive went back in time can't be seen: {why}"));
            }
        };
        for (Held { url, path, file, .. }, given) in self.held.iter().zip(given) {
            if let (Some(given), Some(kept)) = (given.date, file.date)
                && given < kept
            {
                log(&format!(
                    "W: archive {url} went back in time: its release file is of {given}, and the one of {kept} stays in force; \
                     where it was put back on purpose, delete {}",
                    path.display()
                ));
            }
        }
    }
}

fn address(archive: &Archive) -> String {
    let suite = &archive.suite;
    let below = if suite.ends_with('/') { suite.clone() } else { format!("dists/{suite}/") };
    format!("{}/{below}{NAME}", archive.url.trim_end_matches('/'))
}

/// In apt's folder of lists.
fn file_name(url: &str) -> String {
    let (_, rest) = url.split_once(':').unwrap_or(("", url));
    list_name(rest.strip_prefix("//").unwrap_or(rest))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::sources::Signer;
    use super::*;

    fn archive(url: &str, suite: &str) -> Archive {
        let (url, suite) = (url.to_owned(), suite.to_owned());
        Archive { url, suite, components: Vec::new(), signed_by: Signer::HostKeys }
    }

    #[test]
    fn a_release_file_is_found_among_apts_lists() {
        for (url, suite, address_wanted, name) in [
            (
                "http://archive.example/debian/",
                "bookworm-updates",
                "http://archive.example/debian/dists/bookworm-updates/InRelease",
                "archive.example_debian_dists_bookworm-updates_InRelease",
            ),
            (
                "http://flat.example:8080/own",
                "./",
                "http://flat.example:8080/own/./InRelease",
                "flat.example:8080_own_._InRelease",
            ),
            ("file:/srv/own", "x", "file:/srv/own/dists/x/InRelease", "_srv_own_dists_x_InRelease"),
        ] {
            let url = address(&archive(url, suite));
            assert_eq!((url.as_str(), file_name(&url).as_str()), (address_wanted, name));
        }
    }

    #[test]
    fn what_is_held_counts_only_whole_unchanged_and_until_it_expires() {
        let release = |date: &str| {
            format!("Date: {date} 2026 10:00:00 UTC\nValid-Until: Sun, 7 Jun 2026 10:00:00 UTC\n")
        };
        let (old, new) = (release("Sun, 31 May"), release("Mon, 1 Jun"));
        let lists = tempfile::tempdir().unwrap();
        let archives = [archive("http://a.example", "x"), archive("http://b.example", "x")];
        let write = |name: &str, text: &str| {
            fs::write(lists.path().join(format!("{name}.example_dists_x_InRelease")), text).unwrap();
        };
        let given = |texts: [&String; 2]| Ok(texts.map(|text| ReleaseFile::of(text.as_bytes())).to_vec());
        let (before, after): (Timestamp, Timestamp) =
            ("2026-06-07T09:59:59Z".parse().unwrap(), "2026-06-07T10:00:00Z".parse().unwrap());

        write("a", &new);
        let one = Known::of(lists.path(), &archives).unwrap();
        assert!(!one.is_still(&Ok(vec![ReleaseFile::of(new.as_bytes())]), before), "there is nothing of b");
        write("b", &new);
        let known = Known::of(lists.path(), &archives).unwrap();
        assert!(known.is_still(&given([&new, &new]), before));
        assert!(!known.is_still(&given([&new, &new]), after));
        assert!(!known.is_still(&given([&new, &old]), before));
        assert!(!known.is_still(&Err("away".to_owned()), before));

        let lines = Arc::new(Mutex::new(Vec::new()));
        let log: LogSink = {
            let lines = Arc::clone(&lines);
            Arc::new(move |line: &str| lines.lock().unwrap().push(line.to_owned()))
        };
        known.tell(&given([&new, &new]), &log);
        assert_eq!(lines.lock().unwrap().len(), 0);
        known.tell(&given([&new, &old]), &log);
        let said = lines.lock().unwrap().join("\n");
        assert!(said.contains("archive http://b.example/dists/x/InRelease went back in time"), "{said}");
        assert!(!said.contains("a.example/"), "{said}");
    }
}
