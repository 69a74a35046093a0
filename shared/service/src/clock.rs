//! Time as a port: a simulation has a clock of its own.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use kiln_model::time::Now;

pub trait Clock: Clone + Send + Sync + 'static {
    fn now(&self) -> Now;

    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + Send;
}

/// The machine's clocks.
#[derive(Debug, Clone, Copy)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Now {
        Now { wall: Timestamp::now(), monotonic: self.start.elapsed() }
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}
