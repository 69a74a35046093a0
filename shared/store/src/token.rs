//! Where a listing of changes stands: what a page token holds.

use crate::Error;
use crate::document::{Cursor, Entry, Page};

/// A listing goes by (sequence, id), so what changes while it is read shows up again further on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) full: bool,
    /// A full listing shows no tombstones, but for those that came while it was read: their documents may have been on
    /// an earlier page.
    pub(crate) tombstones_after: u64,
    pub(crate) sequence: u64,
    pub(crate) id: String,
}

impl Position {
    /// `horizon` is the newest tombstone that was dropped: a cursor from before it can't be told what is gone.
    pub(crate) fn first(since: Option<&Cursor>, epoch: &str, now: u64, horizon: u64) -> Self {
        match since {
            // A sequence that this store never gave comes from a copy that lived longer.
            Some(cursor) if cursor.epoch == epoch && (horizon..=now).contains(&cursor.sequence) => Self {
                full: false,
                tombstones_after: cursor.sequence,
                sequence: cursor.sequence,
                // Past every id of that sequence.
                id: char::MAX.to_string(),
            },
            _ => Self { full: true, tombstones_after: now, sequence: 0, id: String::new() },
        }
    }

    /// `<epoch>/<f|d>/<tombstones after>/<sequence>/<id>`
    pub(crate) fn parse(token: &str, epoch: &str) -> Result<Self, Error> {
        let parse = || {
            let mut parts = token.splitn(5, '/');
            if parts.next()? != epoch {
                return None;
            }
            let full = match parts.next()? {
                "f" => true,
                "d" => false,
                _ => return None,
            };
            // The store's numbers are signed.
            let mut number =
                || parts.next()?.parse::<u64>().ok().filter(|number| i64::try_from(*number).is_ok());
            let (tombstones_after, sequence) = (number()?, number()?);
            Some(Self { full, tombstones_after, sequence, id: parts.next()?.to_owned() })
        };
        parse().ok_or_else(|| Error::BadPageToken(token.chars().take(80).collect()))
    }

    fn token(&self, epoch: &str, last: &Entry) -> String {
        let (sequence, id) = match last {
            Entry::Document(document) => (document.sequence, &document.id),
            Entry::Tombstone { id, sequence, .. } => (*sequence, id),
        };
        let mode = if self.full { "f" } else { "d" };
        format!("{epoch}/{mode}/{}/{sequence}/{id}", self.tombstones_after)
    }

    /// `now` is the store's sequence from before the entries were read.
    pub(crate) fn page(&self, entries: Vec<Entry>, more: bool, epoch: &str, now: u64) -> Page {
        let next_page_token = match entries.last() {
            Some(last) if more => self.token(epoch, last),
            _ => String::new(),
        };
        let cursor = Cursor { epoch: epoch.to_owned(), sequence: now };
        Page { entries, next_page_token, cursor, full: self.full }
    }
}
