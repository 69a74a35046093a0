//! The seal of the audit records: a chain of hashes, each over a record, its sequence, and the hash before it.
//!
//! Records are sealed in the order of their sequence, some at a time, in documents of their own; the head says up to
//! where. Of several replicas one seals: the head's version fences the others. Who could write the tables could write
//! the chain anew as well, so the head is published, and what was published is compared with.

#[cfg(test)]
pub(crate) mod tests;

use std::cmp::Ordering;
use std::collections::VecDeque;

use kiln_model::digest::Digest;
use serde::{Deserialize, Serialize};

use crate::batch::{AuditRecord, Batch, Change};
use crate::document::{decode, encode};
use crate::{Error, Store};

/// Kind of the documents that hold the hashes, by the sequence of the last record that each seals.
pub const SEAL: &str = "audit_seal";
/// Kind of the one document that says up to where records are sealed.
pub const HEAD: &str = "audit_head";
pub const HEAD_ID: &str = "head";
const SCHEMA: u32 = 1;

/// Records under one seal.
const AT_ONCE: u32 = 200;
/// Seals, and records, that one look takes in.
const SEALS: u32 = 50;
const RECORDS: u32 = 500;

/// A place in the chain: the record of this sequence, and the hash up to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub sequence: u64,
    pub hash: Digest,
}

impl Link {
    /// Before the first record.
    pub fn start() -> Self {
        Self { sequence: 0, hash: Digest::of(b"kiln audit") }
    }

    /// # Errors
    /// [`Error::Unreadable`] where the record has no JSON form.
    pub fn then(&self, sequence: u64, record: &AuditRecord) -> Result<Self, Error> {
        let hash = Digest::of_json(&(self.hash, sequence, record)).map_err(|error| Error::Unreadable {
            kind: "audit".to_owned(),
            id: sequence.to_string(),
            reason: error.to_string(),
        })?;
        Ok(Self { sequence, hash })
    }
}

/// Up to where records are sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub link: Link,
    /// Sealed so far.
    pub records: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Seal {
    links: Vec<Link>,
}

/// The next seal, to be committed.
#[derive(Debug)]
pub struct Sealing {
    pub batch: Batch,
    pub head: Head,
    /// Of the head's document, once it is committed.
    pub version: u64,
}

fn seal_id(sequence: u64) -> String {
    // Of one width, so that the order of ids is that of sequences.
    format!("{sequence:020}")
}

async fn head<S: Store>(store: &S) -> Result<(Head, u64), Error> {
    match store.get(HEAD, HEAD_ID).await? {
        Some(document) => Ok((decode(&document, SCHEMA)?, document.version)),
        None => Ok((Head { link: Link::start(), records: 0 }, 0)),
    }
}

/// What is to be committed to seal the oldest records that are not sealed; none where all are. Sequences are in the
/// order of commits, so none appears behind the head later.
///
/// # Errors
/// Where the store can't be read.
pub async fn next<S: Store>(store: &S) -> Result<Option<Sealing>, Error> {
    let (mut head, version) = head(store).await?;
    let mut links = Vec::new();
    for (sequence, record) in store.audit_after(head.link.sequence, AT_ONCE).await? {
        head.link = head.link.then(sequence, &record)?;
        head.records += 1;
        links.push(head.link);
    }
    if links.is_empty() {
        return Ok(None);
    }
    let put = |kind: &str, id: &str, expected, body| Change::Put {
        kind: kind.to_owned(),
        id: id.to_owned(),
        expected,
        schema: SCHEMA,
        body,
    };
    let id = seal_id(head.link.sequence);
    let changes = vec![
        put(SEAL, &id, 0, encode(SEAL, &id, &Seal { links })?),
        put(HEAD, HEAD_ID, version, encode(HEAD, HEAD_ID, &head)?),
    ];
    let batch = Batch { changes, ..Batch::default() };
    Ok(Some(Sealing { batch, head, version: version + 1 }))
}

/// The first record that does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub sequence: u64,
    pub kind: FaultKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The record, or its seal, is not as it was sealed.
    Altered,
    /// It was sealed and is not there.
    Missing,
    /// Later ones are sealed and it is not: it was added, or its seal was taken away.
    Unsealed,
}

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// Up to here the records fit; go on from it.
    pub reached: Link,
    pub records: u64,
    pub fault: Option<Fault>,
    /// There are more to be looked at.
    pub more: bool,
    /// Records behind the head, which wait for their seal.
    pub unsealed: u64,
}

/// Compares the records after a link with their seals, some at a time, up to a sequence (0 for all).
///
/// # Errors
/// Where the store can't be read.
pub async fn check<S: Store>(store: &S, from: Link, until: u64) -> Result<Checked, Error> {
    // In this order: what is sealed meanwhile lies behind the head.
    let (head, _) = head(store).await?;
    let documents = store.list(SEAL, "", Some(&seal_id(from.sequence)), SEALS).await?;
    let records = store.audit_after(from.sequence, RECORDS).await?;
    let full = (documents.len() >= SEALS as usize, records.len() >= RECORDS as usize);
    let mut links = Vec::new();
    for document in &documents {
        links.extend(decode::<Seal>(document, SCHEMA)?.links);
    }
    let bound = if until == 0 { head.link.sequence } else { until.min(head.link.sequence) };
    let is_asked = |sequence: u64| sequence > from.sequence && sequence <= bound;
    links.retain(|link| is_asked(link.sequence));
    let unsealed = records.iter().filter(|(sequence, _)| *sequence > head.link.sequence).count() as u64;
    let records = records.into_iter().filter(|(sequence, _)| is_asked(*sequence)).collect();
    let mut checked = compare(from, links, records, full)?;
    checked.unsealed = unsealed;
    checked.more &= checked.reached.sequence < bound;
    if checked.more && checked.reached == from {
        // Seals that hold no link past their place: nobody wrote such a one.
        checked.more = false;
        checked.fault = Some(Fault { sequence: bound, kind: FaultKind::Altered });
    }
    // The newest seals were taken away with their records, and the head was not; or it was changed.
    let is_at_end = !checked.more && checked.fault.is_none() && bound == head.link.sequence;
    if is_at_end && checked.reached != head.link {
        let kind = match checked.reached.sequence == bound {
            true => FaultKind::Altered,
            false => FaultKind::Missing,
        };
        checked.fault = Some(Fault { sequence: bound, kind });
    }
    Ok(checked)
}

/// `full` says of links and records that there may be more than were read.
fn compare(
    from: Link,
    links: Vec<Link>,
    mut records: VecDeque<(u64, AuditRecord)>,
    full: (bool, bool),
) -> Result<Checked, Error> {
    let (more_links, more_records) = full;
    let mut reached = from;
    let mut count = 0;
    let done = |reached, records, fault, more| Ok(Checked { reached, records, fault, more, unsealed: 0 });
    for sealed in links {
        let Some((sequence, record)) = records.pop_front() else {
            if more_records {
                return done(reached, count, None, true);
            }
            let fault = Fault { sequence: sealed.sequence, kind: FaultKind::Missing };
            return done(reached, count, Some(fault), false);
        };
        let (at, kind) = match sequence.cmp(&sealed.sequence) {
            Ordering::Less => (sequence, FaultKind::Unsealed),
            Ordering::Greater => (sealed.sequence, FaultKind::Missing),
            Ordering::Equal => (sequence, FaultKind::Altered),
        };
        let next = reached.then(sequence, &record)?;
        if next != sealed {
            return done(reached, count, Some(Fault { sequence: at, kind }), false);
        }
        reached = next;
        count += 1;
    }
    match records.pop_front() {
        Some((sequence, _)) if !more_links => {
            done(reached, count, Some(Fault { sequence, kind: FaultKind::Unsealed }), false)
        }
        _ => done(reached, count, None, more_links || more_records),
    }
}
