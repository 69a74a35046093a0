//! Random moments that can be met again.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Printed, it says how to run the same again.
#[derive(Debug, Clone)]
pub struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    /// From `KILN_TEST_SEED`, or else from the clock.
    pub fn seeded() -> Self {
        let given = std::env::var("KILN_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = given.unwrap_or_else(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| u64::from(now.subsec_nanos()))
        });
        let random = Self { seed, state: seed | 1 };
        println!("{random}");
        random
    }

    /// The next number, less than `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        // xorshift64: enough to spread moments.
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % bound
    }
}

impl fmt::Display for Random {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KILN_TEST_SEED={}", self.seed)
    }
}
