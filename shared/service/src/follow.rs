//! Events for as long as a service runs.

use std::time::Duration;

use kiln_bus::Error;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::shutdown::requested;

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Consumes until told to stop. Where the broker is unsuitable, consuming is begun anew after growing pauses: it may be
/// another one by then, and what it would have told is found by the resync.
pub async fn events<W>(mut stop: watch::Receiver<bool>, mut consume: impl FnMut() -> W)
where
    W: Future<Output = Result<(), Error>>,
{
    let mut pause = FIRST_PAUSE;
    while !*stop.borrow() {
        let began = Instant::now();
        let Err(error) = consume().await else { return };
        if began.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        tracing::error!(%error, again_in = ?pause, "events can't be followed; the resync finds what they tell");
        tokio::select! {
            biased;
            () = requested(&mut stop) => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn unsuitable() -> Result<(), Error> {
        Err(Error::Unsuitable { place: "test".to_owned(), reason: "too old".to_owned() })
    }

    #[tokio::test(start_paused = true)]
    async fn an_unsuitable_broker_is_tried_again_ever_more_rarely_until_told_to_stop() {
        let (stop, stopped) = watch::channel(false);
        let tries = Arc::new(AtomicU32::new(0));
        let counted = tries.clone();
        let start = Instant::now();
        let task = tokio::spawn(events(stopped, move || {
            counted.fetch_add(1, Ordering::SeqCst);
            std::future::ready(unsuitable())
        }));
        // At 0, 1, 3, 7, 15, 31, 63 and then each minute.
        for (second, wanted) in [(2, 2), (8, 4), (62, 6), (64, 7), (184, 9)] {
            tokio::time::sleep_until(start + Duration::from_secs(second)).await;
            assert_eq!(tries.load(Ordering::SeqCst), wanted, "after {second} s");
        }
        stop.send_replace(true);
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn its_end_is_the_end() {
        let (_stop, stopped) = watch::channel(false);
        events(stopped, || std::future::ready(Ok(()))).await;
    }
}
