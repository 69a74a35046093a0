//! A connection to a database as a store needs it, whatever the database is.

use std::marker::PhantomData;
use std::ops::{ControlFlow, DerefMut};
use std::time::Duration;

use async_trait::async_trait;
use futures::TryStreamExt as _;
use sqlx::{Arguments as _, ColumnIndex, Database, Decode, Encode, Executor, IntoArguments, Type};

/// What is put in the place of `$1`, `$2` and so on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'a> {
    Number(i64),
    NumberOrNull(Option<i64>),
    Text(&'a str),
    TextOrNull(Option<&'a str>),
    Bytes(&'a [u8]),
}

/// A row of an answer, by the names of its columns.
pub(crate) trait Row {
    fn number(&self, column: &'static str) -> Result<Option<i64>, sqlx::Error>;
    fn text(&self, column: &'static str) -> Result<Option<&str>, sqlx::Error>;
    fn bytes(&self, column: &'static str) -> Result<Option<&[u8]>, sqlx::Error>;
}

/// Looks at one row after another until it breaks off.
pub(crate) type Look<'a> = dyn FnMut(&dyn Row) -> ControlFlow<()> + Send + 'a;

#[async_trait]
pub(crate) trait Connection: Send {
    /// Runs statements without values, one after another.
    async fn script(&mut self, statements: &'static str) -> Result<(), sqlx::Error>;

    /// Runs a statement, and returns how many rows it changed.
    async fn execute(&mut self, statement: &'static str, values: &[Value<'_>]) -> Result<u64, sqlx::Error>;

    async fn fetch(
        &mut self,
        statement: &'static str,
        values: &[Value<'_>],
        look: &mut Look<'_>,
    ) -> Result<(), sqlx::Error>;
}

/// A connection of sqlx: `C` is it, boxed or out of a pool.
pub(crate) struct Link<DB, C> {
    connection: C,
    /// On each wait for an answer.
    bound: Option<Duration>,
    database: PhantomData<fn() -> DB>,
}

impl<DB, C> Link<DB, C> {
    pub(crate) fn new(connection: C, bound: Option<Duration>) -> Self {
        Self { connection, bound, database: PhantomData }
    }
}

async fn within<T>(
    bound: Option<Duration>,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    let Some(bound) = bound else { return work.await };
    tokio::time::timeout(bound, work).await.unwrap_or_else(|_| {
        let reason = format!("no answer within {} s", bound.as_secs());
        Err(std::io::Error::new(std::io::ErrorKind::TimedOut, reason).into())
    })
}

fn arguments<DB: Database>(values: &[Value<'_>]) -> Result<DB::Arguments, sqlx::Error>
where
    for<'v> i64: Encode<'v, DB> + Type<DB>,
    for<'v> Option<i64>: Encode<'v, DB> + Type<DB>,
    for<'v> &'v str: Encode<'v, DB> + Type<DB>,
    for<'v> Option<&'v str>: Encode<'v, DB> + Type<DB>,
    for<'v> &'v [u8]: Encode<'v, DB> + Type<DB>,
{
    let mut arguments = DB::Arguments::default();
    for value in values {
        match *value {
            Value::Number(number) => arguments.add(number),
            Value::NumberOrNull(number) => arguments.add(number),
            Value::Text(text) => arguments.add(text),
            Value::TextOrNull(text) => arguments.add(text),
            Value::Bytes(bytes) => arguments.add(bytes),
        }
        .map_err(sqlx::Error::Encode)?;
    }
    Ok(arguments)
}

#[async_trait]
impl<DB, C> Connection for Link<DB, C>
where
    DB: Database<Row: Row, Arguments: IntoArguments<DB>>,
    DB::QueryResult: Changed,
    C: DerefMut<Target = DB::Connection> + Send,
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    for<'v> i64: Encode<'v, DB> + Type<DB>,
    for<'v> Option<i64>: Encode<'v, DB> + Type<DB>,
    for<'v> &'v str: Encode<'v, DB> + Type<DB>,
    for<'v> Option<&'v str>: Encode<'v, DB> + Type<DB>,
    for<'v> &'v [u8]: Encode<'v, DB> + Type<DB>,
{
    async fn script(&mut self, statements: &'static str) -> Result<(), sqlx::Error> {
        within(self.bound, (&mut *self.connection).execute(sqlx::raw_sql(statements))).await.map(drop)
    }

    async fn execute(&mut self, statement: &'static str, values: &[Value<'_>]) -> Result<u64, sqlx::Error> {
        let query = sqlx::query_with::<DB, _>(statement, arguments::<DB>(values)?);
        let done = within(self.bound, (&mut *self.connection).execute(query)).await?;
        Ok(done.rows())
    }

    async fn fetch(
        &mut self,
        statement: &'static str,
        values: &[Value<'_>],
        look: &mut Look<'_>,
    ) -> Result<(), sqlx::Error> {
        let query = sqlx::query_with::<DB, _>(statement, arguments::<DB>(values)?);
        let mut rows = (&mut *self.connection).fetch(query);
        while let Some(row) = within(self.bound, rows.try_next()).await? {
            if look(&row).is_break() {
                break;
            }
        }
        Ok(())
    }
}

/// How many rows a statement changed: each database of sqlx says so in a type of its own.
pub(crate) trait Changed {
    fn rows(&self) -> u64;
}

impl Changed for sqlx::sqlite::SqliteQueryResult {
    fn rows(&self) -> u64 {
        self.rows_affected()
    }
}

impl Changed for sqlx::postgres::PgQueryResult {
    fn rows(&self) -> u64 {
        self.rows_affected()
    }
}

impl<R: sqlx::Row> Row for R
where
    &'static str: ColumnIndex<R>,
    for<'r> i64: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> &'r str: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> &'r [u8]: Decode<'r, R::Database> + Type<R::Database>,
{
    fn number(&self, column: &'static str) -> Result<Option<i64>, sqlx::Error> {
        self.try_get(column)
    }

    fn text(&self, column: &'static str) -> Result<Option<&str>, sqlx::Error> {
        self.try_get(column)
    }

    fn bytes(&self, column: &'static str) -> Result<Option<&[u8]>, sqlx::Error> {
        self.try_get(column)
    }
}
