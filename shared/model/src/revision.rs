//! What the builder makes, and the only thing that releases come from.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::cause::Cause;
use crate::definition::UpdatePolicy;
use crate::digest::Digest;
use crate::name::{BuildId, ServerName};
use crate::run::RunSpec;

/// Packages by name, each with its exact version.
pub type PackageVersions = BTreeMap<String, String>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    pub server: ServerName,
    /// Only grows.
    pub generation: u64,
    pub content: RevisionContent,
    pub created: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RevisionContent {
    Image(Box<ImageRevision>),
    /// The server was removed: its fleet is to be retired.
    Removed {
        cause: Cause,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRevision {
    pub definition_digest: Digest,
    pub image_digest: Digest,
    pub run_digest: Digest,
    pub run: RunSpec,
    pub update: UpdatePolicy,
    /// The build that made the image.
    pub build: BuildId,
    /// Git commit; empty for a folder.
    pub commit: String,
    pub packages: PackageVersions,
    pub cause: Cause,
}
