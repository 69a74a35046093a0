//! Builds' logs: bounded files, and who waits for their next line.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_model::name::{BuildId, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio::sync::watch;

use crate::collect::{Collected, How};

/// What a build may write; a loop that prints fills no disk.
const MAX_LOG: u64 = 8 << 20;
const MAX_LINE: usize = 4096;
/// Logs of a server's newest builds that are kept.
const KEPT: usize = 50;
/// Lines that a failed build's document carries.
pub const LAST_LINES: usize = 30;

/// Every log of the builder. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Logs {
    folder: PathBuf,
    open: Arc<Mutex<HashMap<BuildId, Arc<watch::Sender<u64>>>>>,
}

/// One build's log, open for writing. It ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Writer {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    /// None where the disk refuses: a build does not fail for its log.
    file: Option<File>,
    length: u64,
    last: std::collections::VecDeque<String>,
    grown: Arc<watch::Sender<u64>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every section leaves the value whole, so one that panicked does no harm.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Logs {
    /// # Errors
    /// The folder can't be made.
    pub fn open(folder: PathBuf) -> std::io::Result<Self> {
        std::fs::create_dir_all(&folder)?;
        Ok(Self { folder, open: Arc::default() })
    }

    fn path(&self, build: &BuildId) -> PathBuf {
        self.folder.join(format!("{build}.log"))
    }

    fn growth(&self, build: &BuildId) -> Arc<watch::Sender<u64>> {
        let mut open = held(&self.open);
        // Senders that only this map holds are of logs that nobody writes or reads.
        open.retain(|id, sender| id == build || Arc::strong_count(sender) > 1);
        open.entry(build.clone()).or_insert_with(|| Arc::new(watch::Sender::new(0))).clone()
    }

    /// Removes the logs of older builds; not those that somebody writes or reads.
    ///
    /// # Errors
    /// The folder can't be read.
    pub fn prune(&self, how: How) -> std::io::Result<Collected> {
        let mut builds: BTreeMap<ServerName, BTreeSet<u64>> = BTreeMap::new();
        for item in std::fs::read_dir(&self.folder)? {
            let name = item?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".log")?.parse::<BuildId>().ok());
            if let Some(BuildId { server, number }) = id {
                builds.entry(server).or_default().insert(number);
            }
        }
        let mut collected = Collected::new("logs of old builds");
        let open = held(&self.open);
        for (server, numbers) in builds {
            for number in numbers.into_iter().rev().skip(KEPT) {
                let build = BuildId { server: server.clone(), number };
                let is_open = open.get(&build).is_some_and(|sender| Arc::strong_count(sender) > 1);
                if !is_open {
                    let path = self.path(&build);
                    let bytes = std::fs::metadata(&path)?.len();
                    if how == How::Remove {
                        std::fs::remove_file(path)?;
                    }
                    collected.add(1, bytes);
                }
            }
        }
        Ok(collected)
    }

    /// Goes on with a build's log.
    pub fn writer(&self, build: &BuildId) -> Writer {
        let opened = File::options().create(true).append(true).open(self.path(build));
        let file =
            opened.inspect_err(|error| tracing::warn!(%build, %error, "its log can't be written")).ok();
        let length = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        let inner =
            Inner { file, length, last: std::collections::VecDeque::new(), grown: self.growth(build) };
        Writer { inner: Arc::new(Mutex::new(inner)) }
    }

    /// A build's log from its beginning.
    pub fn reader(&self, build: &BuildId) -> Reader {
        let growth = self.growth(build);
        Reader {
            path: self.path(build),
            position: 0,
            rest: Vec::new(),
            growth: growth.subscribe(),
            _open: growth,
        }
    }
}

impl Writer {
    /// Adds a line. What is not text or too long is cut to what is.
    pub fn line(&self, line: &str) {
        let mut line: String = line.trim_end().chars().filter(|c| *c == '\t' || !c.is_control()).collect();
        if line.len() > MAX_LINE {
            line.truncate(line.floor_char_boundary(MAX_LINE));
            line.push('…');
        }
        let mut inner = held(&self.inner);
        if inner.last.len() == LAST_LINES {
            inner.last.pop_front();
        }
        inner.last.push_back(line.clone());
        if inner.length >= MAX_LOG {
            return;
        }
        line.push('\n');
        if inner.length + line.len() as u64 >= MAX_LOG {
            line = format!("… the log is longer than {} MiB, and ends here\n", MAX_LOG >> 20);
            inner.length = MAX_LOG;
        } else {
            inner.length += line.len() as u64;
        }
        if let Some(file) = &mut inner.file
            && let Err(error) = file.write_all(line.as_bytes())
        {
            tracing::warn!(%error, "a build's log ends here");
            inner.file = None;
        }
        let length = inner.length;
        inner.grown.send_replace(length);
    }

    /// The newest lines.
    pub fn last_lines(&self) -> Vec<String> {
        held(&self.inner).last.iter().cloned().collect()
    }
}

/// Reads a log as it grows.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    position: u64,
    /// A line whose end was not written yet.
    rest: Vec<u8>,
    growth: watch::Receiver<u64>,
    _open: Arc<watch::Sender<u64>>,
}

impl Reader {
    /// The lines that came since the last call; bounded, so empty only where there are none.
    ///
    /// # Errors
    /// The log is there and can't be read.
    pub async fn lines(&mut self) -> std::io::Result<Vec<String>> {
        self.growth.borrow_and_update();
        let mut file = match tokio::fs::File::open(&self.path).await {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        file.seek(std::io::SeekFrom::Start(self.position)).await?;
        let mut lines = Vec::new();
        while lines.is_empty() {
            let read = (&mut file).take(256 << 10).read_to_end(&mut self.rest).await?;
            if read == 0 {
                break;
            }
            self.position += read as u64;
            // Once for all lines: what is taken off the front one by one is moved once for each.
            let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else { continue };
            let rest = self.rest.split_off(end + 1);
            let whole = std::mem::replace(&mut self.rest, rest);
            let ended = whole.strip_suffix(b"\n").unwrap_or(&whole).split(|byte| *byte == b'\n');
            lines.extend(ended.map(|line| String::from_utf8_lossy(line.trim_ascii_end()).into_owned()));
        }
        Ok(lines)
    }

    /// Waits until there may be more.
    pub async fn grown(&mut self) {
        if self.growth.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs() -> (tempfile::TempDir, Logs, BuildId) {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::open(folder.path().join("logs")).unwrap();
        (folder, logs, "web-b1".parse().unwrap())
    }

    #[tokio::test]
    async fn a_reader_sees_what_was_and_what_comes() {
        let (_folder, logs, build) = logs();
        let mut reader = logs.reader(&build);
        assert!(reader.lines().await.unwrap().is_empty());
        let writer = logs.writer(&build);
        writer.line("one");
        writer.line("two \u{1b}[31mred\r");
        reader.grown().await;
        assert_eq!(reader.lines().await.unwrap(), ["one", "two [31mred"]);
        drop(writer);
        // The process that comes next goes on with it.
        logs.writer(&build).line("three");
        assert_eq!(reader.lines().await.unwrap(), ["three"]);
        assert_eq!(logs.reader(&build).lines().await.unwrap().len(), 3);
    }

    #[tokio::test]
    async fn the_newest_logs_and_those_in_use_are_kept() {
        let (_folder, logs, first) = logs();
        let _in_use = logs.writer(&first);
        for number in 2..=60 {
            logs.writer(&format!("web-b{number}").parse().unwrap()).line("x");
        }
        logs.writer(&"db-b1".parse().unwrap()).line("another server's");
        assert_eq!(logs.prune(How::Look).unwrap().count, 9);
        assert_eq!(logs.prune(How::Remove).unwrap().count, 9);
        let is_there = |id: &str| logs.path(&id.parse().unwrap()).exists();
        assert!(is_there("web-b1") && !is_there("web-b2") && !is_there("web-b10"));
        assert!(is_there("web-b11") && is_there("web-b60") && is_there("db-b1"));
        assert_eq!(logs.prune(How::Remove).unwrap().count, 0);
    }

    #[tokio::test]
    async fn a_log_is_bounded_and_its_last_lines_are_kept() {
        let (_folder, logs, build) = logs();
        let writer = logs.writer(&build);
        for number in 0..5000 {
            writer.line(&format!("{number} {}", "x".repeat(5000)));
        }
        let size = std::fs::metadata(logs.path(&build)).unwrap().len();
        assert!(size <= MAX_LOG + 128, "{size}");
        let last = writer.last_lines();
        assert_eq!(last.len(), LAST_LINES);
        assert!(last[LAST_LINES - 1].starts_with("4999 "));
        let mut reader = logs.reader(&build);
        let mut newest = String::new();
        loop {
            let lines = reader.lines().await.unwrap();
            let Some(line) = lines.last() else { break };
            newest.clone_from(line);
        }
        assert!(newest.contains("ends here"), "{newest}");
    }
}
