//! The layers of a bake as they get done: in the cache as soon as it and all below it are, whatever becomes of the bake.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kiln_image::{ImageStore, Layer};
use kiln_model::digest::Digest;

use super::cache::{LayerCache, Record};
use super::error::BakeError;
use super::steps::rfc3339;
use super::underway::Making;

/// A layer that was packed.
pub(crate) struct Made {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// Seconds: the youngest time in it and below it.
    pub(crate) stamp: i64,
    /// What the image that it was taken from says of the environment.
    pub(crate) env: BTreeMap<String, String>,
}

/// What a layer is called, and its key in the cache.
pub(crate) struct Name {
    pub(crate) step: String,
    pub(crate) key: Digest,
}

/// Where layers go that come in any order.
pub(crate) struct Laid<'a> {
    store: &'a ImageStore,
    /// None where the bake leaves the cache as it is.
    cache: Option<(&'a LayerCache, Making<'a>)>,
    names: Vec<Name>,
    state: Mutex<State>,
}

struct State {
    /// Those that were there before, and on them the new ones.
    layers: Vec<Layer>,
    /// How many of them were there before.
    old: usize,
    /// Those for which one below is missing, by their places among the new ones.
    ahead: BTreeMap<usize, Made>,
    failed: Option<BakeError>,
}

impl<'a> Laid<'a> {
    pub(crate) fn new(
        store: &'a ImageStore,
        cache: Option<(&'a LayerCache, Making<'a>)>,
        below: Vec<Layer>,
        names: Vec<Name>,
    ) -> Self {
        let state = State { old: below.len(), layers: below, ahead: BTreeMap::new(), failed: None };
        Self { store, cache, names, state: Mutex::new(state) }
    }

    /// Takes the layer of a place among the new ones, or why there is none.
    pub(crate) fn put(&self, at: usize, made: Result<Made, BakeError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { layers, old, ahead, failed } = &mut *state;
        match made {
            Ok(made) => drop(ahead.insert(at, made)),
            Err(error) => drop(failed.get_or_insert(error)),
        }
        while let Some(made) = ahead.remove(&(layers.len() - *old)) {
            let Some(name) = self.names.get(layers.len() - *old) else { return };
            match self.lay(layers, name, made) {
                Ok(layer) => layers.push(layer),
                Err(error) => {
                    failed.get_or_insert(error);
                    return;
                }
            }
        }
    }

    fn lay(&self, below: &[Layer], name: &Name, made: Made) -> Result<Layer, BakeError> {
        let Made { digest, size, stamp, env } = made;
        if let Some((cache, making)) = &self.cache {
            let below = below.iter().map(|layer| layer.diff_id).collect();
            cache.put(&name.key, &Record { diff_id: digest, size, stamp, env, below }, self.store)?;
            making.done(&name.key);
        }
        Ok(Layer { diff_id: digest, size, created_by: name.step.clone(), created: rfc3339(stamp)? })
    }

    /// All layers, from the lowest.
    ///
    /// # Errors
    /// The first of those that could not be packed or kept.
    pub(crate) fn finish(self) -> Result<Vec<Layer>, BakeError> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        match state.failed {
            Some(error) => Err(error),
            // Each is put once, so none is missing but where one has failed.
            None => Ok(state.layers),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::super::underway::Underway;
    use super::*;

    #[test]
    fn layers_get_into_the_cache_in_their_order_and_stay_there_where_a_later_one_fails() {
        let folder = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&folder.path().join("images")).unwrap();
        let cache = LayerCache::open(&folder.path().join("cache")).unwrap();
        let underway = Underway::default();
        let key = |name: &str| Digest::of(format!("key of {name}").as_bytes());
        let names = ["a", "b", "c"].map(|step| Name { step: step.to_owned(), key: key(step) });
        let making = underway.begin(names.iter().map(|name| name.key)).unwrap();
        let laid = Laid::new(&store, Some((&cache, making)), Vec::new(), names.into());
        let made = |content: &str| {
            let (digest, size) = store.put_blob(&mut Cursor::new(content), None).unwrap();
            Made { digest, size, stamp: 7, env: BTreeMap::new() }
        };
        let (a, b) = (made("layer a"), made("layer b"));
        let (first, second) = (a.digest, b.digest);
        laid.put(1, Ok(b));
        assert!(cache.get(&key("b"), &[first], &store).is_none(), "what it lies on is not known yet");
        assert!(underway.begin([key("a")]).is_none());
        laid.put(0, Ok(a));
        assert!(cache.get(&key("a"), &[], &store).is_some());
        assert!(cache.get(&key("b"), &[first], &store).is_some_and(|record| record.diff_id == second));
        assert!(underway.begin([key("b")]).is_some(), "nobody has to wait for it any more");
        assert!(underway.begin([key("c")]).is_none());
        laid.put(2, Err(BakeError::Cancelled));
        assert!(matches!(laid.finish(), Err(BakeError::Cancelled)));
        assert!(underway.begin([key("c")]).is_some());
    }
}
