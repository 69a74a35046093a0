//! Every input of an image resolved. Its hash is the build's key.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::definition::{ImagePlace, Provisioner, Reach};
use crate::digest::Digest;
use crate::revision::PackageVersions;

/// Grows when the builder makes other bytes from the same inputs.
pub const BUILDER_FORMAT: u32 = 1;

/// No server name, no commit, no archive address: what does not change the image is not in here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    pub format: u32,
    /// Debian's name: `amd64`.
    pub architecture: String,
    pub base: LockedBase,
    pub steps: Vec<LockedStep>,
    pub env: BTreeMap<String, String>,
    pub user: String,
    pub command: Vec<String>,
    /// The one time that is stamped on files: when this context was first applied.
    pub timestamp: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockedBase {
    Scratch,
    Debian {
        suite: String,
        variant: String,
        packages: Vec<LockedPackage>,
    },
    /// A root file system as tar, as it was packed.
    Archive {
        digest: Digest,
        /// Of the file, in bytes.
        size: u64,
    },
    /// What an image holds that others have made.
    Image {
        place: ImagePlace,
        /// Of its manifest for this architecture.
        digest: Digest,
    },
    /// What a Containerfile makes.
    Containerfile(Containerfile),
    /// Another server's image.
    Server {
        image_digest: Digest,
    },
}

/// A Containerfile, with everything that it is built with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Containerfile {
    /// Among `files`.
    pub file: String,
    /// The context: `dest` is the path inside it, with a `/` in front.
    pub files: Vec<LockedFile>,
    pub target: Option<String>,
    pub args: BTreeMap<String, String>,
    pub secrets: Vec<String>,
    /// What it names as images, with the digest of the manifest for this architecture.
    pub images: BTreeMap<String, Digest>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockedStep {
    /// What the step adds to what is there, in the order of installation that apt gave.
    Packages {
        requested: Vec<String>,
        packages: Vec<LockedPackage>,
    },
    Files {
        files: Vec<LockedFile>,
    },
    Run {
        script: String,
        #[serde(default, skip_serializing_if = "Reach::is_nothing")]
        reach: Reach,
        /// Where it reaches the network and there are archives to install from: of their release files.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        archives: Option<Digest>,
    },
    Provision(Provision),
}

/// A playbook or a manifest, with everything that it is run with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provision {
    pub by: Provisioner,
    /// The playbook or manifest, among `files`.
    pub file: String,
    /// Of its folder: `dest` is the path inside it, with a `/` in front.
    pub files: Vec<LockedFile>,
    pub idempotent: bool,
    #[serde(default, skip_serializing_if = "Reach::is_nothing")]
    pub reach: Reach,
    /// What the host is called in it: the server's name.
    pub host: String,
    /// What runs it, with all that this needs; none of it stays in the image.
    pub tools: Vec<LockedPackage>,
    /// Names what the archives held that it can install from.
    pub snapshot: Digest,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LockedPackage {
    pub name: String,
    pub version: String,
    /// `amd64` or `all`.
    pub architecture: String,
    pub sha256: Digest,
    pub size: u64,
}

/// One file, directory or symbolic link that a `files` step puts into the image, templates rendered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockedFile {
    pub dest: String,
    pub kind: LockedFileKind,
    /// Permission bits.
    pub mode: u32,
    /// `user:group`, by name or number as the definition has it; resolved in the image.
    pub owner: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockedFileKind {
    Regular { digest: Digest, size: u64 },
    Directory,
    Symlink { target: String },
}

impl Lock {
    /// The build's key.
    ///
    /// # Errors
    /// None in practice: every field has a JSON form.
    pub fn key(&self) -> Result<Digest, serde_json::Error> {
        Digest::of_json(self)
    }

    /// The exact versions that this lock adds; those of a parent server's image are in its own lock.
    pub fn packages(&self) -> PackageVersions {
        let steps = self.steps.iter().flat_map(LockedStep::packages);
        self.base
            .packages()
            .iter()
            .chain(steps)
            .map(|package| (package.name.clone(), package.version.clone()))
            .collect()
    }

    /// Those, and what its playbooks and manifests are run by.
    pub fn needed_packages(&self) -> impl Iterator<Item = &LockedPackage> {
        let tools = self.steps.iter().flat_map(|step| match step {
            LockedStep::Provision(provision) => provision.tools.as_slice(),
            LockedStep::Packages { .. } | LockedStep::Files { .. } | LockedStep::Run { .. } => &[],
        });
        let steps = self.steps.iter().flat_map(LockedStep::packages);
        self.base.packages().iter().chain(steps).chain(tools)
    }
}

impl LockedBase {
    fn packages(&self) -> &[LockedPackage] {
        match self {
            Self::Debian { packages, .. } => packages,
            Self::Scratch
            | Self::Archive { .. }
            | Self::Image { .. }
            | Self::Containerfile(_)
            | Self::Server { .. } => &[],
        }
    }
}

impl LockedStep {
    fn packages(&self) -> &[LockedPackage] {
        match self {
            Self::Packages { packages, .. } => packages,
            Self::Files { .. } | Self::Run { .. } | Self::Provision(_) => &[],
        }
    }
}
