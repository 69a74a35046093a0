//! What commands do to the files that say who may do what: a log in the site's folder, in a chain of hashes as the
//! services' records are, and the lock under which it is written.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use kiln_service::config::Site;
use kiln_service::guard::lock_within;
use kiln_store::AuditRecord;
use kiln_store::seal::{Checked, Fault, FaultKind, Link};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::clients::request_id;
use crate::failure::{Code, During as _, Failure, Outcome};

/// For others that change such files, which takes them milliseconds.
const LOCKED: Duration = Duration::from_secs(10);
/// Between who became another user and that user.
const AS: &str = " as ";

/// Beside what its records are about: a backup has both, sealed together.
pub(crate) fn path(site: &Site) -> PathBuf {
    site.paths().keys().join("audit.log")
}

/// One line of the log.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    link: Link,
    record: AuditRecord,
}

/// The log as it was read.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// None for a line that can't be read.
    entries: Vec<Option<Entry>>,
    /// Bytes up to the end of the last whole line.
    whole: usize,
    /// Something follows the last whole line: what a crash left of a record.
    pub(crate) is_torn: bool,
}

impl Log {
    /// No file: nothing was recorded yet.
    pub(crate) fn read(site: &Site) -> Outcome<Self> {
        let path = path(site);
        match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            bytes => Ok(Self::parse(&bytes.during(format_args!("reading {}", path.display()))?)),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines = bytes.get(..whole).unwrap_or_default().split_inclusive(|byte| *byte == b'\n');
        let entries = lines.map(|line| serde_json::from_slice(line).ok()).collect();
        Self { entries, whole, is_torn: whole < bytes.len() }
    }

    /// Where the next record goes on. A line that can't be read is passed over: it stays for `kiln audit verify` to find,
    /// and must not keep anybody from revoking a token.
    fn last(&self) -> Link {
        self.entries.iter().rev().flatten().next().map_or_else(Link::start, |entry| entry.link)
    }

    /// Newest first.
    pub(crate) fn records(&self) -> impl Iterator<Item = (u64, &AuditRecord)> {
        self.entries.iter().rev().flatten().map(|entry| (entry.link.sequence, &entry.record))
    }

    /// Whether the records after a link fit the chain, up to a sequence (0 for all).
    pub(crate) fn check(&self, from: Link, until: u64) -> Outcome<Checked> {
        let mut checked = Checked { reached: from, records: 0, fault: None, more: false, unsealed: 0 };
        let behind = usize::try_from(from.sequence).unwrap_or(usize::MAX);
        for entry in self.entries.iter().skip(behind) {
            let sequence = checked.reached.sequence + 1;
            if until != 0 && sequence > until {
                break;
            }
            let kind = match entry {
                Some(entry) if entry.link.sequence > sequence => FaultKind::Missing,
                Some(entry) => match checked.reached.then(sequence, &entry.record) {
                    Ok(next) if next == entry.link => {
                        checked.reached = next;
                        checked.records += 1;
                        continue;
                    }
                    Ok(_) => FaultKind::Altered,
                    Err(error) => return Err(Failure::failed("checking the site's own records", error)),
                },
                None => FaultKind::Altered,
            };
            checked.fault = Some(Fault { sequence, kind });
            break;
        }
        Ok(checked)
    }
}

/// Whether somebody did it, by that name or as another user.
pub(crate) fn is_by(record: &AuditRecord, name: &str) -> bool {
    record.actor == name || record.actor.split(AS).any(|part| part == name)
}

/// The user that runs this, and who became it by sudo where the session does not say so.
fn actor(user: String, sudo: Option<String>) -> String {
    let is_name =
        |it: &String| (1..=64).contains(&it.len()) && it.bytes().all(|byte| byte.is_ascii_graphic());
    match sudo.filter(is_name) {
        Some(by) if by != user => [&by, AS, &user].concat(),
        _ => user,
    }
}

/// What is to be done.
pub(crate) struct Deed {
    pub(crate) action: &'static str,
    pub(crate) subject: String,
    /// Names, roles, times: never a secret.
    pub(crate) before: Value,
    pub(crate) after: Value,
}

/// Whoever has it is the only one that changes the files which say who may do what, until it is dropped.
pub(crate) struct Ledger {
    _lock: File,
    path: PathBuf,
    log: File,
    last: Link,
    /// Bytes of the log.
    len: u64,
}

/// One at a time: a token that was revoked must not come back by another command's writing. The kernel lets go of it
/// however the process ends.
pub(crate) fn lock(site: &Site) -> Outcome<File> {
    // Under this name versions without a log lock as well.
    let path = site.paths().tokens().with_extension("lock");
    let what = format!("locking {}", path.display());
    let mut options = File::options();
    let lock = options.create(true).write(true).truncate(false).mode(0o600).open(&path).during(&what)?;
    lock_within(&lock, LOCKED).map_err(|error| {
        Failure::new(Code::Unavailable, &what, error).todo("wait for the other `kiln token` or `kiln pki`")
    })?;
    Ok(lock)
}

impl Ledger {
    /// Waits for others, and takes away what a crash left of a record.
    pub(crate) fn open(site: &Site) -> Outcome<Self> {
        let (lock, path) = (lock(site)?, path(site));
        let what = format!("opening {}", path.display());
        let mut options = File::options();
        let mut log = options.create(true).read(true).append(true).mode(0o600).open(&path).during(&what)?;
        File::open(site.paths().keys()).and_then(|keys| keys.sync_all()).during(&what)?;
        let mut bytes = Vec::new();
        log.read_to_end(&mut bytes).during(&what)?;
        let read = Log::parse(&bytes);
        let mut ledger = Self { _lock: lock, path, log, last: read.last(), len: read.whole as u64 };
        if read.is_torn {
            ledger.log.set_len(ledger.len).during(&what)?;
            let deed = Deed {
                action: "audit.repair",
                subject: "the end of a record that was cut off".to_owned(),
                before: json!({ "bytes": bytes.len() - read.whole }),
                after: Value::Null,
            };
            ledger.record(&deed)?;
        }
        Ok(ledger)
    }

    /// Records what is to be done, then does it.
    ///
    /// In this order: killed in between, the command leaves a record of what did not happen, as its user sees, who was not
    /// told that it did. The other way round it would leave a right that nobody is recorded to have given.
    pub(crate) fn carry_out<T>(&mut self, deed: &Deed, change: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
        let id = self.record(deed)?;
        change().inspect_err(|failure| {
            let after = json!({ "why": failure.line() });
            let action = format!("{}.failed", deed.action);
            // That the change failed is what has to be told; the record before stands as of one that was killed.
            let _ = self.append(&action, &deed.subject, &id, Value::Null, after);
        })
    }

    /// Gives the request id.
    pub(crate) fn record(&mut self, deed: &Deed) -> Outcome<String> {
        let id = request_id();
        self.append(deed.action, &deed.subject, &id, deed.before.clone(), deed.after.clone())?;
        Ok(id)
    }

    fn append(&mut self, action: &str, subject: &str, id: &str, before: Value, after: Value) -> Outcome {
        let what = format!("recording {action} in {}", self.path.display());
        let actor = actor(kiln_service::server::who(), std::env::var("SUDO_USER").ok());
        let record =
            AuditRecord::new(Timestamp::now(), &actor, action, subject).asked(id).changed(before, after);
        let link = self.last.then(self.last.sequence + 1, &record);
        let entry = Entry { link: link.map_err(|error| Failure::failed(&what, error))?, record };
        let mut line = serde_json::to_vec(&entry).map_err(|error| Failure::failed(&what, error))?;
        line.push(b'\n');
        if let Err(error) = self.log.write_all(&line).and_then(|()| self.log.sync_all()) {
            // Nothing was done yet. What stays of it all the same is taken for what a crash left.
            let _ = self.log.set_len(self.len);
            return Err(error).during(&what);
        }
        (self.last, self.len) = (entry.link, self.len + line.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use super::*;
    use crate::home::Home;
    use crate::site::create::{Wishes, ensure as make};

    fn site(folder: &Path) -> Site {
        let home = Home::new(Some(folder.join("home")), "test").unwrap();
        make(&home, &Wishes { nats_url: None, store: None, settings: Vec::new() }).unwrap()
    }

    fn deed(subject: &str) -> Deed {
        let (before, after) = (Value::Null, json!({ "role": "viewer" }));
        Deed { action: "token.create", subject: subject.to_owned(), before, after }
    }

    /// A command of its own for each.
    fn record(site: &Site, subjects: &[&str]) {
        for subject in subjects {
            Ledger::open(site).unwrap().carry_out(&deed(subject), || Ok(())).unwrap();
        }
    }

    fn said(site: &Site) -> Vec<String> {
        let log = Log::read(site).unwrap();
        log.records().map(|(sequence, it)| format!("{sequence} {} {}", it.action, it.subject)).collect()
    }

    fn fault(site: &Site) -> Option<(u64, FaultKind)> {
        let checked = Log::read(site).unwrap().check(Link::start(), 0).unwrap();
        checked.fault.map(|fault| (fault.sequence, fault.kind))
    }

    #[test]
    fn each_record_is_chained_to_the_one_before() {
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path());
        assert_eq!(fault(&site), None, "there is no log yet");
        record(&site, &["a", "b", "c"]);
        assert_eq!(said(&site), ["3 token.create c", "2 token.create b", "1 token.create a"]);
        assert_eq!(path(&site).metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let log = Log::read(&site).unwrap();
        let whole = log.check(Link::start(), 0).unwrap();
        assert_eq!((whole.records, whole.reached.sequence, whole.fault), (3, 3, None));
        // By parts, as it is compared with heads that were kept.
        let first = log.check(Link::start(), 2).unwrap();
        assert_eq!((first.records, first.reached.sequence), (2, 2));
        assert_eq!(log.check(first.reached, 0).unwrap().reached, whole.reached);
        let (_, newest) = log.records().next().unwrap();
        assert!(newest.request_id.is_some() && is_by(newest, &kiln_service::server::who()), "{newest:?}");
    }

    #[test]
    fn what_was_tampered_with_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path());
        record(&site, &["a", "b", "c"]);
        let path = path(&site);
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        for (what, forged, found) in [
            ("intact", text.clone(), None),
            (
                "altered",
                text.replace("\"subject\":\"b\"", "\"subject\":\"x\""),
                Some((2, FaultKind::Altered)),
            ),
            ("removed", format!("{}\n{}\n", lines[0], lines[2]), Some((2, FaultKind::Missing))),
            ("swapped", format!("{}\n{}\n", lines[1], lines[0]), Some((1, FaultKind::Missing))),
            ("twice", format!("{}\n{}\n", lines[0], lines[0]), Some((2, FaultKind::Altered))),
            ("garbage", text.replacen("{\"link\"", "x", 1), Some((1, FaultKind::Altered))),
        ] {
            std::fs::write(&path, forged).unwrap();
            assert_eq!(fault(&site), found, "{what}");
            // Nobody is kept from revoking by it, and it stays to be found.
            record(&site, &["d"]);
            assert_eq!(fault(&site), found, "{what}");
        }
    }

    #[test]
    fn what_a_crash_left_of_a_record_is_told_and_taken_away_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path());
        record(&site, &["a", "b"]);
        let path = path(&site);
        let whole = std::fs::read(&path).unwrap();
        // Also where all but the end of the line was written.
        for cut in [1, 30] {
            std::fs::write(&path, &whole[..whole.len() - cut]).unwrap();
            assert!(Log::read(&site).unwrap().is_torn);
            assert_eq!(fault(&site), None);
            record(&site, &["c"]);
            let cut_off = "2 audit.repair the end of a record that was cut off";
            assert_eq!(said(&site), ["3 token.create c", cut_off, "1 token.create a"]);
            assert!(!Log::read(&site).unwrap().is_torn);
            assert_eq!(fault(&site), None);
        }
    }

    #[test]
    fn a_change_is_recorded_before_it_is_made_and_its_failure_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path());
        let mut ledger = Ledger::open(&site).unwrap();
        ledger
            .carry_out(&deed("a"), || {
                assert_eq!(said(&site), ["1 token.create a"]);
                Err::<(), _>(Failure::failed("writing it", "the disk is full"))
            })
            .unwrap_err();
        assert_eq!(said(&site), ["2 token.create.failed a", "1 token.create a"]);
        let log = Log::read(&site).unwrap();
        let records: Vec<_> = log.records().map(|(_, record)| record).collect();
        assert_eq!(records[0].after, json!({ "why": "writing it: the disk is full" }));
        assert_eq!(records[0].request_id, records[1].request_id);
    }

    #[test]
    fn nothing_is_changed_where_it_can_not_be_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path());
        let mut ledger = Ledger::open(&site).unwrap();
        // A descriptor that takes no writes, as a full disk.
        ledger.log = File::open(path(&site)).unwrap();
        let refused = ledger.carry_out(&deed("a"), || -> Outcome { panic!("it was changed") }).unwrap_err();
        assert!(refused.line().contains("recording token.create in"), "{}", refused.line());
        assert_eq!(said(&site), Vec::<String>::new());
    }

    #[test]
    fn the_actor_is_the_user_and_who_became_it() {
        let of = |sudo: Option<&str>| actor("root".to_owned(), sudo.map(str::to_owned));
        assert_eq!(of(Some("ada")), "ada as root");
        for none in [None, Some(""), Some("root"), Some("a b"), Some("a\nb")] {
            assert_eq!(of(none), "root");
        }
        let record = AuditRecord::new(Timestamp::UNIX_EPOCH, "ada as root", "token.create", "a");
        assert!(["ada", "root", "ada as root"].iter().all(|name| is_by(&record, name)));
        assert!(!is_by(&record, "ad") && !is_by(&record, "as"));
    }
}
