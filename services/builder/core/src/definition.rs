//! Definitions, kept by the digest of their content.

use jiff::Timestamp;
use kiln_model::definition::{Definition, UpdatePolicy};
use kiln_model::digest::Digest;
use kiln_model::name::ServerName;
use serde::{Deserialize, Serialize};

/// Document kind.
pub const KIND: &str = "definition";
pub const SCHEMA: u32 = 1;

/// A definition that was applied once. Never changed; the packed folder lies beside the store under the same digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDefinition {
    pub digest: Digest,
    pub definition: Definition,
    /// Over what goes into the image; see [`ImageContext`].
    pub image_context: Digest,
    pub run_digest: Digest,
}

/// Document kind of [`ImageContext`].
pub const IMAGE_CONTEXT_KIND: &str = "image_context";

/// The part of a definition's folder that goes into its image: the steps and the files they name, without `run`,
/// `update` and the tests.
///
/// It has a time of its own because that time is stamped on files and so is in the lock: if it were the definition's,
/// a change of `run` alone would give another image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageContext {
    pub digest: Digest,
    pub first_applied: Timestamp,
}

/// What a server keeps of a definition, so that most decisions need not read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DefinitionRef {
    pub digest: Digest,
    pub image_context: Digest,
    pub run_digest: Digest,
    /// Git commit; empty for a folder.
    pub commit: String,
    pub parent: Option<ServerName>,
    pub replicas: u32,
    pub update: UpdatePolicy,
}

impl StoredDefinition {
    pub fn reference(&self, commit: &str) -> DefinitionRef {
        DefinitionRef {
            digest: self.digest,
            image_context: self.image_context,
            run_digest: self.run_digest,
            commit: commit.to_owned(),
            parent: self.definition.parent().cloned(),
            replicas: self.definition.run.replicas,
            update: self.definition.update,
        }
    }
}
