//! What is read from files, and read again when they change: a renewed certificate, a revoked token. Nobody restarts.

use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A file that is asked for often is looked at no more often than this, and only when it is asked for.
const LOOK: Duration = Duration::from_millis(500);

type Read<T> = Box<dyn Fn(&[PathBuf]) -> Result<T, String> + Send + Sync>;

/// The value of some files. They are replaced by a rename, so each is seen whole.
pub(crate) struct Reloaded<T> {
    paths: Vec<PathBuf>,
    read: Read<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    value: Arc<T>,
    stamps: Vec<Stamp>,
    looked: Option<Instant>,
}

/// Of a file. Changes whenever that is replaced: the new one has another inode, or another time where that is used anew.
pub type Stamp = Option<(u64, u64, i64, i64)>;

/// None where there is no file.
pub fn stamp(path: &PathBuf) -> Stamp {
    let found = std::fs::metadata(path).ok()?;
    Some((found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
}

impl<T> Reloaded<T> {
    /// # Errors
    /// Where the files can't be read now. Later, what was read last stays until they can.
    pub(crate) fn new(
        paths: Vec<PathBuf>,
        read: impl Fn(&[PathBuf]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        // Before the reading: what changes in between is read again.
        let stamps = paths.iter().map(stamp).collect();
        let value = Arc::new(read(&paths)?);
        let state = Mutex::new(State { value, stamps, looked: Some(Instant::now()) });
        Ok(Self { paths, read: Box::new(read), state })
    }

    /// What the files hold now, or held when they could last be read.
    pub(crate) fn get(&self) -> Arc<T> {
        self.looked_at_within(LOOK)
    }

    /// As [`Reloaded::get`], and looked at whenever that was done last: for what is asked seldom, and where a change must
    /// not be waited for.
    pub(crate) fn now(&self) -> Arc<T> {
        self.looked_at_within(Duration::ZERO)
    }

    fn looked_at_within(&self, pause: Duration) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.is_none_or(|looked| looked.elapsed() >= pause) {
            state.looked = Some(Instant::now());
            let stamps: Vec<_> = self.paths.iter().map(stamp).collect();
            if stamps != state.stamps {
                state.stamps = stamps;
                let names = || self.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
                match (self.read)(&self.paths) {
                    Ok(value) => {
                        tracing::info!(files = ?names(), "read anew");
                        state.value = Arc::new(value);
                    }
                    Err(error) => {
                        tracing::error!(%error, files = ?names(), "can't be read anew; what was read last stays")
                    }
                }
            }
        }
        Arc::clone(&state.value)
    }
}

impl<T: Default> Reloaded<T> {
    /// Read for the first time when it is asked for.
    pub(crate) fn empty(
        paths: Vec<PathBuf>,
        read: impl Fn(&[PathBuf]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Self {
        // No file has this stamp, not even one that is missing.
        let stamps = vec![Some((0, 0, 0, 0)); paths.len()];
        let state = Mutex::new(State { value: Arc::default(), stamps, looked: None });
        Self { paths, read: Box::new(read), state }
    }
}

impl<T> fmt::Debug for Reloaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloaded").field("paths", &self.paths).finish_non_exhaustive()
    }
}

/// # Errors
/// Names the file.
pub(crate) fn text(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| unreadable(path, &error))
}

pub(crate) fn unreadable(path: &Path, error: &std::io::Error) -> String {
    format!("can't read {}: {error}", path.display())
}
