//! What was seen of a store, in a file apart from it: a copy that was put in its place has seen less.
//!
//! The file is written after each commit and not waited for, so after a loss of power it may say less than the store
//! does, and never more.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Where that file is.
#[derive(Debug, Clone)]
pub(crate) struct Witness {
    pub(crate) path: PathBuf,
    /// Without the file nothing vouches for the store. Not so where others open it too, each with a file of its own.
    pub(crate) alone: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) epoch: String,
    pub(crate) sequence: u64,
    /// Of this file, which a copy of it does not have: it is as old as the copy of the store beside it.
    inode: u64,
}

/// How far the file may be behind at the moment of a SIGKILL: one transaction, whose batches and their events are fewer.
const BEHIND: u64 = 10_000;

impl Witness {
    pub(crate) fn seen(&self) -> Option<Seen> {
        let file = File::open(&self.path).ok()?;
        let inode = file.metadata().ok()?.ino();
        parse(&io::read_to_string(file).ok()?).filter(|seen| seen.inode == inode)
    }

    /// None where the store has everything that was seen of it. Else the sequence from which it goes on: past all that
    /// anybody may have been told by the one that was lost. `now` is in seconds of the epoch.
    pub(crate) fn goes_on_from(&self, epoch: &str, sequence: u64, now: u64) -> Option<u64> {
        // Nobody knows what was lost. No store commits once a second for all of its life, so the clock is past it.
        let Some(seen) = self.seen() else { return self.alone.then(|| sequence.max(now)) };
        // Epochs are in the order of their time: a newer one than this process saw is of a restore that another one found.
        let lost = (seen.epoch.as_str(), seen.sequence) > (epoch, sequence);
        lost.then(|| seen.sequence.max(sequence) + BEHIND)
    }

    /// From now on the store is this one.
    pub(crate) fn keep(&self, epoch: &str, sequence: u64) -> io::Result<Keeper> {
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&self.path)?;
        let inode = file.metadata()?.ino();
        let keeper = Keeper { file, path: self.path.clone(), epoch: epoch.to_owned(), inode };
        keeper.write(sequence)?;
        keeper.file.sync_all()?;
        Ok(keeper)
    }
}

/// Writes the file while the store is open.
#[derive(Debug)]
pub(crate) struct Keeper {
    file: File,
    path: PathBuf,
    epoch: String,
    inode: u64,
}

impl Keeper {
    fn write(&self, sequence: u64) -> io::Result<()> {
        // Of one width, so that it is written over in place, also on a full disk.
        self.file.write_all_at(format!("{} {sequence:020} {:020}\n", self.epoch, self.inode).as_bytes(), 0)
    }

    /// Not waited for, and no reason to refuse a commit: it is on disk already.
    pub(crate) fn advance(&self, sequence: u64) {
        if let Err(error) = self.write(sequence) {
            tracing::warn!(file = %self.path.display(), %error, "what was committed can't be noted beside the store");
        }
    }
}

fn parse(text: &str) -> Option<Seen> {
    let mut words = text.strip_suffix('\n')?.split(' ');
    let (epoch, sequence, inode) = (words.next()?, words.next()?, words.next()?);
    let number = |word: &str| word.parse().ok();
    let seen = Seen { epoch: epoch.to_owned(), sequence: number(sequence)?, inode: number(inode)? };
    words.next().is_none().then_some(seen)
}

/// Beside the store's file.
pub(crate) fn beside(store: &Path) -> PathBuf {
    store.with_extension("seen")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn witness(folder: &Path, alone: bool) -> Witness {
        Witness { path: folder.join("store.seen"), alone }
    }

    #[test]
    fn a_store_that_saw_less_goes_on_past_what_was_lost() {
        let folder = tempfile::tempdir().unwrap();
        let own = witness(folder.path(), true);
        assert_eq!(own.goes_on_from("e1", 40, 1_000), Some(1_000), "nothing vouches for it");
        let keeper = own.keep("e1", 40).unwrap();
        assert_eq!(own.goes_on_from("e1", 40, 1_000), None);
        assert_eq!(own.goes_on_from("e1", 41, 1_000), None, "killed before the file was written");
        keeper.advance(90);
        assert_eq!(own.goes_on_from("e1", 40, 1_000), Some(90 + BEHIND), "an older copy");
        assert_eq!(own.goes_on_from("e0", 95, 1_000), Some(95 + BEHIND), "of an earlier life");
        assert_eq!(own.goes_on_from("e2", 90, 1_000), None, "killed after it was restored");
    }

    #[test]
    fn a_file_that_was_copied_along_vouches_for_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let own = witness(folder.path(), true);
        own.keep("e1", 40).unwrap();
        let copy = folder.path().join("copy");
        std::fs::copy(&own.path, &copy).unwrap();
        std::fs::rename(&copy, &own.path).unwrap();
        assert_eq!(own.goes_on_from("e1", 40, 1_000), Some(1_000));
        assert_eq!(own.goes_on_from("e1", 4_000, 1_000), Some(4_000));
    }

    #[test]
    fn where_others_open_it_too_a_new_one_of_them_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let replica = witness(folder.path(), false);
        assert_eq!(replica.goes_on_from("e1", 40, 1_000), None);
        replica.keep("e1", 50).unwrap();
        assert_eq!(replica.goes_on_from("e1", 49, 1_000), Some(50 + BEHIND));
        assert_eq!(replica.goes_on_from("e2", 49, 1_000), None, "another one found the restore");
    }

    #[test]
    fn a_file_that_is_torn_vouches_for_nothing() {
        let whole = "e1 00000000000000000040 00000000000000000007\n";
        assert!(parse(whole).is_some());
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), None, "{end}");
        }
        assert_eq!(parse("e1 x 7\n"), None);
        assert_eq!(parse("e1 40 7 9\n"), None);
    }
}
