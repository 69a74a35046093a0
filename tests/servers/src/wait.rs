//! Waits for conditions, never for luck: each has a bound, and says at its end what was seen last.

use std::time::{Duration, Instant};

use crate::Result;

/// How often a condition is looked at. Small against everything that is measured with it.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until `look` gives a value; `Err` from it is what is missing still.
///
/// # Errors
/// When the bound is over, with what `look` said last.
pub async fn until<T, F, Fut>(what: &str, bound: Duration, mut look: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let start = Instant::now();
    loop {
        let missing = match look().await {
            Ok(value) => return Ok(value),
            Err(missing) => missing,
        };
        if start.elapsed() > bound {
            return Err(format!("waited {bound:?} for {what}: {missing}").into());
        }
        tokio::time::sleep(LOOK).await;
    }
}
