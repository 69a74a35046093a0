//! State is the truth, events are hints: every loop that an event wakes also runs by itself.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};

use crate::shutdown::requested;

/// The first pause after a run that failed.
const RETRY: Duration = Duration::from_millis(250);

/// Runs `work` at once, then whenever woken and at the latest `period` after its last end, never twice at a time. A
/// wake during a run is kept for after it. A run that failed is tried again with growing pauses. Returns when told to
/// stop; a run that began is finished.
pub async fn every<E, W>(
    period: Duration,
    mut stop: watch::Receiver<bool>,
    wake: Arc<Notify>,
    mut work: impl FnMut() -> W,
) where
    W: Future<Output = Result<(), E>>,
    E: Display,
{
    let mut failures = 0;
    while !*stop.borrow() {
        let pause = match work().await {
            Ok(()) => {
                failures = 0;
                period
            }
            Err(error) => {
                let pause = period.min(RETRY * 2_u32.pow(failures.min(6)));
                failures += 1;
                tracing::warn!(%error, again_in = ?pause, "could not bring the state up to date");
                pause
            }
        };
        tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            () = wake.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Wakes on every commit of a store.
pub async fn wake_on_commit(mut sequence: watch::Receiver<u64>, wake: Arc<Notify>) {
    while sequence.changed().await.is_ok() {
        wake.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn it_runs_at_boot_by_period_when_woken_and_not_after_the_stop() {
        let (stop, stopped) = watch::channel(false);
        let (wake, runs) = (Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)));
        let start = Instant::now();
        let task = tokio::spawn({
            let (wake, runs) = (wake.clone(), runs.clone());
            async move {
                every(Duration::from_secs(30), stopped, wake, || {
                    runs.fetch_add(1, Ordering::SeqCst);
                    std::future::ready(Ok::<_, String>(()))
                })
                .await;
            }
        });
        tokio::time::sleep_until(start + Duration::from_secs(1)).await;
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        wake.notify_one();
        tokio::time::sleep_until(start + Duration::from_secs(2)).await;
        assert_eq!(runs.load(Ordering::SeqCst), 2);
        tokio::time::sleep_until(start + Duration::from_secs(32)).await;
        assert_eq!(runs.load(Ordering::SeqCst), 3);
        stop.send_replace(true);
        task.await.unwrap();
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_run_is_tried_again_soon() {
        let (_stop, stopped) = watch::channel(false);
        let runs = Arc::new(AtomicU32::new(0));
        let counted = runs.clone();
        let work = every(Duration::from_secs(30), stopped, Arc::default(), move || {
            counted.fetch_add(1, Ordering::SeqCst);
            std::future::ready(Err("away"))
        });
        assert!(tokio::time::timeout(Duration::from_secs(1), work).await.is_err());
        // At 0, 250 and 750 ms.
        assert_eq!(runs.load(Ordering::SeqCst), 3);
    }
}
