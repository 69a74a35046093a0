//! A site in one file: a tar whose first entry says what the others are.

mod outside;
mod read;
mod sealed;
mod write;

pub(crate) use read::{Restored, restore};
pub(crate) use sealed::Key;
pub(crate) use write::write;

use kiln_model::digest::Digest;
use kiln_model::event::Service;
use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Outcome};

/// Of the archive. A program refuses one that is higher than it knows.
const FORMAT: u32 = 2;

/// Whose stores are in it. What a node knows is of its machine alone: on another one nothing of it would be true.
const SERVICES: [Service; 3] = [Service::Monitor, Service::Deployer, Service::Builder];

const SITE: &str = "site.toml";
const KEYS: &str = "keys.sealed";
const CONTEXTS: &str = "contexts.tar";
const IMAGES: &str = "images.json";

fn store_name(service: Service) -> String {
    format!("stores/{service}.db")
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}", digest.hex())
}

/// What the archive holds. Its own digest is in the name of its entry.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// The program that wrote it.
    kiln: String,
    site: String,
    id: String,
    time: jiff::Timestamp,
    /// The site has a broker of its own.
    own_broker: bool,
    stores: Vec<StorePart>,
    /// In the order of the archive.
    parts: Vec<Part>,
}

impl Manifest {
    /// What the keys are sealed together with: all that the archive says of itself and of its other parts. Anybody can write
    /// digests that fit what he changed; keys that fit those digests only who has the backup's key.
    fn sealed_about(&self) -> Outcome<String> {
        let mut others = self.clone();
        others.parts.retain(|part| part.name != KEYS);
        let digest = Digest::of_json(&others);
        Ok(digest.map_err(|error| Failure::failed("listing the parts of a backup", error))?.to_string())
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StorePart {
    service: Service,
    epoch: String,
    sequence: u64,
    layout: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Part {
    name: String,
    size: u64,
    digest: Digest,
}

fn manifest_name(content: &[u8]) -> String {
    format!("kiln-backup-{}.json", Digest::of(content).hex())
}

#[cfg(test)]
mod tests;
