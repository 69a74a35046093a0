//! Work on a connection, with what fails said in words.

use std::ops::ControlFlow;

use async_trait::async_trait;

use crate::connection::{Connection, Row, Value};
use crate::layout::Migration;
use crate::seen::Witness;
use crate::{Error, sql};

/// A database that can hold a store.
#[async_trait]
pub(crate) trait Backend: Send + Sync + 'static {
    /// Where the store is, for people. Holds no secret.
    fn place(&self) -> &str;

    /// A connection for the writer.
    async fn connect(&self) -> Result<Box<dyn Connection>, sqlx::Error>;

    /// One of the few connections that read.
    async fn reader(&self) -> Result<Box<dyn Connection>, sqlx::Error>;

    /// Begins a transaction that waits for whoever writes, so that sequences are in the order of commits.
    fn begin(&self) -> &'static str;

    /// What a person can do about an error.
    fn advice(&self, error: &sqlx::Error) -> Option<&'static str>;

    /// What is there before the first layout: the table `meta`.
    fn foundation(&self) -> &'static str;

    fn migrations(&self) -> &'static [Migration];

    /// What was seen of the store before; none for one that ends with its handles.
    fn witness(&self) -> Option<&Witness>;

    /// Tells the other replicas of a store where it stands now, after a commit.
    async fn tell(&self, connection: &mut dyn Connection, sequence: u64) -> Result<(), sqlx::Error>;
}

pub(crate) fn failure(backend: &dyn Backend, what: &'static str, error: &sqlx::Error) -> Error {
    let reason = match backend.advice(error) {
        Some(advice) => format!("{advice} ({error})"),
        None => error.to_string(),
    };
    Error::Unavailable { what, place: backend.place().to_owned(), reason }
}

/// The connection is of no use any more. SQLite's codes are numbers; these are PostgreSQL's.
fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            error.code().is_some_and(|code| ["08", "57P", "25P03"].iter().any(|lost| code.starts_with(lost)))
        }
        other => matches!(
            other,
            sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed
        ),
    }
}

pub(crate) struct Session<'a> {
    connection: &'a mut dyn Connection,
    backend: &'a dyn Backend,
    what: &'static str,
    is_lost: bool,
}

impl<'a> Session<'a> {
    /// `what` is what fails where it fails: `read`, `commit`.
    pub(crate) fn new(
        connection: &'a mut dyn Connection,
        backend: &'a dyn Backend,
        what: &'static str,
    ) -> Self {
        Self { connection, backend, what, is_lost: false }
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.is_lost
    }

    fn checked<T>(&mut self, result: Result<T, sqlx::Error>) -> Result<T, Error> {
        result.map_err(|error| {
            self.is_lost |= is_lost(&error);
            failure(self.backend, self.what, &error)
        })
    }

    /// Begins a transaction behind whoever writes, and reads the epoch and the sequence that stand then.
    pub(crate) async fn begin(&mut self) -> Result<(String, u64), Error> {
        self.script(self.backend.begin()).await?;
        let mut epoch = String::new();
        let mut sequence = 0;
        self.each(sql::META_IDENTITY, &[], |row| {
            match crate::rows::text(row, "name")? {
                "epoch" => crate::rows::text(row, "value")?.clone_into(&mut epoch),
                name => sequence = number(name, crate::rows::text(row, "value")?)?,
            }
            Ok(ControlFlow::Continue(()))
        })
        .await?;
        Ok((epoch, sequence))
    }

    /// Whether the connection can be used again. A full disk makes SQLite roll back by itself, and then there is nothing
    /// to roll back.
    pub(crate) async fn abandon(&mut self) -> bool {
        if self.is_lost {
            return false;
        }
        match self.script("ROLLBACK").await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "the store's connection is made anew");
                false
            }
        }
    }

    pub(crate) async fn script(&mut self, statements: &'static str) -> Result<(), Error> {
        let done = self.connection.script(statements).await;
        self.checked(done)
    }

    pub(crate) async fn execute(
        &mut self,
        statement: &'static str,
        values: &[Value<'_>],
    ) -> Result<u64, Error> {
        let done = self.connection.execute(statement, values).await;
        self.checked(done)
    }

    /// Goes through the rows until `take` breaks off.
    pub(crate) async fn each(
        &mut self,
        statement: &'static str,
        values: &[Value<'_>],
        mut take: impl FnMut(&dyn Row) -> Result<ControlFlow<()>, Error> + Send,
    ) -> Result<(), Error> {
        let mut taken = Ok(());
        let done = self
            .connection
            .fetch(statement, values, &mut |row| match take(row) {
                Ok(flow) => flow,
                Err(error) => {
                    taken = Err(error);
                    ControlFlow::Break(())
                }
            })
            .await;
        self.checked(done)?;
        taken
    }

    pub(crate) async fn all<T: Send>(
        &mut self,
        statement: &'static str,
        values: &[Value<'_>],
        mut read: impl FnMut(&dyn Row) -> Result<T, Error> + Send,
    ) -> Result<Vec<T>, Error> {
        let mut found = Vec::new();
        self.each(statement, values, |row| {
            found.push(read(row)?);
            Ok(ControlFlow::Continue(()))
        })
        .await?;
        Ok(found)
    }

    pub(crate) async fn one<T: Send>(
        &mut self,
        statement: &'static str,
        values: &[Value<'_>],
        read: impl FnMut(&dyn Row) -> Result<T, Error> + Send,
    ) -> Result<Option<T>, Error> {
        Ok(self.all(statement, values, read).await?.pop())
    }

    pub(crate) async fn meta(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        let values = [Value::Text(name)];
        self.one(sql::META_GET, &values, |row| crate::rows::text(row, "value").map(str::to_owned)).await
    }

    /// A number of the table `meta`; 0 where it is not there.
    pub(crate) async fn meta_number(&mut self, name: &'static str) -> Result<u64, Error> {
        let text = self.meta(name).await?;
        text.map_or(Ok(0), |text| number(name, &text))
    }

    pub(crate) async fn set_meta(&mut self, name: &'static str, value: &str) -> Result<(), Error> {
        self.execute(sql::META_SET, &[Value::Text(name), Value::Text(value)]).await.map(drop)
    }
}

fn number(name: &str, text: &str) -> Result<u64, Error> {
    text.parse().map_err(|_| Error::Unreadable {
        kind: "meta".to_owned(),
        id: name.to_owned(),
        reason: format!("`{text}` is not a number: restore the store from a copy"),
    })
}
