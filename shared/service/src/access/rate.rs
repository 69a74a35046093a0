//! How much one caller may ask: calls a second, by a bucket that fills up again, and calls under way at once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::caller::{Caller, Way};
use crate::error::ApiError;

/// Callers that are kept in mind. Names come from the site's own authority and tokens; this bounds what a hundred
/// thousand short-lived processes at the Unix socket would leave.
const CALLERS: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    pub calls_per_second: f64,
    /// Calls that may come at once after a rest.
    pub burst: f64,
    /// Calls that may be under way at once; a stream is one until its end.
    pub under_way: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    name: String,
    way: Way,
}

#[derive(Debug)]
struct Bucket {
    rate: Rate,
    left: f64,
    at: Instant,
    under_way: u32,
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let rest = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + rest * self.rate.calls_per_second).min(self.rate.burst);
        self.at = now;
    }

    /// Nobody uses it, and it is full again: it says no more than none.
    fn is_idle(&mut self, now: Instant) -> bool {
        self.fill(now);
        self.under_way == 0 && self.left >= self.rate.burst
    }
}

/// The buckets of all callers. People have a rate of their own: what services ask of each other grows with the fleet.
#[derive(Debug)]
pub(crate) struct Rates {
    people: Rate,
    others: Rate,
    buckets: Arc<Mutex<HashMap<Key, Bucket>>>,
}

/// One call under way, until it is dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    key: Key,
    buckets: Arc<Mutex<HashMap<Key, Bucket>>>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bucket) = buckets.get_mut(&self.key) {
            bucket.under_way = bucket.under_way.saturating_sub(1);
        }
    }
}

impl Rates {
    pub(crate) fn new(people: Rate, others: Rate) -> Self {
        Self { people, others, buckets: Arc::default() }
    }

    /// # Errors
    /// [`ApiError::Exhausted`] where the caller asks too much, [`ApiError::Unavailable`] where too many call at all.
    pub(crate) fn enter(&self, caller: &Caller, now: Instant) -> Result<Permit, ApiError> {
        let rate = if caller.is_person() { self.people } else { self.others };
        let key = Key { name: caller.name().to_owned(), way: caller.way() };
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= CALLERS && !buckets.contains_key(&key) {
            buckets.retain(|_, bucket| !bucket.is_idle(now));
            if buckets.len() >= CALLERS {
                return Err(ApiError::Unavailable(format!("{CALLERS} callers are busy at once")));
            }
        }
        let bucket =
            buckets.entry(key.clone()).or_insert(Bucket { rate, left: rate.burst, at: now, under_way: 0 });
        bucket.fill(now);
        let too_much = |reason: String| {
            let what_to_do = "ask less often; one watching call tells what many looks would".to_owned();
            ApiError::Exhausted { reason, what_to_do }
        };
        if bucket.under_way >= rate.under_way {
            return Err(too_much(format!("{caller} has {} calls under way at once", rate.under_way)));
        }
        if bucket.left < 1.0 {
            let most = rate.calls_per_second;
            return Err(too_much(format!("{caller} makes more than {most} calls a second")));
        }
        bucket.left -= 1.0;
        bucket.under_way += 1;
        Ok(Permit { key, buckets: Arc::clone(&self.buckets) })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PEOPLE: Rate = Rate { calls_per_second: 2.0, burst: 4.0, under_way: 3 };
    const OTHERS: Rate = Rate { calls_per_second: 100.0, burst: 100.0, under_way: 100 };

    fn person(name: &str) -> Caller {
        Caller::by_token(&name.parse().unwrap(), super::super::Role::Viewer)
    }

    #[test]
    fn a_bucket_empties_and_fills_up_again() {
        let rates = Rates::new(PEOPLE, OTHERS);
        let begin = Instant::now();
        let at = |seconds: f64| begin + Duration::from_secs_f64(seconds);
        for _ in 0..4 {
            rates.enter(&person("ada"), at(0.0)).unwrap();
        }
        let refused = rates.enter(&person("ada"), at(0.1)).unwrap_err();
        assert!(refused.to_string().contains("ada (viewer, by token) makes more than 2 calls"), "{refused}");
        // Others have buckets of their own.
        rates.enter(&person("bob"), at(0.1)).unwrap();
        rates.enter(&Caller::local("root", 7), at(0.1)).unwrap();
        rates.enter(&person("ada"), at(0.6)).unwrap();
        assert!(rates.enter(&person("ada"), at(0.6)).is_err());
        // A long rest gives no more than the burst.
        let rested = (0..9).filter(|_| rates.enter(&person("ada"), at(3600.0)).is_ok()).count();
        assert_eq!(rested, 4);
    }

    #[test]
    fn calls_under_way_are_counted_until_they_end() {
        let rates = Rates::new(PEOPLE, OTHERS);
        let now = Instant::now();
        let mut held: Vec<_> = (0..3).map(|_| rates.enter(&person("ada"), now).unwrap()).collect();
        assert!(rates.enter(&person("ada"), now).unwrap_err().to_string().contains("3 calls under way"));
        held.pop();
        rates.enter(&person("ada"), now).unwrap();
    }

    #[test]
    fn what_is_kept_of_callers_is_bounded() {
        let rates = Rates::new(PEOPLE, OTHERS);
        let begin = Instant::now();
        let many = i32::try_from(CALLERS).unwrap();
        for process in 0..many {
            rates.enter(&Caller::local("root", process), begin).unwrap();
        }
        assert!(matches!(rates.enter(&Caller::local("root", many), begin), Err(ApiError::Unavailable(_))));
        let later = begin + Duration::from_secs(3600);
        rates.enter(&Caller::local("root", many), later).unwrap();
        assert_eq!(rates.buckets.lock().unwrap().len(), 1);
    }
}
