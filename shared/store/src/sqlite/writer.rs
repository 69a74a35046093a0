//! The one task that writes: it takes whatever batches wait and gives them one transaction, so that a burst shares one
//! wait for the disk. Each batch has a savepoint of its own: one that conflicts is undone, the others stand.

use jiff::Timestamp;
use kiln_model::event::{Event, NewEvent};
use sqlx::ConnectOptions as _;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use tokio::sync::{mpsc, oneshot, watch};

use super::rows::{failure, signed, unsigned};
use crate::batch::{AuditRecord, Batch, Change, StoredAnswer, Watermark};
use crate::{Committed, Error, KEEP_EVENTS, KEEP_TOMBSTONES, sql};

/// Batches in one transaction. Above it the wait for the disk is a small part already.
const GROUP: usize = 128;

type Reply<T> = oneshot::Sender<Result<T, Error>>;

pub(super) enum Job {
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

pub(super) struct Writer {
    /// None after a failure that left its state unknown; made anew for the next job.
    connection: Option<SqliteConnection>,
    options: SqliteConnectOptions,
    epoch: String,
    place: String,
    announce: watch::Sender<u64>,
}

/// Why a job did not succeed: by the store's rules, which concerns it alone, or by the disk, which concerns them all.
enum Failure {
    Refused(Error),
    Broken(Error),
}

impl Writer {
    pub(super) fn new(
        connection: SqliteConnection,
        options: SqliteConnectOptions,
        epoch: String,
        place: String,
        announce: watch::Sender<u64>,
    ) -> Self {
        Self { connection: Some(connection), options, epoch, place, announce }
    }

    /// Ends when every handle of the store is gone.
    pub(super) async fn run(mut self, mut queue: mpsc::Receiver<Job>) {
        let mut jobs = Vec::with_capacity(GROUP);
        while queue.recv_many(&mut jobs, GROUP).await > 0 {
            self.group(std::mem::take(&mut jobs)).await;
        }
    }

    async fn group(&mut self, jobs: Vec<Job>) {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => match self.options.connect().await {
                Ok(connection) => connection,
                Err(error) => return refuse_all(jobs, &failure("open", &self.place, &error)),
            },
        };
        let mut transaction =
            Transaction { connection: &mut connection, epoch: &self.epoch, place: &self.place, sequence: 0 };
        if let Err(error) = transaction.begin().await {
            transaction.abandon().await;
            return refuse_all(jobs, &error);
        }
        let mut outcomes = Vec::with_capacity(jobs.len());
        let mut broken = None;
        let mut jobs = jobs.into_iter();
        for job in jobs.by_ref() {
            match transaction.apply(job).await {
                Ok(outcome) => outcomes.push(outcome),
                Err((outcome, error)) => {
                    outcomes.extend(outcome);
                    broken = Some(error);
                    break;
                }
            }
        }
        let ended = match broken {
            None => transaction.end().await,
            Some(error) => Err(error),
        };
        let sequence = transaction.sequence;
        match ended {
            Ok(()) => {
                self.connection = Some(connection);
                self.announce.send_if_modified(|known| std::mem::replace(known, sequence) != sequence);
                for outcome in outcomes {
                    outcome.tell();
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
}

fn same(error: &Error) -> Error {
    match error {
        Error::Unavailable { what, place, reason } => {
            Error::Unavailable { what, place: place.clone(), reason: reason.clone() }
        }
        other => Error::Unavailable { what: "commit", place: String::new(), reason: other.to_string() },
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

struct Transaction<'a> {
    connection: &'a mut SqliteConnection,
    epoch: &'a str,
    place: &'a str,
    /// Of the store, with what this transaction wrote so far.
    sequence: u64,
}

impl Transaction<'_> {
    async fn begin(&mut self) -> Result<(), Error> {
        // IMMEDIATE: a lock that is taken later can't be waited for, since the snapshot would be stale.
        self.execute("BEGIN IMMEDIATE").await?;
        let text: String = sqlx::query_scalar(sql::META_GET)
            .bind("sequence")
            .fetch_one(&mut *self.connection)
            .await
            .map_err(|error| self.broken(&error))?;
        self.sequence = text.parse().map_err(|_| Error::Unreadable {
            kind: "meta".to_owned(),
            id: "sequence".to_owned(),
            reason: format!("`{text}` is not a number"),
        })?;
        Ok(())
    }

    async fn end(&mut self) -> Result<(), Error> {
        self.set_meta("sequence", self.sequence).await?;
        self.execute("COMMIT").await
    }

    /// Whether the connection can be used again. A full disk makes SQLite roll back by itself, and then there is nothing
    /// to roll back.
    async fn abandon(&mut self) -> bool {
        match self.execute("ROLLBACK").await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the store's connection is made anew");
                false
            }
        }
    }

    async fn apply(&mut self, job: Job) -> Result<Outcome, (Option<Outcome>, Error)> {
        match job {
            Job::Commit(batch, reply) => {
                let before = self.sequence;
                if let Err(error) = self.execute("SAVEPOINT batch").await {
                    let outcome = Outcome::Commit(reply, Err(same(&error)));
                    return Err((Some(outcome), error));
                }
                let (result, undo) = match self.commit(*batch).await {
                    Ok(committed) => (Ok(committed), false),
                    Err(Failure::Refused(error)) => (Err(error), true),
                    Err(Failure::Broken(error)) => {
                        return Err((Some(Outcome::Commit(reply, Err(same(&error)))), error));
                    }
                };
                if undo {
                    self.sequence = before;
                }
                let released = if undo {
                    self.execute("ROLLBACK TO batch; RELEASE batch").await
                } else {
                    self.execute("RELEASE batch").await
                };
                match released {
                    Ok(()) => Ok(Outcome::Commit(reply, result)),
                    Err(error) => Err((Some(Outcome::Commit(reply, result)), error)),
                }
            }
            Job::MarkSent(sequences, reply) => match self.mark_sent(&sequences).await {
                Ok(()) => Ok(Outcome::MarkSent(reply)),
                Err(error) => Err((Some(Outcome::MarkSent(reply)), error)),
            },
            Job::Prune(now, reply) => match self.prune(now).await {
                Ok(count) => Ok(Outcome::Prune(reply, count)),
                Err(error) => Err((Some(Outcome::Prune(reply, 0)), error)),
            },
        }
    }

    fn broken(&self, error: &sqlx::Error) -> Error {
        failure("commit", self.place, error)
    }

    async fn execute(&mut self, statement: &'static str) -> Result<(), Error> {
        sqlx::raw_sql(statement).execute(&mut *self.connection).await.map_err(|error| self.broken(&error))?;
        Ok(())
    }

    async fn set_meta(&mut self, name: &str, value: u64) -> Result<(), Error> {
        sqlx::query(sql::META_SET)
            .bind(name)
            .bind(value.to_string())
            .execute(&mut *self.connection)
            .await
            .map_err(|error| self.broken(&error))?;
        Ok(())
    }

    async fn commit(&mut self, batch: Batch) -> Result<Committed, Failure> {
        let Batch { expects, changes, watermarks, events, audit, answer } = batch;
        // Refusals first, from the plainest: a request that was answered, a fact that was handled, a stale read.
        if let Some(answer) = answer {
            self.keep_answer(answer).await?;
        }
        for watermark in watermarks {
            self.advance(watermark).await?;
        }
        for expect in expects {
            let actual = self.version(&expect.kind, &expect.id).await?.live();
            if actual != expect.version {
                return Err(conflict(expect.kind, expect.id, expect.version, actual));
            }
        }
        let (events_len, audit_len) = (events.len(), audit.len());
        let base = self.sequence;
        // Each event and each audit record needs a number of its own; the documents carry the batch's last.
        let steps = events_len.max(audit_len).max(1);
        self.sequence = base + steps as u64;
        for change in changes {
            self.change(change).await?;
        }
        let mut published = Vec::with_capacity(events_len);
        for (event, sequence) in events.into_iter().zip(base + 1..) {
            published.push(self.append(event, sequence).await?);
        }
        for (record, sequence) in audit.into_iter().zip(base + 1..) {
            self.record(&record, sequence).await?;
        }
        Ok(Committed { sequence: self.sequence, events: published })
    }

    async fn keep_answer(&mut self, answer: StoredAnswer) -> Result<(), Failure> {
        let found = sqlx::query(sql::ANSWER_GET)
            .bind(answer.request.as_str())
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        if found.is_some() {
            return Err(Failure::Refused(Error::Answered(answer.request)));
        }
        sqlx::query(sql::ANSWER_ADD)
            .bind(answer.request.as_str())
            .bind(answer.request_digest.to_string())
            .bind(answer.answer)
            .bind(Timestamp::now().as_millisecond())
            .execute(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        Ok(())
    }

    async fn advance(&mut self, watermark: Watermark) -> Result<(), Failure> {
        let Watermark { source_kind, source_id, version } = watermark;
        let stands: Option<i64> = sqlx::query_scalar(sql::WATERMARK_GET)
            .bind(&source_kind)
            .bind(&source_id)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        if stands.map_or(0, unsigned) >= version {
            return Err(Failure::Refused(Error::Stale { source_kind, source_id, version }));
        }
        sqlx::query(sql::WATERMARK_SET)
            .bind(source_kind)
            .bind(source_id)
            .bind(signed(version))
            .execute(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        Ok(())
    }

    async fn version(&mut self, kind: &str, id: &str) -> Result<Version, Failure> {
        let row: Option<(i64, Option<i64>)> = sqlx::query_as(sql::DOCUMENT_STATE)
            .bind(kind)
            .bind(id)
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        Ok(match row {
            None => Version { last: 0, deleted: false },
            Some((version, deleted)) => Version { last: unsigned(version), deleted: deleted.is_some() },
        })
    }

    async fn change(&mut self, change: Change) -> Result<(), Failure> {
        let (kind, id, expected) = match &change {
            Change::Put { kind, id, expected, .. } | Change::Delete { kind, id, expected } => {
                (kind, id, *expected)
            }
        };
        let found = self.version(kind, id).await?;
        if found.live() != expected {
            return Err(conflict(kind.clone(), id.clone(), expected, found.live()));
        }
        let (next, sequence) = (signed(found.last + 1), signed(self.sequence));
        let query = match change {
            Change::Put { kind, id, schema, body, .. } => sqlx::query(sql::DOCUMENT_WRITE)
                .bind(kind)
                .bind(id)
                .bind(next)
                .bind(sequence)
                .bind(schema)
                .bind(body.to_string()),
            // What does not exist leaves no tombstone.
            Change::Delete { .. } if expected == 0 => return Ok(()),
            Change::Delete { kind, id, .. } => sqlx::query(sql::DOCUMENT_BURY)
                .bind(kind)
                .bind(id)
                .bind(next)
                .bind(sequence)
                .bind(Timestamp::now().as_millisecond()),
        };
        query.execute(&mut *self.connection).await.map_err(|error| Failure::Broken(self.broken(&error)))?;
        Ok(())
    }

    async fn append(&mut self, event: NewEvent, sequence: u64) -> Result<Event, Failure> {
        let place: i64 = sqlx::query_scalar(sql::EVENT_NEXT_INDEX)
            .bind(&event.aggregate_kind)
            .bind(&event.aggregate_id)
            .bind(signed(event.aggregate_version))
            .fetch_one(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        let id = Event::id_of(self.epoch, &event, usize::try_from(place).unwrap_or(0));
        sqlx::query(sql::EVENT_ADD)
            .bind(signed(sequence))
            .bind(id.to_string())
            .bind(&event.aggregate_kind)
            .bind(&event.aggregate_id)
            .bind(signed(event.aggregate_version))
            .bind(place)
            .bind(event.kind.service.as_str())
            .bind(&event.kind.entity)
            .bind(&event.kind.verb)
            .bind(event.server.as_ref().map(|server| server.as_str().to_owned()))
            .bind(&event.payload)
            .bind(event.time.to_string())
            .bind(&event.traceparent)
            .bind(Timestamp::now().as_millisecond())
            .execute(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        Ok(Event { id, sequence, epoch: self.epoch.to_owned(), event })
    }

    async fn record(&mut self, record: &AuditRecord, sequence: u64) -> Result<(), Failure> {
        let body = serde_json::to_string(record).map_err(|error| {
            Failure::Refused(Error::Unreadable {
                kind: "audit".to_owned(),
                id: record.subject.clone(),
                reason: error.to_string(),
            })
        })?;
        sqlx::query(sql::AUDIT_ADD)
            .bind(signed(sequence))
            .bind(record.time.to_string())
            .bind(&record.actor)
            .bind(&record.action)
            .bind(&record.subject)
            .bind(record.request_id.as_ref().map(ToString::to_string))
            .bind(body)
            .execute(&mut *self.connection)
            .await
            .map_err(|error| Failure::Broken(self.broken(&error)))?;
        Ok(())
    }

    async fn mark_sent(&mut self, sequences: &[u64]) -> Result<(), Error> {
        for sequence in sequences {
            sqlx::query(sql::EVENT_SENT)
                .bind(signed(*sequence))
                .bind(Timestamp::now().as_millisecond())
                .execute(&mut *self.connection)
                .await
                .map_err(|error| self.broken(&error))?;
        }
        Ok(())
    }

    async fn prune(&mut self, now: Timestamp) -> Result<u64, Error> {
        let before = |age| now.checked_sub(age).unwrap_or(Timestamp::MIN).as_millisecond();
        let (events, tombstones) = (before(KEEP_EVENTS), before(KEEP_TOMBSTONES));
        let newest: i64 = sqlx::query_scalar(sql::NEWEST_PRUNABLE)
            .bind(tombstones)
            .fetch_one(&mut *self.connection)
            .await
            .map_err(|error| self.broken(&error))?;
        if newest > 0 {
            self.raise_horizon(unsigned(newest)).await?;
        }
        let mut dropped = 0;
        for (statement, bound) in
            [(sql::PRUNE_EVENTS, events), (sql::PRUNE_ANSWERS, events), (sql::PRUNE_TOMBSTONES, tombstones)]
        {
            let done = sqlx::query(statement)
                .bind(bound)
                .execute(&mut *self.connection)
                .await
                .map_err(|error| self.broken(&error))?;
            dropped += done.rows_affected();
        }
        Ok(dropped)
    }

    /// Tombstones are dropped by age, which may not follow their order: the horizon never goes back.
    async fn raise_horizon(&mut self, newest: u64) -> Result<(), Error> {
        let stands: Option<String> = sqlx::query_scalar(sql::META_GET)
            .bind("horizon")
            .fetch_optional(&mut *self.connection)
            .await
            .map_err(|error| self.broken(&error))?;
        let stands = stands.and_then(|text| text.parse().ok()).unwrap_or(0);
        self.set_meta("horizon", newest.max(stands)).await
    }
}

/// The last version that a document had, and whether that was its deletion.
struct Version {
    last: u64,
    deleted: bool,
}

impl Version {
    /// As a reader saw it: 0 for what does not exist.
    fn live(&self) -> u64 {
        if self.deleted { 0 } else { self.last }
    }
}

fn conflict(kind: String, id: String, expected: u64, actual: u64) -> Failure {
    Failure::Refused(Error::Conflict { kind, id, expected, actual })
}
