//! apt, with a state of its own: the host's lists, status, preferences and hooks play no part. It checks the archives'
//! signatures and solves; what it would do is read from what it prints.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_model::digest::Digest;
use kiln_model::lock::LockedPackage;
use kiln_service::config::apt_credentials;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::command::{self, Outcome, Stdout};
use super::error::BakeError;
use super::fetch::Transport;
use super::sources::{Archive, render};
use super::{ReleaseFile, release};

const TIME_LIMIT: Duration = Duration::from_secs(600);
/// Between two looks at a lock that another holds.
const LOCK_TICK: Duration = Duration::from_millis(50);
/// How the host reaches archives, and whether its clock is to be trusted. Everything else of its configuration stays out.
const CARRIED_OVER: [&str; 8] = [
    "Acquire::http::",
    "Acquire::https::",
    "Acquire::Check-Valid-Until ",
    "Acquire::Check-Date ",
    "Acquire::Retries ",
    "Acquire::ForceIPv4 ",
    "Acquire::ForceIPv6 ",
    "Acquire::Queue-Mode ",
];

/// What apt would install, in the order of unpacking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Solved {
    pub(crate) package: LockedPackage,
    pub(crate) url: String,
    /// An archive for security updates has it.
    #[serde(default)]
    pub(crate) security: bool,
}

/// A list of packages as apt keeps it.
#[derive(Debug, Clone)]
pub(crate) struct PackageList {
    /// The address that its packages' file names are relative to.
    pub(crate) repository: String,
    /// The address of its suite.
    pub(crate) base: String,
    /// Its path below the suite: `main/binary-amd64/Packages`.
    pub(crate) key: String,
    pub(crate) file: PathBuf,
    /// `InRelease`; `Release` where the archive has no other.
    pub(crate) release_name: &'static str,
    pub(crate) release: PathBuf,
}

/// The state for one set of archives. While it is open no other bake uses it.
pub(crate) struct Apt<'a> {
    folder: PathBuf,
    configuration: String,
    archives: &'a [Archive],
    transport: Transport<'a>,
    _lock: File,
}

impl<'a> Apt<'a> {
    pub(crate) fn open(
        home: &Path,
        architecture: &str,
        archives: &'a [Archive],
        transport: Transport<'a>,
    ) -> Result<Self, BakeError> {
        let sources = render(archives);
        let key = Digest::of(format!("{architecture}\n{sources}").as_bytes()).hex();
        let folder = home.join("apt").join(&key[..16]);
        for part in ["lists/partial", "cache/archives/partial", "state"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).map_err(BakeError::io("make folder", &path))?;
        }
        let lock_path = folder.join("in-use");
        let lock = File::create(&lock_path).map_err(BakeError::io("open", &lock_path))?;
        wait_for(&lock, transport).map_err(BakeError::io("lock", &lock_path))??;
        let write = |name: &str, content: &str| {
            let path = folder.join(name);
            // An unchanged file keeps its time, by which apt tells whether its cache is still good.
            if fs::read_to_string(&path).is_ok_and(|old| old == content) {
                return Ok(());
            }
            fs::write(&path, content).map_err(BakeError::io("write", &path))
        };
        write("sources.sources", &sources)?;
        write("state/status", "")?;
        let configuration = configuration(&folder, architecture, &host_configuration()?);
        write("apt.conf", &configuration)?;
        Ok(Self { folder, configuration, archives, transport, _lock: lock })
    }

    /// Where all that belongs to this set of archives lies.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn configuration(&self) -> &str {
        &self.configuration
    }

    fn command(&self, program: &str, status: Option<&Path>) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).env("LC_ALL", "C.UTF-8");
        command.args(apt_credentials(self.transport.credentials).iter().flat_map(|option| ["-o", option]));
        if let Some(status) = status {
            command.arg("-o").arg(format!("Dir::State::status={}", status.display()));
        }
        command
    }

    /// Brings the lists up to date; apt checks the signatures. Where each archive has the release file that they were made
    /// from, there is nothing to bring.
    pub(crate) fn update(&self, cancel: &CancellationToken) -> Result<(), BakeError> {
        let began = Instant::now();
        let lists = self.folder.join("lists");
        let known = release::Known::of(&lists, self.archives)?;
        let given = known.ask(self.transport)?;
        // There from the end of an update to the beginning of the next: one that was killed may have left some of its lists.
        let complete = self.folder.join("state/complete");
        if complete.exists() && known.is_still(&given, Timestamp::now()) {
            let ms = began.elapsed().as_millis();
            (self.transport.log)(&format!(
                "package lists are up to date: no archive has published since ({ms} ms)"
            ));
            return Ok(());
        }
        match fs::remove_file(&complete) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(BakeError::io("delete", &complete)(error));
            }
            _ => {}
        }
        let mut command = self.command("apt-get", None);
        // Without the first option a list that could not be had is a warning, and an old one is used in its place; without
        // the second the cache of all packages is made anew also where no list has changed. Where one has,
        // `release_files` makes it.
        command.args(["-q", "--error-on=any", "-o", "pkgCacheFile::Generate=false", "update"]);
        let outcome = command::run(&mut command, Stdout::Keep, self.transport.log, cancel, TIME_LIMIT)?;
        if !outcome.succeeded() {
            return Err(self.archive_error(&outcome));
        }
        fs::write(&complete, "").map_err(BakeError::io("write", &complete))?;
        known.tell(&given, self.transport.log);
        (self.transport.log)(&format!("package lists are up to date ({} ms)", began.elapsed().as_millis()));
        Ok(())
    }

    fn archive_error(&self, outcome: &Outcome) -> BakeError {
        let why = said(outcome);
        let archive = self
            .archives
            .iter()
            .find(|archive| why.contains(archive.url.trim_end_matches('/')))
            .or(self.archives.first())
            .map(|archive| format!("{} {}", archive.url, archive.suite))
            .unwrap_or_default();
        let unsigned = ["NO_PUBKEY", "not signed", "BADSIG", "EXPKEYSIG", "signature", "GPG error"];
        let remedy = if unsigned.iter().any(|sign| why.contains(sign)) {
            "if the archive is the right one, name the key ring that it is signed with in `signedBy`"
        } else {
            "see that the address is right and that this machine reaches it; the build can be tried again"
        };
        BakeError::Archive { archive, why, remedy: remedy.to_owned() }
    }

    /// Solves for `wanted` on top of what `status` says is installed: nothing where there is none.
    pub(crate) fn solve(
        &self,
        wanted: &[String],
        status: Option<&Path>,
        cancel: &CancellationToken,
    ) -> Result<Vec<Solved>, BakeError> {
        self.print(&["-q", "-y", "--print-uris", "--no-remove", "install", "--"], wanted, status, cancel)
    }

    fn print(
        &self,
        words: &[&str],
        wanted: &[String],
        status: Option<&Path>,
        cancel: &CancellationToken,
    ) -> Result<Vec<Solved>, BakeError> {
        let mut command = self.command("apt-get", status);
        command.args(words).args(wanted);
        let outcome = command::run(&mut command, Stdout::Keep, self.transport.log, cancel, TIME_LIMIT)?;
        let stdout = String::from_utf8_lossy(&outcome.stdout);
        if !outcome.succeeded() {
            return Err(unsolvable(&said(&outcome), &stdout));
        }
        stdout.lines().filter(|line| line.starts_with('\'')).map(parse_uri).collect()
    }

    /// What has a newer version than what `status` says is installed, with what that needs.
    pub(crate) fn upgrades(
        &self,
        status: &Path,
        cancel: &CancellationToken,
    ) -> Result<Vec<Solved>, BakeError> {
        let words = ["-q", "-y", "--print-uris", "--no-remove", "--with-new-pkgs", "upgrade"];
        self.print(&words, &[], Some(status), cancel)
    }

    /// The release files that the lists were made from.
    pub(crate) fn release_files(lists: &[PackageList]) -> Result<Vec<ReleaseFile>, BakeError> {
        let mut files = BTreeMap::new();
        for list in lists {
            let content = fs::read(&list.release).map_err(BakeError::io("read", &list.release))?;
            files.insert(format!("{}{}", list.base, list.release_name), Digest::of(&content));
        }
        Ok(files.into_iter().map(|(url, digest)| ReleaseFile { url, digest }).collect())
    }

    /// Every list of packages, with the release file that says what is in it.
    pub(crate) fn package_lists(&self, cancel: &CancellationToken) -> Result<Vec<PackageList>, BakeError> {
        let mut command = self.command("apt-get", None);
        command.args([
            "indextargets",
            "--format",
            "$(REPO_URI)|$(BASE_URI)|$(FILENAME)|$(METAKEY)",
            "Created-By: Packages",
        ]);
        let outcome = command::run(&mut command, Stdout::Keep, self.transport.log, cancel, TIME_LIMIT)?;
        if !outcome.succeeded() {
            return Err(self.archive_error(&outcome));
        }
        let mut lists = Vec::new();
        for line in String::from_utf8_lossy(&outcome.stdout).lines() {
            let parts: Vec<_> = line.split('|').collect();
            let [repository, base, list, key] = parts.as_slice() else { continue };
            // The release file of the same suite begins alike.
            let release = list.rsplit_once(&list_name(key)).and_then(|(prefix, _)| {
                let files =
                    ["InRelease", "Release"].map(|name| (name, PathBuf::from(format!("{prefix}{name}"))));
                files.into_iter().find(|(_, path)| path.is_file())
            });
            // Without it nobody would see that the archive moves on.
            let Some((release_name, release)) = release else {
                return Err(BakeError::Archive {
                    archive: (*base).to_owned(),
                    why: format!("apt kept no release file beside its list {list}"),
                    remedy: "see that the archive has an InRelease or a Release file for this suite"
                        .to_owned(),
                });
            };
            lists.push(PackageList {
                repository: (*repository).to_owned(),
                base: (*base).to_owned(),
                key: (*key).to_owned(),
                file: PathBuf::from(list),
                release_name,
                release,
            });
        }
        if lists.is_empty() {
            return Err(BakeError::Archive {
                archive: self.archives.first().map(|archive| archive.url.clone()).unwrap_or_default(),
                why: "it has no package list for this architecture".to_owned(),
                remedy: "see that suite and components are those that the archive has".to_owned(),
            });
        }
        Ok(lists)
    }
}

/// How apt names a list after the part of its address below the suite: what is special to it or not printable in hex, and
/// `_` for `/`. It is `URItoFileName` of its `strutl.cc`.
pub(crate) fn list_name(key: &str) -> String {
    let mut name = String::new();
    for byte in key.bytes() {
        match byte {
            b'/' => name.push('_'),
            _ if !byte.is_ascii_graphic() || b"\\|{}[]<>\"^~_=!@#$%&*".contains(&byte) => {
                let _ = write!(name, "%{byte:02x}");
            }
            _ => name.push(char::from(byte)),
        }
    }
    name
}

/// Waits for another bake of the same archives, for as long as the caller does.
fn wait_for(lock: &File, transport: Transport<'_>) -> std::io::Result<Result<(), BakeError>> {
    let mut told = false;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(Ok(())),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if transport.cancel.is_cancelled() => {
                return Ok(Err(BakeError::Cancelled));
            }
            Err(TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut told, true) {
                    (transport.log)("waiting for another build that asks the same archives");
                }
                std::thread::sleep(LOCK_TICK);
            }
        }
    }
}

fn configuration(folder: &Path, architecture: &str, carried_over: &str) -> String {
    let folder = folder.display();
    // The methods run as root, as `_apt` can't enter the site's folder. Lists as gzip where the archive has them: of Debian's
    // main these are 12 MB instead of 9, and open in a third of xz's time; from some 70 Mbit/s on that is quicker.
    format!(
        r#"Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "{folder}/sources.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{folder}/state";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/state/status";
Dir::State::extended_states "{folder}/state/extended_states";
Dir::Cache "{folder}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "srcpkgcache.bin";
Dir::Log "/dev/null";
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Sandbox::User "root";
APT::Cmd::Pattern-Only "true";
APT::Get::AllowUnauthenticated "false";
Acquire::Languages "none";
Acquire::PDiffs "false";
Acquire::GzipIndexes "false";
Acquire::CompressionTypes::Order {{ "gz"; }};
Acquire::ForceHash "SHA256";
{carried_over}"#
    )
}

fn host_configuration() -> Result<String, BakeError> {
    let output = Command::new("apt-config").arg("dump").output().map_err(|error| BakeError::Machine {
        what: "apt-config".to_owned(),
        why: error.to_string(),
        remedy: "packages are resolved by apt 2.6 or newer: install it".to_owned(),
    })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let carried = text.lines().filter(|line| CARRIED_OVER.iter().any(|prefix| line.starts_with(prefix)));
    Ok(carried.map(|line| format!("{line}\n")).collect())
}

/// apt's own words without their marks, each once.
fn said(outcome: &Outcome) -> String {
    let mut lines: Vec<&str> = Vec::new();
    for line in &outcome.last_lines {
        let line = line.strip_prefix("E: ").or(line.strip_prefix("W: ")).unwrap_or(line);
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    if lines.is_empty() { outcome.why(TIME_LIMIT) } else { lines.join("; ") }
}

fn unsolvable(said: &str, stdout: &str) -> BakeError {
    let unknown = ["Unable to locate package", "has no installation candidate", "was not found"];
    if unknown.iter().any(|sign| said.contains(sign)) {
        return BakeError::Definition {
            what: "packages".to_owned(),
            why: said.to_owned(),
            remedy: "check the name's spelling, and that the suite's archives hold it".to_owned(),
        };
    }
    let details: Vec<&str> = stdout
        .lines()
        .skip_while(|line| !line.starts_with("The following packages have unmet dependencies"))
        .skip(1)
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .take(8)
        .collect();
    BakeError::Definition {
        what: "packages".to_owned(),
        why: if details.is_empty() { said.to_owned() } else { format!("{said} {}", details.join("; ")) },
        remedy:
            "these packages can't be installed together from these archives: change the list, or the archives"
                .to_owned(),
    }
}

/// `'<url>' <name>_<version>_<architecture>.deb <size> SHA256:<hex>`, where the version's `:` is `%3a`.
fn parse_uri(line: &str) -> Result<Solved, BakeError> {
    let parse = || {
        let (url, rest) = line.strip_prefix('\'')?.split_once("' ")?;
        let mut words = rest.split(' ');
        let (file, size, hash) = (words.next()?, words.next()?, words.next()?);
        let mut parts = file.strip_suffix(".deb")?.split('_');
        let (name, version, architecture) = (parts.next()?, parts.next()?, parts.next()?);
        let package = LockedPackage {
            name: name.to_owned(),
            version: version.replace("%3a", ":").replace("%3A", ":"),
            architecture: architecture.to_owned(),
            sha256: format!("sha256:{}", hash.strip_prefix("SHA256:")?).parse().ok()?,
            size: size.parse().ok()?,
        };
        (parts.next().is_none() && is_package_name(name)).then(|| Solved {
            package,
            url: url.to_owned(),
            security: false,
        })
    };
    parse().ok_or_else(|| BakeError::Archive {
        archive: "packages".to_owned(),
        why: format!("apt names a package without its sha256, or in an unknown way: {line}"),
        remedy: "the archive has to list SHA256 for its packages".to_owned(),
    })
}

pub(crate) fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.len() <= 200
        && name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        // apt takes a `-` at the end as "remove".
        && !name.ends_with('-')
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b))
}

/// `name` or `name=version`.
pub(crate) fn is_request(text: &str) -> bool {
    match text.split_once('=') {
        None => is_package_name(text),
        Some((name, version)) => {
            is_package_name(name)
                && !version.is_empty()
                && version.len() <= 200
                && version.bytes().all(|b| b.is_ascii_alphanumeric() || b".+~:-".contains(&b))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::LogSink;
    use super::*;

    fn transport<'a>(log: &'a LogSink, cancel: &'a CancellationToken) -> Transport<'a> {
        Transport { credentials: None, log, cancel }
    }

    #[test]
    fn a_wait_for_anothers_apt_ends_with_its_caller() {
        let home = tempfile::tempdir().unwrap();
        let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let cancel = CancellationToken::new();
        let quiet: LogSink = std::sync::Arc::new(|_: &str| {});
        let _first = Apt::open(home.path(), "amd64", &[], transport(&quiet, &cancel)).unwrap();
        // Cancelled once it says that it waits.
        let log: LogSink = {
            let (lines, cancel) = (lines.clone(), cancel.clone());
            std::sync::Arc::new(move |line: &str| {
                lines.lock().unwrap().push(line.to_owned());
                cancel.cancel();
            })
        };
        let second = Apt::open(home.path(), "amd64", &[], transport(&log, &cancel)).err();
        assert!(matches!(second, Some(BakeError::Cancelled)), "{second:?}");
        assert_eq!(*lines.lock().unwrap(), ["waiting for another build that asks the same archives"]);
    }

    #[test]
    fn lists_have_the_names_that_apt_gives_them() {
        assert_eq!(list_name("main/binary-amd64/Packages"), "main_binary-amd64_Packages");
        assert_eq!(list_name("my_repo~1/binary-amd64/Packages"), "my%5frepo%7e1_binary-amd64_Packages");
    }

    #[test]
    fn what_apt_prints_becomes_a_locked_package() {
        let hash = "b".repeat(64);
        let line = format!(
            "'http://a.test/pool/libnginx-mod-http-echo_0.63-4_amd64.deb' libnginx-mod-http-echo_1%3a0.63-4_amd64.deb 18736 SHA256:{hash}"
        );
        let solved = parse_uri(&line).unwrap();
        assert_eq!(solved.package.version, "1:0.63-4");
        assert_eq!(solved.package.sha256.hex(), hash);
        assert_eq!(solved.url, "http://a.test/pool/libnginx-mod-http-echo_0.63-4_amd64.deb");
        for bad in [
            "'http://a.test/x.deb' x_1_amd64.deb 10 MD5Sum:00",
            "'http://a.test/x.deb' x_1_amd64.deb 10 ",
            "'http://a.test/x.deb' ../x_1_amd64.deb 10 SHA256:00",
        ] {
            assert!(parse_uri(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_request_can_not_be_an_option_or_a_pattern() {
        for good in ["nginx-light", "g++", "python3.11", "nginx=1.22.1-9+deb12u1", "libx=1:2~rc1"] {
            assert!(is_request(good), "{good}");
        }
        for bad in [
            "-o",
            "nginx-",
            "?essential",
            "~i",
            "a",
            "Nginx",
            "nginx/sid",
            "nginx=",
            "a b",
            "nginx*",
            "./x.deb",
        ] {
            assert!(!is_request(bad), "{bad}");
        }
    }
}
