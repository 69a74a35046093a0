//! Which step on which layers gave which layer.
//!
//! A step's key covers every input up to it, so that a change of a later step leaves the earlier ones what they are. The
//! layers have a second name here, so that a site can take what another one has baked.
//!
//! ```text
//! <key>     blobs/<hex>: hard links into the image stores
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_model::lock::{BUILDER_FORMAT, Lock, LockedBase, LockedStep};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::error::BakeError;
use super::{kept, whole};
use crate::collect::{Collected, How};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) diff_id: Digest,
    pub(crate) size: u64,
    /// Seconds: the youngest time in it and below it.
    pub(crate) stamp: i64,
    /// What the image that it was taken from says of the environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) env: BTreeMap<String, String>,
    /// The layers that it was made on. A `run` step may give other bytes the next time, so the key alone does not tell.
    pub(crate) below: Vec<Digest>,
}

#[derive(Debug, Clone)]
pub(crate) struct LayerCache {
    root: PathBuf,
}

impl LayerCache {
    pub(crate) fn open(root: &Path) -> Result<Self, BakeError> {
        let blobs = root.join("blobs");
        fs::create_dir_all(&blobs).map_err(BakeError::io("make folder", &blobs))?;
        Ok(Self { root: root.to_owned() })
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }

    /// Nothing where the layer is not in the store and can't be taken over: then it is baked anew.
    pub(crate) fn get(&self, key: &Digest, below: &[Digest], store: &ImageStore) -> Option<Record> {
        let text = fs::read(self.root.join(key.hex())).ok()?;
        let record: Record = serde_json::from_slice(&text).ok()?;
        if record.below != below {
            return None;
        }
        let is_there = store.has_blob(&record.diff_id)
            || store.adopt_blob(&self.blob(&record.diff_id), &record.diff_id).unwrap_or_else(|error| {
                tracing::warn!(%error, "a cached layer can't be used");
                false
            });
        is_there.then_some(record)
    }

    pub(crate) fn put(&self, key: &Digest, record: &Record, store: &ImageStore) -> Result<(), BakeError> {
        if let Err(error) = store.link_blob(&record.diff_id, &self.blob(&record.diff_id)) {
            tracing::debug!(%error, "a layer is not shared with other sites");
        }
        let path = self.root.join(key.hex());
        let failed = || BakeError::io("write", &path);
        let text = serde_json::to_vec(record).map_err(|e| failed()(e.into()))?;
        // An empty or cut record reads as none.
        whole::write(&path, &[&text]).map_err(failed())
    }
}

impl LayerCache {
    /// Lets go of layers that no image store has any more, a while after they were made, and of what names them.
    pub(crate) fn forget(&self, unused: Duration, how: How) -> Result<Collected, BakeError> {
        let blobs = self.root.join("blobs");
        let mut collected = Collected::new("cached layers");
        let mut gone = BTreeSet::new();
        for item in fs::read_dir(&blobs).map_err(BakeError::io("read", &blobs))?.filter_map(Result::ok) {
            let Ok(found) = item.metadata() else { continue };
            if found.nlink() == 1 && kept::unused_for(&found) > unused {
                if how == How::Remove {
                    fs::remove_file(item.path()).map_err(BakeError::io("remove", item.path()))?;
                    gone.insert(item.file_name().to_string_lossy().into_owned());
                }
                collected.add(1, found.len());
            }
        }
        if gone.is_empty() {
            return Ok(collected);
        }
        let records = fs::read_dir(&self.root).map_err(BakeError::io("read", &self.root))?;
        for item in records.filter_map(Result::ok).filter(|item| item.path().is_file()) {
            let record =
                fs::read(item.path()).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok());
            if record.is_some_and(|record| gone.contains(&record.diff_id.hex())) {
                fs::remove_file(item.path()).map_err(BakeError::io("remove", item.path()))?;
            }
        }
        Ok(collected)
    }
}

/// The key of the base, then one for each step.
pub(crate) fn keys(lock: &Lock) -> Result<Vec<Digest>, BakeError> {
    let digest = |value: serde_json::Value| {
        Digest::of_json(&value).map_err(|e| BakeError::io("write the key of", "a step")(e.into()))
    };
    let base = match &lock.base {
        LockedBase::Scratch => json!("scratch"),
        LockedBase::Debian { packages, .. } => json!({"packages": packages}),
        LockedBase::Archive { digest, .. } => json!({"archive": digest}),
        LockedBase::Image { digest, .. } => json!({"others": digest}),
        LockedBase::Containerfile(of) => json!({"containerfile": of, "timestamp": lock.timestamp}),
        LockedBase::Server { image_digest } => json!({"image": image_digest}),
    };
    let mut keys =
        vec![digest(json!({"format": BUILDER_FORMAT, "architecture": lock.architecture, "base": base}))?];
    for step in &lock.steps {
        let content = match step {
            // Not what was asked for, but what that gave.
            LockedStep::Packages { packages, .. } => json!({"packages": packages}),
            LockedStep::Files { files } => json!({"files": files, "timestamp": lock.timestamp}),
            LockedStep::Run { script, reach, archives } if reach.is_nothing() && archives.is_none() => {
                json!({"run": script, "env": lock.env})
            }
            LockedStep::Run { script, reach, archives } => {
                json!({"run": script, "env": lock.env, "reach": reach, "archives": archives})
            }
            LockedStep::Provision(provision) => {
                json!({"provision": provision, "env": lock.env, "timestamp": lock.timestamp})
            }
        };
        let above = keys.last().copied();
        keys.push(digest(json!({"below": above, "step": content}))?);
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use kiln_model::definition::Reach;
    use kiln_model::lock::LockedPackage;

    use super::*;

    fn lock(script: &str, timestamp: i64) -> Lock {
        let package = |name: &str| LockedPackage {
            name: name.to_owned(),
            version: "1".to_owned(),
            architecture: "all".to_owned(),
            sha256: Digest::of(name.as_bytes()),
            size: 1,
        };
        Lock {
            format: BUILDER_FORMAT,
            architecture: "amd64".to_owned(),
            base: LockedBase::Debian {
                suite: "x".to_owned(),
                variant: "minbase".to_owned(),
                packages: vec![package("base-files")],
            },
            steps: vec![
                LockedStep::Packages { requested: vec!["a".to_owned()], packages: vec![package("a")] },
                LockedStep::Files { files: Vec::new() },
                LockedStep::Run { script: script.to_owned(), reach: Reach::default(), archives: None },
            ],
            env: [].into(),
            user: "root".to_owned(),
            command: Vec::new(),
            timestamp: jiff::Timestamp::from_second(timestamp).unwrap(),
        }
    }

    #[test]
    fn a_layer_that_no_store_has_goes_with_what_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let cache = LayerCache::open(&folder.path().join("cache")).unwrap();
        let store = ImageStore::open(&folder.path().join("images")).unwrap();
        let put = |content: &[u8]| {
            let (diff_id, size) = store.put_blob(&mut &*content, None).unwrap();
            let record = Record { diff_id, size, stamp: 0, env: [].into(), below: Vec::new() };
            let key = Digest::of(&[content, b"key"].concat());
            cache.put(&key, &record, &store).unwrap();
            (key, diff_id)
        };
        let ((kept, _), (lost, diff_id)) = (put(b"kept"), put(b"lost"));
        fs::remove_file(store.root().join("blobs/sha256").join(diff_id.hex())).unwrap();
        let looked_at = cache.forget(Duration::ZERO, How::Look).unwrap();
        assert!(cache.blob(&diff_id).exists());
        assert_eq!(cache.forget(Duration::ZERO, How::Remove).unwrap(), looked_at);
        assert_eq!((looked_at.count, looked_at.bytes), (1, 4));
        assert!(cache.get(&kept, &[], &store).is_some());
        assert!(!cache.blob(&diff_id).exists() && !cache.root.join(lost.hex()).exists());
        assert!(cache.root.join(kept.hex()).exists());
    }

    #[test]
    fn a_change_leaves_the_steps_before_it() {
        let before = keys(&lock("true", 1)).unwrap();
        let other_script = keys(&lock("false", 1)).unwrap();
        assert_eq!(before.len(), 4);
        assert_eq!(before[..3], other_script[..3]);
        assert_ne!(before[3], other_script[3]);
        // A new commit stamps its files, and what comes after them; packages keep their layers.
        let other_time = keys(&lock("true", 2)).unwrap();
        assert_eq!(before[..2], other_time[..2]);
        assert!(before[2] != other_time[2] && before[3] != other_time[3]);
    }
}
