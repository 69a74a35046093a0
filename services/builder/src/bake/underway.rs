//! Layers that bakes of this process are making: who needs one that another bake makes waits for it, and finds it in the cache.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiln_model::digest::Digest;
use tokio_util::sync::CancellationToken;

use super::error::BakeError;

/// Between two looks whether the bake that waits was cancelled.
const CANCEL_TICK: Duration = Duration::from_millis(50);

/// Keys of layers that are being made.
#[derive(Debug, Default)]
pub(crate) struct Underway {
    keys: Mutex<BTreeSet<Digest>>,
    fewer: Condvar,
}

/// That these layers are made by one bake. Dropped, they are free for others.
pub(crate) struct Making<'a> {
    underway: &'a Underway,
    keys: Vec<Digest>,
}

impl Underway {
    fn keys(&self) -> MutexGuard<'_, BTreeSet<Digest>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// None where another bake makes the first of them. A key names all below it as well, so who makes the first has the
    /// others to itself.
    pub(crate) fn begin(&self, wanted: impl IntoIterator<Item = Digest>) -> Option<Making<'_>> {
        let mut keys = self.keys();
        let mut wanted = wanted.into_iter().peekable();
        if wanted.peek().is_some_and(|first| keys.contains(first)) {
            return None;
        }
        let mine: Vec<_> = wanted.filter(|key| keys.insert(*key)).collect();
        Some(Making { underway: self, keys: mine })
    }

    /// Returns when nobody makes this layer, whether it could be made or not.
    ///
    /// # Errors
    /// The bake that waits was cancelled.
    pub(crate) fn wait(&self, key: &Digest, cancel: &CancellationToken) -> Result<(), BakeError> {
        let mut keys = self.keys();
        while keys.contains(key) {
            if cancel.is_cancelled() {
                return Err(BakeError::Cancelled);
            }
            keys = self.fewer.wait_timeout(keys, CANCEL_TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Making<'_> {
    /// The layer is in the cache.
    pub(crate) fn done(&self, key: &Digest) {
        if self.keys.contains(key) {
            self.underway.keys().remove(key);
            self.underway.fewer.notify_all();
        }
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        let mut keys = self.underway.keys();
        for key in &self.keys {
            keys.remove(key);
        }
        drop(keys);
        self.underway.fewer.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn keys(names: &[&str]) -> Vec<Digest> {
        names.iter().map(|name| Digest::of(name.as_bytes())).collect()
    }

    #[test]
    fn a_layer_is_made_by_one_at_a_time() {
        let underway = Underway::default();
        let (both, other) = (keys(&["base", "a"]), keys(&["base", "b"]));
        let making = underway.begin(both.clone()).unwrap();
        assert!(underway.begin(other.clone()).is_none());
        assert!(underway.begin(keys(&["a"])).is_none());
        making.done(&both[0]);
        let others = underway.begin(other.clone()).unwrap();
        assert!(underway.begin(keys(&["a"])).is_none(), "the first still makes it");
        drop(making);
        assert!(underway.begin(keys(&["a"])).is_some());
        assert!(underway.begin(keys(&["b"])).is_none());
        drop(others);
        assert!(underway.keys().is_empty());
    }

    #[test]
    fn who_waits_goes_on_when_the_layer_is_there_or_when_cancelled() {
        let underway = Underway::default();
        let key = keys(&["base"]);
        let cancel = CancellationToken::new();
        let making = underway.begin(key.clone()).unwrap();
        thread::scope(|scope| {
            let (waits, gives_up) =
                (scope.spawn(|| underway.wait(&key[0], &CancellationToken::new())), CancellationToken::new());
            gives_up.cancel();
            assert!(matches!(underway.wait(&key[0], &gives_up), Err(BakeError::Cancelled)));
            making.done(&key[0]);
            waits.join().unwrap().unwrap();
        });
        underway.wait(&key[0], &cancel).unwrap();
    }
}
