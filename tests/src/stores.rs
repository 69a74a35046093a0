//! What the services of a site keep, past the services themselves.

use std::path::Path;

use kiln_model::event::Service;
use kiln_service::config;
use kiln_store::{Database, Place, copy_out};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _};

use crate::Result;
use crate::site::{DATABASE, Site};

/// Where a store is: its epoch, and how far in that.
#[derive(Debug, PartialEq, Eq)]
pub struct Position {
    pub epoch: String,
    pub sequence: String,
}

/// One text, or bytes, with its table and column.
#[derive(Debug)]
pub struct Cell {
    pub place: String,
    pub content: Vec<u8>,
}

impl Site {
    fn place(&self, service: Service) -> Result<Place> {
        Ok(config::Site::load(self.home())?.store_of(service)?)
    }

    /// Takes the site down with all of its state, as if the machine were another one. The folder can be made again.
    ///
    /// # Errors
    /// What `kiln down` said, or the database.
    pub fn erase(&self) -> Result<()> {
        let places: Vec<_> = Service::ALL.into_iter().map(|it| self.place(it)).collect::<Result<_>>()?;
        self.kiln(&["down", "--delete-state"])?;
        for place in places {
            if let Place::Postgres(database) = place {
                self.drop_schema(&database)?;
            }
        }
        Ok(())
    }

    fn drop_schema(&self, database: &Database) -> Result<()> {
        let statement = format!("DROP SCHEMA {} CASCADE", database.schema);
        self.with_database(|server| server.psql(DATABASE, &statement).map(drop))
    }

    /// Changes the store of a service behind its back. For sites whose state is in files.
    ///
    /// # Errors
    /// Where the file refuses.
    pub async fn change_store(&self, service: &str, statement: &str) -> Result<()> {
        let path = self.home().join(service).join("store.db");
        let mut link = SqliteConnectOptions::new().filename(path).connect().await?;
        sqlx::raw_sql(AssertSqlSafe(statement.to_owned())).execute(&mut link).await?;
        Ok(link.close().await?)
    }

    /// Where the store of a service is.
    ///
    /// # Errors
    /// Where the file or the database refuses.
    pub async fn position(&self, service: Service) -> Result<Position> {
        let asked = |table: &str| {
            let value = "SELECT CAST(value AS TEXT) FROM";
            format!("{value} {table} WHERE name IN ('epoch', 'sequence') ORDER BY name")
        };
        let found: Vec<String> = match self.place(service)? {
            Place::File(path) => {
                let mut link = SqliteConnectOptions::new().filename(path).connect().await?;
                let found = sqlx::query_scalar(AssertSqlSafe(asked("meta"))).fetch_all(&mut link).await?;
                link.close().await?;
                found
            }
            Place::Postgres(database) => {
                let asked = asked(&format!("{}.meta", database.schema));
                let told = self.with_database(|server| server.psql(DATABASE, &asked))?;
                told.lines().map(str::to_owned).collect()
            }
        };
        let [epoch, sequence] = <[String; 2]>::try_from(found).map_err(|it| format!("{it:?}"))?;
        Ok(Position { epoch, sequence })
    }

    /// Whether a service keeps its state in PostgreSQL.
    ///
    /// # Errors
    /// Where `site.toml` can't be read.
    pub fn is_in_database(&self, service: Service) -> Result<bool> {
        Ok(matches!(self.place(service)?, Place::Postgres(_)))
    }

    /// Writes what a service keeps in PostgreSQL to a file, as `pg_dump` does.
    ///
    /// # Errors
    /// Where its state is elsewhere, or what the server says.
    pub fn dump_store(&self, service: Service, to: &Path) -> Result<()> {
        let database = self.schema_of(service)?;
        self.with_database(|server| server.dump(DATABASE, &database.schema, to))
    }

    /// Puts such a file in the place of what a service keeps. Nobody may have it open.
    ///
    /// # Errors
    /// Where its state is elsewhere, or what the server says.
    pub fn put_back_store(&self, service: Service, from: &Path) -> Result<()> {
        self.drop_schema(&self.schema_of(service)?)?;
        self.with_database(|server| server.psql_file(DATABASE, from))
    }

    fn schema_of(&self, service: Service) -> Result<Database> {
        match self.place(service)? {
            Place::Postgres(database) => Ok(database),
            Place::File(path) => Err(format!("its state is in {}", path.display()).into()),
        }
    }

    /// Every text and all bytes that a service keeps. In the files of its store they may be in pieces, or compressed.
    ///
    /// # Errors
    /// Where the store can't be read.
    pub async fn cells(&self, service: Service) -> Result<Vec<Cell>> {
        let folder = tempfile::tempdir()?;
        let copy = folder.path().join("store.db");
        copy_out(&self.place(service)?, &copy).await?;
        cells(&copy).await
    }
}

/// As [`Site::cells`], of an SQLite file.
///
/// # Errors
/// Where it can't be read.
pub async fn cells(store: &Path) -> Result<Vec<Cell>> {
    let mut link = SqliteConnectOptions::new().filename(store).connect().await?;
    let asked = "SELECT t.name, c.name FROM pragma_table_list t, pragma_table_info(t.name) c \
                 WHERE t.schema = 'main' AND t.type = 'table'";
    let columns: Vec<(String, String)> = sqlx::query_as(asked).fetch_all(&mut link).await?;
    let mut cells = Vec::new();
    for (table, column) in columns {
        let asked = format!(
            "SELECT CAST(\"{column}\" AS BLOB) FROM \"{table}\" WHERE typeof(\"{column}\") IN ('text', 'blob')"
        );
        let found: Vec<Vec<u8>> = sqlx::query_scalar(AssertSqlSafe(asked)).fetch_all(&mut link).await?;
        let place = format!("{table}.{column}");
        cells.extend(found.into_iter().map(|content| Cell { place: place.clone(), content }));
    }
    link.close().await?;
    Ok(cells)
}
