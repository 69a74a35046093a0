//! Work that holds a thread.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::task::{JoinError, spawn_blocking};

/// Does on a thread of its own what would keep the loops waiting: hashing, unpacking, many files.
///
/// On a runtime of one thread it is done in place. There the order in which things happen is the order of the loops, and
/// a simulation goes the same way twice; another thread would come back whenever it likes.
///
/// # Errors
/// Where the work panicked.
pub async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::CurrentThread => Ok(work()),
        _ => spawn_blocking(work).await,
    }
}
