//! `index.json`: which images, and which signatures of them, the layout holds.

use std::io::{self, Read};

use kiln_model::digest::Digest;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::lock::Lock;
use crate::store::{ImageStore, replace, sync_folder};

pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
/// Of an index entry: what the signature it points to is about. A hint to find it; what counts is signed.
pub(crate) const SUBJECT: &str = "kiln.subject";
pub(crate) const NAME: &str = "org.opencontainers.image.ref.name";
/// A hundred thousand images.
const INDEX_LIMIT: u64 = 64 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Index {
    pub(crate) schema_version: u32,
    pub(crate) media_type: String,
    pub(crate) manifests: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Entry {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub(crate) annotations: std::collections::BTreeMap<String, String>,
}

impl Index {
    pub(crate) fn of(manifests: Vec<Entry>) -> Self {
        Self { schema_version: 2, media_type: INDEX_TYPE.to_owned(), manifests }
    }
}

impl ImageStore {
    pub(crate) fn index(&self) -> Result<Index, Error> {
        let path = self.root().join("index.json");
        let file = match std::fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Index::of(Vec::new())),
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        let mut content = Vec::new();
        file.take(INDEX_LIMIT + 1).read_to_end(&mut content).map_err(Error::io("read", &path))?;
        let malformed = |why: String| Error::malformed(path.display().to_string(), why);
        if content.len() as u64 > INDEX_LIMIT {
            return Err(malformed(format!("more than {INDEX_LIMIT} bytes")));
        }
        let index: Index = serde_json::from_slice(&content).map_err(|e| malformed(e.to_string()))?;
        if index.schema_version != 2 || index.media_type != INDEX_TYPE {
            return Err(malformed(format!("it is not an {INDEX_TYPE}")));
        }
        Ok(index)
    }

    /// Adds those that are not there yet.
    pub(crate) fn add_entries(&self, added: Vec<Entry>) -> Result<(), Error> {
        self.change_index(|entries| {
            for entry in added {
                if !entries.iter().any(|known| known.digest == entry.digest) {
                    entries.push(entry);
                }
            }
        })
    }

    /// Read, change, write, with other processes locked out.
    pub(crate) fn change_index(&self, change: impl FnOnce(&mut Vec<Entry>)) -> Result<(), Error> {
        let _lock = Lock::exclusive(&self.lock_path("index"))?;
        let mut index = self.index()?;
        let before = index.manifests.clone();
        change(&mut index.manifests);
        // What is named has to be there after a crash, also where it was named before and is there again.
        sync_folder(&self.blobs())?;
        if index.manifests == before {
            return Ok(());
        }
        let path = self.root().join("index.json");
        let content = serde_json::to_vec(&index)
            .map_err(|e| Error::malformed(path.display().to_string(), e.to_string()))?;
        replace(&self.temporary(), &path, &content)
    }
}
