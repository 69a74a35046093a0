//! One transaction of the writer, and what a batch does in it.

use jiff::Timestamp;
use kiln_model::event::{Event, NewEvent};

use crate::batch::{AuditRecord, Batch, Change, StoredAnswer, Watermark};
use crate::connection::Value;
use crate::rows::{self, Version, number};
use crate::session::Session;
use crate::{Committed, Error, KEEP_EVENTS, KEEP_TOMBSTONES, sql};

/// Why a job did not succeed: by the store's rules, which concerns it alone, or by the database, which concerns all that
/// share the transaction.
enum Failure {
    Refused(Error),
    Broken(Error),
}

/// What is not refused by name is a failure of the database.
impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Broken(error)
    }
}

pub(crate) struct Transaction<'a> {
    session: Session<'a>,
    epoch: &'a str,
    /// Of the store, with what this transaction wrote so far.
    sequence: u64,
}

impl<'a> Transaction<'a> {
    /// Of a session whose transaction has begun, at this sequence.
    pub(crate) fn new(session: Session<'a>, epoch: &'a str, sequence: u64) -> Self {
        Self { session, epoch, sequence }
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    pub(crate) async fn end(&mut self) -> Result<(), Error> {
        let sequence = self.sequence.to_string();
        self.session.set_meta("sequence", &sequence).await?;
        let ended = self.session.script("COMMIT").await;
        if self.session.is_lost() {
            // The answer is lost, the commit may be not.
            return ended.map_err(|error| error.and("whether it was written is not known"));
        }
        ended
    }

    /// Whether the connection can be used again.
    pub(crate) async fn abandon(&mut self) -> bool {
        self.session.abandon().await
    }

    /// Does what a batch says, or nothing of it where it is refused.
    ///
    /// # Errors
    /// Where the transaction as a whole can't go on.
    pub(crate) async fn apply(&mut self, batch: Batch) -> Result<Result<Committed, Error>, Error> {
        let before = self.sequence;
        self.session.script("SAVEPOINT batch").await?;
        match self.commit(batch).await {
            Ok(committed) => {
                self.session.script("RELEASE SAVEPOINT batch").await?;
                Ok(Ok(committed))
            }
            Err(Failure::Refused(error)) => {
                self.sequence = before;
                self.session.script("ROLLBACK TO SAVEPOINT batch; RELEASE SAVEPOINT batch").await?;
                Ok(Err(error))
            }
            Err(Failure::Broken(error)) => Err(error),
        }
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
        let request = Value::Text(answer.request.as_str());
        if self.session.one(sql::ANSWER_GET, &[request], |_| Ok(())).await?.is_some() {
            return Err(Failure::Refused(Error::Answered(answer.request)));
        }
        let digest = answer.request_digest.to_string();
        let values = [request, Value::Text(&digest), Value::Bytes(&answer.answer), now()];
        self.session.execute(sql::ANSWER_ADD, &values).await?;
        Ok(())
    }

    async fn advance(&mut self, watermark: Watermark) -> Result<(), Failure> {
        let Watermark { source_kind, source_id, version } = watermark;
        let source = [Value::Text(&source_kind), Value::Text(&source_id)];
        let stands = self.session.one(sql::WATERMARK_GET, &source, |row| rows::unsigned(row, "version"));
        if stands.await?.unwrap_or(0) >= version {
            return Err(Failure::Refused(Error::Stale { source_kind, source_id, version }));
        }
        let [kind, id] = source;
        self.session.execute(sql::WATERMARK_SET, &[kind, id, number(version)]).await?;
        Ok(())
    }

    async fn version(&mut self, kind: &str, id: &str) -> Result<Version, Failure> {
        let key = [Value::Text(kind), Value::Text(id)];
        let found = self.session.one(sql::DOCUMENT_STATE, &key, rows::version).await?;
        Ok(found.unwrap_or(Version::NONE))
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
        let (kind, id) = (Value::Text(kind), Value::Text(id));
        let (next, sequence) = (number(found.last + 1), number(self.sequence));
        match &change {
            Change::Put { schema, body, .. } => {
                let body = body.to_string();
                let values = [kind, id, next, sequence, number((*schema).into()), Value::Text(&body)];
                self.session.execute(sql::DOCUMENT_WRITE, &values).await?;
            }
            // What does not exist leaves no tombstone.
            Change::Delete { .. } if expected == 0 => {}
            Change::Delete { .. } => {
                self.session.execute(sql::DOCUMENT_BURY, &[kind, id, next, sequence, now()]).await?;
            }
        }
        Ok(())
    }

    async fn append(&mut self, event: NewEvent, sequence: u64) -> Result<Event, Failure> {
        let aggregate = [
            Value::Text(&event.aggregate_kind),
            Value::Text(&event.aggregate_id),
            number(event.aggregate_version),
        ];
        let next = self.session.one(sql::EVENT_NEXT_INDEX, &aggregate, |row| rows::unsigned(row, "next"));
        let place = next.await?.unwrap_or(0);
        let id = Event::id_of(self.epoch, &event, usize::try_from(place).unwrap_or(0));
        let (id_text, time) = (id.to_string(), event.time.to_string());
        let [kind, aggregate_id, version] = aggregate;
        let values = [
            number(sequence),
            Value::Text(&id_text),
            kind,
            aggregate_id,
            version,
            number(place),
            Value::Text(event.kind.service.as_str()),
            Value::Text(&event.kind.entity),
            Value::Text(&event.kind.verb),
            Value::TextOrNull(event.server.as_ref().map(|server| server.as_str())),
            Value::Bytes(&event.payload),
            Value::Text(&time),
            Value::Text(&event.traceparent),
            now(),
        ];
        self.session.execute(sql::EVENT_ADD, &values).await?;
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
        let time = record.time.to_string();
        let values = [
            number(sequence),
            Value::Text(&time),
            Value::Text(&record.actor),
            Value::Text(&record.action),
            Value::Text(&record.subject),
            Value::TextOrNull(record.request_id.as_ref().map(|request| request.as_str())),
            Value::Text(&body),
        ];
        self.session.execute(sql::AUDIT_ADD, &values).await?;
        Ok(())
    }

    pub(crate) async fn mark_sent(&mut self, sequences: &[u64]) -> Result<(), Error> {
        for sequence in sequences {
            self.session.execute(sql::EVENT_SENT, &[number(*sequence), now()]).await?;
        }
        Ok(())
    }

    pub(crate) async fn prune(&mut self, now: Timestamp) -> Result<u64, Error> {
        let before = |age| Value::Number(now.checked_sub(age).unwrap_or(Timestamp::MIN).as_millisecond());
        let (events, tombstones) = (before(KEEP_EVENTS), before(KEEP_TOMBSTONES));
        let bound = &[tombstones];
        let newest = self.session.one(sql::NEWEST_PRUNABLE, bound, |row| rows::unsigned(row, "newest"));
        if let Some(newest) = newest.await?
            && newest > 0
        {
            // Tombstones are dropped by age, which may not follow their order: the horizon never goes back.
            let horizon = newest.max(self.session.meta_number("horizon").await?);
            self.session.set_meta("horizon", &horizon.to_string()).await?;
        }
        let mut dropped = 0;
        for (statement, bound) in
            [(sql::PRUNE_EVENTS, events), (sql::PRUNE_ANSWERS, events), (sql::PRUNE_TOMBSTONES, tombstones)]
        {
            dropped += self.session.execute(statement, &[bound]).await?;
        }
        Ok(dropped)
    }
}

fn now() -> Value<'static> {
    Value::Number(Timestamp::now().as_millisecond())
}

fn conflict(kind: String, id: String, expected: u64, actual: u64) -> Failure {
    Failure::Refused(Error::Conflict { kind, id, expected, actual })
}
