//! Calls that were refused to somebody who is known, for lack of a role: counted, and recorded now and then.

use std::collections::HashMap;
use std::time::Duration;

use kiln_model::time::Now;
use kiln_store::{AuditRecord, Batch, Store};
use serde_json::json;
use tokio::sync::{mpsc, watch};

use crate::access::{Caller, Role, Row};
use crate::clock::Clock;
use crate::shutdown::requested;

/// Between two records of one caller and method. Whoever calls without end leaves 144 records a day of each method, some
/// 50 kB, and all that are kept in mind together less than 50 MB.
const PAUSE: Duration = Duration::from_secs(600);
/// After the store could not be written.
const AGAIN: Duration = Duration::from_secs(10);
/// Pairs of a caller and a method that are kept in mind. Of what comes beyond, the metrics tell.
const PAIRS: usize = 1024;
/// Refusals that may wait to be counted.
const WAITING: usize = 256;

/// Whose call of which method. Without the call's id: that is in its message, which of a refused call nobody reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Pair {
    actor: String,
    role: Option<Role>,
    way: &'static str,
    method: &'static str,
}

/// Where a server tells of what it refused.
#[derive(Debug, Clone)]
pub struct Refusals(mpsc::Sender<Pair>);

/// What a server told of.
#[derive(Debug)]
pub struct Refused(mpsc::Receiver<Pair>);

/// A server's end, and that of [`record`].
pub fn refusals() -> (Refusals, Refused) {
    let (tell, told) = mpsc::channel(WAITING);
    (Refusals(tell), Refused(told))
}

impl Refusals {
    /// Never waits: where too many wait already, one is counted in the metrics alone.
    pub(crate) fn tell(&self, caller: &Caller, row: &'static Row) {
        let (actor, role, way) = (caller.name().to_owned(), caller.role(), caller.way().as_str());
        let pair = Pair { actor, role, way, method: row.method.trim_start_matches('/') };
        if let Err(error) = self.0.try_send(pair) {
            tracing::debug!(%error, "a refused call is not recorded");
        }
    }
}

#[derive(Debug)]
struct Count {
    unrecorded: u64,
    /// When they may be recorded.
    due: Duration,
}

#[derive(Debug, Default)]
struct Counts(HashMap<Pair, Count>);

impl Counts {
    /// The first of a pair may be recorded at once.
    fn add(&mut self, pair: Pair, now: Duration) {
        if self.0.len() < PAIRS || self.0.contains_key(&pair) {
            self.0.entry(pair).or_insert(Count { unrecorded: 0, due: now }).unrecorded += 1;
        }
    }

    /// What may be recorded now. What had its time without another call is forgotten.
    fn due(&mut self, now: Duration) -> Vec<(Pair, u64)> {
        self.0.retain(|_, count| count.unrecorded > 0 || count.due > now);
        let due = self.0.iter().filter(|(_, count)| count.unrecorded > 0 && count.due <= now);
        due.map(|(pair, count)| (pair.clone(), count.unrecorded)).collect()
    }

    fn recorded(&mut self, pairs: &[(Pair, u64)], now: Duration) {
        for (pair, times) in pairs {
            if let Some(count) = self.0.get_mut(pair) {
                *count = Count { unrecorded: count.unrecorded.saturating_sub(*times), due: now + PAUSE };
            }
        }
    }

    fn put_off(&mut self, pairs: &[(Pair, u64)], now: Duration) {
        for (pair, _) in pairs {
            if let Some(count) = self.0.get_mut(pair) {
                count.due = now + AGAIN;
            }
        }
    }

    fn next(&self) -> Option<Duration> {
        self.0.values().map(|count| count.due).min()
    }
}

/// Records what a server refuses until told to stop: the first call of a caller and a method at once, then at most one record
/// of all calls since, with their number.
pub async fn record<S: Store, C: Clock>(
    mut refused: Refused,
    store: S,
    clock: C,
    mut stop: watch::Receiver<bool>,
) {
    let mut counts = Counts::default();
    loop {
        let now = clock.now();
        let pause = counts.next().map(|due| due.saturating_sub(now.monotonic));
        tokio::select! {
            biased;
            () = requested(&mut stop) => break,
            told = refused.0.recv() => match told {
                Some(pair) => counts.add(pair, clock.now().monotonic),
                None => break,
            },
            () = clock.sleep(pause.unwrap_or_default()), if pause.is_some() => {}
        }
        let now = clock.now();
        let due = counts.due(now.monotonic);
        match commit(&store, &due, now).await {
            Ok(()) => counts.recorded(&due, now.monotonic),
            Err(error) => {
                tracing::warn!(%error, again_in = ?AGAIN, "refused calls wait to be recorded");
                counts.put_off(&due, now.monotonic);
            }
        }
    }
    // Those of the last minutes.
    let rest = counts.due(Duration::MAX);
    if let Err(error) = commit(&store, &rest, clock.now()).await {
        tracing::warn!(%error, "refused calls were not recorded");
    }
}

async fn commit<S: Store>(store: &S, pairs: &[(Pair, u64)], now: Now) -> Result<(), kiln_store::Error> {
    if pairs.is_empty() {
        return Ok(());
    }
    let record = |(pair, times): &(Pair, u64)| {
        let after = json!({ "role": pair.role, "by": pair.way, "times": times });
        AuditRecord::new(now.wall, &pair.actor, "call.refused", pair.method)
            .changed(serde_json::Value::Null, after)
    };
    let audit = pairs.iter().map(record).collect();
    store.commit(Batch { audit, ..Batch::default() }).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(actor: &str) -> Pair {
        Pair { actor: actor.to_owned(), role: Some(Role::Viewer), way: "token", method: "Remove" }
    }

    #[test]
    fn calls_without_end_are_one_record_of_their_number_for_each_pause() {
        let mut counts = Counts::default();
        let at = |seconds: u64| Duration::from_secs(seconds);
        counts.add(pair("ada"), at(5));
        let first = counts.due(at(5));
        assert_eq!(first, [(pair("ada"), 1)]);
        counts.recorded(&first, at(5));
        for second in 6..600 {
            counts.add(pair("ada"), at(second));
            assert_eq!(counts.due(at(second)), []);
        }
        // Others are not held up by it.
        counts.add(pair("bob"), at(600));
        assert_eq!(counts.due(at(600)), [(pair("bob"), 1)]);
        counts.recorded(&[(pair("bob"), 1)], at(600));
        assert_eq!(counts.next(), Some(at(605)));
        let since = counts.due(at(605));
        assert_eq!(since, [(pair("ada"), 594)]);
        // The store was busy: they are told with those that come meanwhile.
        counts.put_off(&since, at(605));
        counts.add(pair("ada"), at(606));
        assert_eq!(counts.due(at(614)), []);
        let since = counts.due(at(615));
        assert_eq!(since, [(pair("ada"), 595)]);
        counts.recorded(&since, at(615));
        assert_eq!(counts.due(at(1215)), []);
        assert_eq!(counts.next(), None, "nothing is kept in mind of who is quiet");
    }

    #[test]
    fn what_is_kept_in_mind_is_bounded() {
        let mut counts = Counts::default();
        for number in 0..PAIRS + 10 {
            counts.add(pair(&format!("a{number}")), Duration::ZERO);
        }
        counts.add(pair("a0"), Duration::ZERO);
        let due = counts.due(Duration::ZERO);
        assert_eq!(due.len(), PAIRS);
        assert!(due.contains(&(pair("a0"), 2)));
    }
}
