//! The one task that writes: it takes whatever batches wait and gives them one transaction, so that a burst shares one
//! wait for the disk. Each batch has a savepoint of its own: one that conflicts is undone, the others stand.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};

use crate::batch::Batch;
use crate::connection::Connection;
use crate::seen::Keeper;
use crate::session::{Backend, Session, failure};
use crate::transaction::Transaction;
use crate::{Committed, Error};

/// Batches in one transaction. Above it the wait for the disk is a small part already.
const GROUP: usize = 128;

/// What fails where it fails.
const WHAT: &str = "commit";

type Reply<T> = oneshot::Sender<Result<T, Error>>;

pub(crate) enum Job {
    Commit(Box<Batch>, Reply<Committed>),
    MarkSent(Vec<u64>, Reply<()>),
    Prune(Timestamp, Reply<u64>),
}

/// What a job came to, kept back until the transaction is on disk.
enum Outcome {
    Commit(Reply<Committed>, Result<Committed, Error>),
    MarkSent(Reply<()>),
    Prune(Reply<u64>, u64),
}

pub(crate) struct Writer {
    /// None after a failure that left its state unknown; made anew for the next job.
    connection: Option<Box<dyn Connection>>,
    backend: Arc<dyn Backend>,
    epoch: String,
    announce: Arc<watch::Sender<u64>>,
    keeper: Option<Keeper>,
}

impl Writer {
    pub(crate) fn new(
        connection: Box<dyn Connection>,
        backend: Arc<dyn Backend>,
        epoch: String,
        announce: Arc<watch::Sender<u64>>,
        keeper: Option<Keeper>,
    ) -> Self {
        Self { connection: Some(connection), backend, epoch, announce, keeper }
    }

    /// Ends when every handle of the store is gone.
    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        let mut jobs = Vec::with_capacity(GROUP);
        while queue.recv_many(&mut jobs, GROUP).await > 0 {
            self.group(std::mem::take(&mut jobs)).await;
        }
    }

    async fn group(&mut self, jobs: Vec<Job>) {
        let (mut connection, before) = match self.begin().await {
            Ok(begun) => begun,
            Err(error) => return refuse_all(jobs, &error),
        };
        let session = Session::new(&mut *connection, &*self.backend, WHAT);
        let mut transaction = Transaction::new(session, &self.epoch, before);
        let mut outcomes = Vec::with_capacity(jobs.len());
        let mut broken = None;
        let mut jobs = jobs.into_iter();
        for job in jobs.by_ref() {
            match apply(&mut transaction, job).await {
                Ok(outcome) => outcomes.push(outcome),
                Err((outcome, error)) => {
                    outcomes.push(outcome);
                    broken = Some(error);
                    break;
                }
            }
        }
        let ended = match broken {
            None => transaction.end().await,
            Some(error) => Err(error),
        };
        let sequence = transaction.sequence();
        match ended {
            Ok(()) => {
                if let Some(keeper) = self.keeper.as_ref().filter(|_| sequence > before) {
                    keeper.advance(sequence);
                }
                advance(&self.announce, sequence);
                for outcome in outcomes {
                    outcome.tell();
                }
                if sequence == before || tell(&*self.backend, &mut *connection, sequence).await {
                    self.connection = Some(connection);
                }
            }
            Err(error) => {
                if transaction.abandon().await {
                    self.connection = Some(connection);
                }
                for outcome in outcomes {
                    outcome.fail(&error);
                }
                refuse_all(jobs, &error);
            }
        }
    }

    /// A connection whose transaction has begun, with the sequence that stands.
    async fn begin(&mut self) -> Result<(Box<dyn Connection>, u64), Error> {
        if let Some(mut kept) = self.connection.take() {
            let mut session = Session::new(&mut *kept, &*self.backend, WHAT);
            match session.begin().await {
                Ok(found) => {
                    let sequence = self.same_store(found)?;
                    return Ok((kept, sequence));
                }
                // The database went, and is back maybe. Nothing had begun that could be half done.
                Err(_) if session.is_lost() => {}
                Err(error) => return Err(error),
            }
        }
        let connected = self.backend.connect().await;
        let mut connection = connected.map_err(|error| failure(&*self.backend, WHAT, &error))?;
        let found = Session::new(&mut *connection, &*self.backend, WHAT).begin().await?;
        let sequence = self.same_store(found)?;
        Ok((connection, sequence))
    }

    /// The sequence of a store that is still the one that was opened: what was decided on another one must not be written
    /// into this. A connection that is dropped with an error takes its transaction with it.
    fn same_store(&self, (epoch, sequence): (String, u64)) -> Result<u64, Error> {
        if epoch == self.epoch && sequence >= *self.announce.borrow() {
            return Ok(sequence);
        }
        let reason = "it was restored while this service ran: restart the service, and stop all of them before a restore";
        Err(Error::Unavailable {
            what: WHAT,
            place: self.backend.place().to_owned(),
            reason: reason.to_owned(),
        })
    }
}

/// Whether the connection can be used again. What others are not told they find by themselves, a little later.
async fn tell(backend: &dyn Backend, connection: &mut dyn Connection, sequence: u64) -> bool {
    let told = backend.tell(connection, sequence).await;
    if let Err(error) = &told {
        tracing::warn!(%error, "could not tell the other replicas of a commit");
    }
    told.is_ok()
}

/// The sequence as it is known in this process only grows, whoever finds it first.
pub(crate) fn advance(announce: &watch::Sender<u64>, sequence: u64) {
    announce.send_if_modified(|known| {
        let is_newer = sequence > *known;
        *known = sequence.max(*known);
        is_newer
    });
}

/// # Errors
/// Where the transaction as a whole can't go on: with whom to tell.
async fn apply(transaction: &mut Transaction<'_>, job: Job) -> Result<Outcome, (Outcome, Error)> {
    match job {
        Job::Commit(batch, reply) => match transaction.apply(*batch).await {
            Ok(result) => Ok(Outcome::Commit(reply, result)),
            Err(error) => Err((Outcome::Commit(reply, Err(same(&error))), error)),
        },
        Job::MarkSent(sequences, reply) => match transaction.mark_sent(&sequences).await {
            Ok(()) => Ok(Outcome::MarkSent(reply)),
            Err(error) => Err((Outcome::MarkSent(reply), error)),
        },
        Job::Prune(now, reply) => match transaction.prune(now).await {
            Ok(count) => Ok(Outcome::Prune(reply, count)),
            Err(error) => Err((Outcome::Prune(reply, 0), error)),
        },
    }
}

fn same(error: &Error) -> Error {
    match error {
        Error::Unavailable { what, place, reason } => {
            Error::Unavailable { what, place: place.clone(), reason: reason.clone() }
        }
        other => Error::Unavailable { what: WHAT, place: String::new(), reason: other.to_string() },
    }
}

fn refuse_all(jobs: impl IntoIterator<Item = Job>, error: &Error) {
    for job in jobs {
        // A caller that went away wants no answer.
        match job {
            Job::Commit(_, reply) => drop(reply.send(Err(same(error)))),
            Job::MarkSent(_, reply) => drop(reply.send(Err(same(error)))),
            Job::Prune(_, reply) => drop(reply.send(Err(same(error)))),
        }
    }
}

impl Outcome {
    fn tell(self) {
        match self {
            Self::Commit(reply, result) => drop(reply.send(result)),
            Self::MarkSent(reply) => drop(reply.send(Ok(()))),
            Self::Prune(reply, count) => drop(reply.send(Ok(count))),
        }
    }

    fn fail(self, error: &Error) {
        match self {
            // It was refused by what other batches, which are undone now, had written: only trying again can tell.
            Self::Commit(reply, _) => drop(reply.send(Err(same(error)))),
            Self::MarkSent(reply) => drop(reply.send(Err(same(error)))),
            Self::Prune(reply, _) => drop(reply.send(Err(same(error)))),
        }
    }
}
