//! Waiting with a bound.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

/// How many pieces a wait is cut into.
const PIECES: u32 = 10;

/// What a future gives, or nothing if that takes longer than `limit`.
///
/// A node that is stopped for a while, by a signal or with its machine, wakes behind all of its deadlines. So the wait is
/// in pieces, of which such a while can use up only the one that was running: what came meanwhile is taken then.
pub(crate) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..PIECES {
        if let Ok(output) = tokio::time::timeout(limit / PIECES, &mut future).await {
            return Some(output);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    #[tokio::test(start_paused = true)]
    async fn what_comes_too_late_is_not_waited_for() {
        assert_eq!(within(LIMIT, sleep(LIMIT * 9 / 10)).await, Some(()));
        assert_eq!(within(LIMIT, sleep(LIMIT * 11 / 10)).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_while_in_which_nothing_runs_does_not_count() {
        let stages = async {
            sleep(LIMIT / 20).await;
            // As the whole process: it stands still, and the time goes on.
            advance(LIMIT * 2).await;
            // What came meanwhile takes a few turns of the loop to be seen.
            sleep(LIMIT / 20).await;
        };
        assert_eq!(within(LIMIT, stages).await, Some(()));
    }
}
