//! Whether a file is whole, before anything is decided on it.
//!
//! SQLite itself finds a missing page when it comes to it, which may be in the middle of a rollout. A look
//! at the length of the file and its log tells of those; a file whose log was left behind, by SIGKILL or a loss of power,
//! is read through as well.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};

use super::BUSY;
use crate::Error;

pub(super) const ADVICE: &str = "the file is damaged; stop Kiln with `kiln down --keep-instances`, remove its log (`-wal`) \
     and index (`-shm`), put a copy of the file in its place, and start it with `kiln up`";

/// # Errors
/// [`Error::Unavailable`] where it is not whole, with what to do.
pub(super) async fn look_for(path: &Path) -> Result<(), Error> {
    let problem = match problem(path).await {
        Ok(problem) => problem,
        Err(sqlx::Error::Database(said)) if said.code().is_some_and(|code| is_damage(&code)) => {
            Some(said.to_string())
        }
        // What else keeps it from being read is said where it is opened.
        Err(_) => None,
    };
    let Some(problem) = problem else { return Ok(()) };
    let (place, reason) = (path.display().to_string(), format!("{ADVICE} ({problem})"));
    Err(Error::Unavailable { what: "open", place, reason })
}

/// The primary codes SQLITE_CORRUPT and SQLITE_NOTADB; extended ones carry them in their low byte.
fn is_damage(code: &str) -> bool {
    code.parse::<i32>().is_ok_and(|code| [11, 26].contains(&(code & 0xff)))
}

async fn problem(path: &Path) -> Result<Option<String>, sqlx::Error> {
    let log = path.with_extension("db-wal");
    if let Some(problem) = cut_short(path, &log)? {
        return Ok(Some(problem));
    }
    if log.metadata().map_or(true, |log| log.len() == 0) {
        return Ok(None);
    }
    let options = SqliteConnectOptions::new().filename(path).create_if_missing(false).busy_timeout(BUSY);
    let mut connection = options.disable_statement_logging().connect().await?;
    let said: String = sqlx::query_scalar("PRAGMA quick_check(1)").fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok((said != "ok").then_some(said))
}

/// Pages of the file that are neither in it nor in its log. Where a copy of the log into the file was cut off, the file's
/// first page counts pages that are still in the log alone.
fn cut_short(path: &Path, log: &Path) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    // A new file. One that was emptied is found by what was seen of it.
    if length == 0 {
        return Ok(None);
    }
    let mut head = [0; 32];
    if file.read_exact(&mut head).is_err() {
        return Ok(Some(format!("it has {length} bytes")));
    }
    let size = match u16::from_be_bytes([head[16], head[17]]) {
        1 => 65_536,
        size => u64::from(size),
    };
    let count = u64::from(u32::from_be_bytes([head[28], head[29], head[30], head[31]]));
    // What is no page size is no file of SQLite's, which it says itself.
    let there = length.checked_div(size).unwrap_or(count);
    if there >= count {
        return Ok(None);
    }
    let logged = logged(log, size)?;
    let missing = (there + 1..=count).filter(|page| !logged.contains(page)).count();
    Ok((missing > 0)
        .then(|| format!("it has {length} bytes, and {missing} of its {count} pages are missing")))
}

/// The numbers of the pages that a log holds: a head of 32 bytes, then pages, each with a head of 24 that begins with its
/// number.
fn logged(path: &Path, size: u64) -> io::Result<BTreeSet<u64>> {
    let mut pages = BTreeSet::new();
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(pages),
        opened => opened?,
    };
    let length = file.metadata()?.len();
    let mut at = 32;
    while at + 24 + size <= length {
        let mut number = [0; 4];
        file.read_exact_at(&mut number, at)?;
        pages.insert(u64::from(u32::from_be_bytes(number)));
        at += 24 + size;
    }
    Ok(pages)
}
