//! The replicas of a service that share a store: who is there, and whose each piece of work is.
//!
//! Each says in a document of its own that it is there, over and over. Whoever has not seen that document change for a
//! while, by its own steady clock, takes the work over: no clock is compared with another machine's. For a moment two may
//! take the same work for theirs, so this only shares it out; versions, leases and generations are what keeps it right.

mod roster;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_model::event::Service;
use kiln_store::{Batch, Change, Document, Error, Store, decode, encode};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::client;
use crate::clock::Clock;
use crate::config::Site;
use crate::requests::new_id;
use crate::shutdown::requested;

use roster::Roster;
pub use roster::owner;

/// Document kind of a replica, by the id of its run.
pub const KIND: &str = "member";
const SCHEMA: u32 = 1;

/// How often a replica says that it is there, and looks who else is.
const BEAT: Duration = Duration::from_millis(500);
/// How long a replica may be silent before its work is others'. With the look that finds it and what it then has to read,
/// that is less than 5 s.
const SILENCE: Duration = Duration::from_secs(3);
/// After which the document of a replica that was killed is removed.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Replicas of one service. Who comes later does its work and is not seen.
const MOST: u32 = 100;

/// A replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub id: String,
    /// Where it answers calls; empty where that is nobody's business.
    pub address: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Said {
    address: String,
}

/// The members of a service of a site, among them this process: others than it there are only where the store is shared.
///
/// # Errors
/// Where the store refuses.
pub async fn of_site<S: Store, C: Clock>(
    site: &Site,
    service: Service,
    store: S,
    clock: C,
) -> Result<(Members, Option<Heart<S, C>>), Error> {
    let id = new_id();
    if site.store.is_none() {
        return Ok((Members::alone(&id), None));
    }
    let address = client::own_address(site, service);
    let (members, heart) = Members::join(store, clock, Member { id, address }).await?;
    Ok((members, Some(heart)))
}

/// Keeps a replica among the members until told to stop; nothing to do where there are none.
pub async fn stay<S: Store, C: Clock>(heart: Option<Heart<S, C>>, stop: watch::Receiver<bool>) {
    if let Some(heart) = heart {
        heart.run(stop).await;
    }
}

/// Who is there. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Members {
    id: Arc<str>,
    /// None where nobody shares the store.
    roster: Option<Arc<Mutex<Roster>>>,
    changes: watch::Receiver<u64>,
    /// Held by all, so that nobody who waits for a change is told of an end.
    told: Arc<watch::Sender<u64>>,
}

impl Members {
    /// One process has the store for itself. `id` is of this run of it, as in all that follows.
    pub fn alone(id: &str) -> Self {
        Self::new(id, None)
    }

    fn new(id: &str, roster: Option<Roster>) -> Self {
        let (told, changes) = watch::channel(0);
        let roster = roster.map(|roster| Arc::new(Mutex::new(roster)));
        Self { id: id.into(), roster, changes, told: Arc::new(told) }
    }

    /// Joins those that share this store; they know of it when this returns.
    ///
    /// # Errors
    /// Where the store refuses.
    pub async fn join<S: Store, C: Clock>(
        store: S,
        clock: C,
        me: Member,
    ) -> Result<(Self, Heart<S, C>), Error> {
        let members = Self::new(&me.id, Some(Roster::default()));
        let mut heart = Heart { members: members.clone(), store, clock, address: me.address, version: 0 };
        heart.beat().await?;
        Ok((members, heart))
    }

    /// This run of this process.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether a piece of work is this replica's now. Each piece has one owner among those that are there; when one comes
    /// or goes, only what it gets or had changes hands.
    pub fn is_mine(&self, work: &str, now: Duration) -> bool {
        self.roster().is_none_or(|roster| roster.is_owner(&self.id, work, now))
    }

    /// Nobody shares the store.
    pub fn is_alone(&self) -> bool {
        self.roster.is_none()
    }

    /// Whether a run of a process is there, as far as is known.
    pub fn is_there(&self, id: &str) -> bool {
        *self.id == *id || self.roster().is_some_and(|roster| roster.is_there(id))
    }

    /// The others that are there.
    pub fn others(&self) -> Vec<Member> {
        self.roster().map(|roster| roster.there()).unwrap_or_default()
    }

    /// Wakes when someone came or went: what is whose is to be asked anew.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }

    fn roster(&self) -> Option<MutexGuard<'_, Roster>> {
        // No code that can panic runs under the lock.
        self.roster.as_ref().map(|roster| roster.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// What keeps a replica among the members.
#[derive(Debug)]
pub struct Heart<S, C> {
    members: Members,
    store: S,
    clock: C,
    address: String,
    /// Of the own document.
    version: u64,
}

impl<S: Store, C: Clock> Heart<S, C> {
    /// Beats until told to stop; then the others have its work at once.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        while !*stop.borrow() {
            tokio::select! {
                biased;
                () = requested(&mut stop) => break,
                () = self.clock.sleep(BEAT) => {}
            }
            if let Err(error) = self.beat().await {
                tracing::warn!(%error, "the other replicas can't be told that this one is there");
            }
        }
        if let Err(error) = self.write(Self::leaves).await {
            tracing::debug!(%error, "the other replicas find out by themselves that this one is gone");
        }
    }

    async fn beat(&mut self) -> Result<(), Error> {
        let body = encode(KIND, &self.members.id, &Said { address: self.address.clone() })?;
        let (kind, schema) = (|| KIND.to_owned(), SCHEMA);
        self.write(|id, expected| Change::Put { kind: kind(), id, expected, schema, body: body.clone() })
            .await?;
        let said_at = self.clock.now().monotonic;
        let listed = self.store.list(KIND, "", None, MOST).await?;
        let others = listed.iter().filter(|document| *document.id != *self.members.id).map(said).collect();
        let heard =
            self.members.roster().map(|mut roster| roster.beat(others, said_at, self.clock.now().monotonic));
        let (changed, silent) = heard.unwrap_or_default();
        if changed {
            self.members.told.send_modify(|times| *times += 1);
        }
        for (id, version) in silent {
            let delete = Change::Delete { kind: KIND.to_owned(), id, expected: version };
            match self.store.commit(Batch { changes: vec![delete], ..Batch::default() }).await {
                // Another one was first, or it has come back.
                Ok(_) | Err(Error::Conflict { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn leaves(id: String, expected: u64) -> Change {
        Change::Delete { kind: KIND.to_owned(), id, expected }
    }

    /// Changes the own document, which others may have removed meanwhile.
    async fn write(&mut self, change: impl Fn(String, u64) -> Change) -> Result<(), Error> {
        let id = self.members.id.to_string();
        loop {
            let changes = vec![change(id.clone(), self.version)];
            match self.store.commit(Batch { changes, ..Batch::default() }).await {
                Ok(_) => {
                    self.version += 1;
                    return Ok(());
                }
                Err(Error::Conflict { actual, .. }) if actual != self.version => self.version = actual,
                Err(error) => return Err(error),
            }
        }
    }
}

/// Another replica, with the version of what it said.
fn said(document: &Document) -> (Member, u64) {
    let address = match decode::<Said>(document, SCHEMA) {
        Ok(Said { address }) => address,
        // One of a newer version of Kiln is there all the same.
        Err(error) => {
            tracing::debug!(%error, "where another replica is can't be read");
            String::new()
        }
    };
    (Member { id: document.id.clone(), address }, document.version)
}
