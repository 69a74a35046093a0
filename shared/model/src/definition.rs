//! The definition: a folder with `server.yaml` and the files it names.

mod check;
mod context;
mod from;
mod node;
mod number;
mod parents;
mod parse;
mod place;
mod problem;
mod raw;
mod read;
mod schema;
mod template;
mod test;
mod text;

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::context::{ContextEntry, EntryKind, context_digest};
pub use self::parents::{Cycle, order_by_parent};
pub use self::parse::{MAX_TEXT, Named, WrongPath, parse, wrong_name, wrong_paths};
pub use self::place::{ImagePlace, NotAPlace};
pub use self::problem::{DefinitionErrors, Problem, Report};
pub use self::schema::json_schema;
pub use self::template::{TemplateError, render};
use crate::architecture::Architecture;
use crate::check::Check;
use crate::digest::Digest;
use crate::name::ServerName;
use crate::run::RunSpec;
use crate::time::Millis;

/// A `server.yaml` that was read and checked, with its defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Definition {
    pub name: ServerName,
    pub image: ImageSpec,
    pub run: RunSpec,
    pub update: UpdatePolicy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    pub from: Source,
    /// Without it the parent server's, or the builder's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<Architecture>,
    pub steps: Vec<Step>,
    pub env: BTreeMap<String, String>,
    pub user: String,
    pub command: Vec<String>,
    pub tests: Vec<Check>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    Scratch,
    /// `archives` are lines in the manner of sources.list(5); where there are none, those of the host or of the
    /// configuration for this suite.
    Debian {
        suite: String,
        variant: DebianVariant,
        archives: Vec<ArchiveSpec>,
    },
    /// A root file system as tar, plain or compressed by gzip, xz or zstd. `archives` as for `Debian`; without them those for
    /// the suite that its os-release names.
    Archive {
        place: ArchivePlace,
        archives: Vec<ArchiveSpec>,
    },
    /// What an image holds that others have made. `archives` as for `Archive`.
    Image {
        place: ImagePlace,
        archives: Vec<ArchiveSpec>,
    },
    /// What a Containerfile makes.
    Containerfile(ContainerfileSpec),
    /// The newest image of another server.
    Server {
        name: ServerName,
    },
}

/// A Containerfile, also called Dockerfile, and what it is built with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerfileSpec {
    /// Relative to the definition's folder, and inside of `context`.
    pub file: String,
    /// The folder that `COPY` takes from, relative to the definition's.
    pub context: String,
    /// The stage that is wanted; none for the last one.
    pub target: Option<String>,
    /// In the place of what `ARG` says.
    pub args: BTreeMap<String, String>,
    /// By their names in the site's settings, for `RUN --mount=type=secret`.
    pub secrets: Vec<String>,
}

impl ContainerfileSpec {
    /// The file's path in the context; none where it lies outside.
    pub fn file_in_context(&self) -> Option<&str> {
        if self.context == "." {
            return Some(&self.file);
        }
        self.file.strip_prefix(self.context.as_str())?.strip_prefix('/')
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArchivePlace {
    /// Relative to the definition's folder.
    File(String),
    Url {
        url: String,
        sha256: Digest,
    },
}

impl Source {
    /// Files and folders of the definition's folder that it names.
    pub fn named_files(&self) -> Vec<&str> {
        let (path, archives) = match self {
            Self::Scratch | Self::Server { .. } => return Vec::new(),
            Self::Containerfile(spec) => return vec![&spec.file, &spec.context],
            Self::Debian { archives, .. }
            | Self::Archive { place: ArchivePlace::Url { .. }, archives }
            | Self::Image { place: ImagePlace::Registry(_), archives } => (None, archives),
            Self::Archive { place: ArchivePlace::File(path), archives } => (Some(path), archives),
            Self::Image { place: ImagePlace::Layout { folder, .. }, archives } => (Some(folder), archives),
        };
        let rings = archives.iter().map(|archive| archive.signed_by.as_str()).filter(|ring| !ring.is_empty());
        path.map(String::as_str).into_iter().chain(rings).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DebianVariant {
    /// Essential packages and apt.
    Minbase,
    /// Essential packages alone.
    Essential,
}

/// One archive to resolve packages from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveSpec {
    pub url: String,
    pub suite: String,
    pub components: Vec<String>,
    /// Path of the key ring inside the definition's folder.
    pub signed_by: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Packages(Vec<String>),
    Files(Vec<FileSpec>),
    Run(RunStep),
    Provision(ProvisionSpec),
}

/// A script, by /bin/sh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "StoredRun", into = "StoredRun")]
pub struct RunStep {
    pub script: String,
    pub reach: Reach,
}

/// What a step can reach beside the image.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Reach {
    /// All that the builder's machine reaches, but for the machine itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub network: bool,
    /// By their names in the site's settings; files of /run/secrets while the step runs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<String>,
}

impl Reach {
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// A script alone is kept as what it was before there was anything to reach.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum StoredRun {
    Script(String),
    Reaching { script: String, reach: Reach },
}

impl From<StoredRun> for RunStep {
    fn from(stored: StoredRun) -> Self {
        match stored {
            StoredRun::Script(script) => Self { script, reach: Reach::default() },
            StoredRun::Reaching { script, reach } => Self { script, reach },
        }
    }
}

impl From<RunStep> for StoredRun {
    fn from(step: RunStep) -> Self {
        match step {
            RunStep { script, reach } if reach.is_nothing() => Self::Script(script),
            RunStep { script, reach } => Self::Reaching { script, reach },
        }
    }
}

impl Step {
    /// What it can reach; nothing where it runs nothing.
    pub fn reach(&self) -> Option<&Reach> {
        match self {
            Self::Packages(_) | Self::Files(_) => None,
            Self::Run(step) => Some(&step.reach),
            Self::Provision(spec) => Some(&spec.reach),
        }
    }
}

impl ImageSpec {
    /// Files and folders of the definition's folder that it names.
    pub fn named_files(&self) -> Vec<&str> {
        let by_steps = self.steps.iter().flat_map(|step| match step {
            Step::Files(files) => files.iter().map(|file| file.src.as_str()).collect(),
            Step::Provision(spec) => vec![spec.file.as_str(), spec.folder()],
            Step::Packages(_) | Step::Run(_) => Vec::new(),
        });
        by_steps.chain(self.from.named_files()).collect()
    }
}

/// A playbook or a manifest, with all that lies in its folder: roles, modules, templates, variables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvisionSpec {
    pub by: Provisioner,
    /// Relative to the definition's folder.
    pub file: String,
    /// Run twice; the second run must change nothing.
    pub idempotent: bool,
    #[serde(default, skip_serializing_if = "Reach::is_nothing")]
    pub reach: Reach,
}

impl ProvisionSpec {
    /// The folder that the file lies in, relative to the definition's.
    pub fn folder(&self) -> &str {
        self.file.rsplit_once('/').map_or(".", |(folder, _)| folder)
    }
}

/// What runs a playbook or a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provisioner {
    Ansible {
        /// They override all others.
        vars: BTreeMap<String, Value>,
    },
    Puppet,
}

impl Provisioner {
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Ansible { .. } => "ansible",
            Self::Puppet => "puppet",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSpec {
    /// Relative to the definition's folder; a directory is copied with what is in it.
    pub src: String,
    /// Absolute path in the image.
    pub dest: String,
    /// Permission bits; without one 0755 for what the owner can execute and for directories, else 0644.
    pub mode: Option<u32>,
    /// `user:group`.
    pub owner: String,
    /// Rendered with `name`, and `env` of the image.
    pub template: bool,
}

/// Which causes act by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdatePolicy {
    pub definition: Mode,
    pub packages: Mode,
    pub unhealthy: Mode,
    /// Time in which further signals join the first one.
    pub debounce: Millis,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Acts by itself.
    #[default]
    Auto,
    /// Waits for a person.
    Approve,
    /// Is shown, and nothing is done.
    Never,
}
