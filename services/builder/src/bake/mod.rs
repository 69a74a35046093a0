//! From a definition to a lock, from a lock to an image.
//!
//! `resolve` is the only part that asks archives what is in them; `bake` needs the network for nothing but packages that
//! the lock names and the package store lacks.

mod ahead;
mod ansible;
mod apt;
mod archive;
mod buildah;
mod cache;
mod command;
mod context;
mod deb;
mod doctor;
mod dpkg;
mod error;
mod fetch;
mod files;
mod foreign;
#[cfg(test)]
mod hostile;
mod install;
mod kept;
mod laid;
mod leftovers;
mod network;
mod offered;
mod opened;
mod owners;
mod packages;
mod provision;
mod puppet;
mod reach;
mod release;
mod resolve;
mod rights;
mod sandbox;
mod seal;
mod seccomp;
mod secrets;
mod security;
mod snapshot;
mod solutions;
mod sources;
mod steps;
pub(crate) mod system;
#[cfg(test)]
mod tests;
mod tools;
mod tree;
mod underway;
mod unpack;
mod whole;
mod work;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use kiln_image::{ImageStore, Signer, Thoroughness};
use kiln_model::definition::{ArchiveSpec, Definition};
use kiln_model::digest::Digest;
use kiln_model::lock::Lock;
use kiln_model::name::{BuildId, SiteId};
use kiln_model::revision::PackageVersions;
use kiln_registry::Registry;
use kiln_service::config::{SigningKey, Trust};
use kiln_service::machine::Leftover;
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::Span;

use self::underway::Underway;
use crate::collect::{Collected, How};
use crate::describe::{self, About, Provenance};
use crate::timings::Timings;

pub use doctor::examine;
pub use error::BakeError;

/// Where a baker keeps its things, and what it may use.
#[derive(Debug, Clone)]
pub struct BakeConfig {
    /// Marks every mount, cgroup and container, so that leftovers can be told apart.
    pub site: SiteId,
    /// The builder's own folder: private apt state, contents of files steps, work trees.
    pub home: PathBuf,
    /// `.deb` files by digest; may be shared with other sites.
    pub packages: PathBuf,
    /// Which step on which layers gave which layer; may be shared with other sites.
    pub layer_cache: PathBuf,
    /// The image store that builder and node share.
    pub images: PathBuf,
    /// Ed25519, PKCS#8 PEM.
    /// Each of them signs.
    pub signing_keys: Vec<SigningKey>,
    /// What steps can be told, by its names.
    pub secrets: BTreeMap<String, PathBuf>,
    /// For archives that ask who is there, as apt_auth.conf(5) has it.
    pub archive_credentials: Option<PathBuf>,
    /// By which images get to other machines.
    pub registry: Option<kiln_service::config::Registry>,
    /// The OCI runtime's command: `runc`.
    pub runtime: PathBuf,
    /// Archives from the configuration, used before the host's own where the suite is theirs.
    pub archives: Vec<ConfiguredArchive>,
    pub limits: BakeLimits,
}

impl BakeConfig {
    fn transport<'a>(&'a self, log: &'a LogSink, cancel: &'a CancellationToken) -> fetch::Transport<'a> {
        fetch::Transport { credentials: self.archive_credentials.as_deref(), log, cancel }
    }
}

/// An archive that the site's configuration names.
#[derive(Debug, Clone)]
pub struct ConfiguredArchive {
    pub archive: ArchiveSpec,
    /// What `archive.signed_by` is relative to.
    pub folder: PathBuf,
}

/// What one bake may use of the machine.
#[derive(Debug, Clone)]
pub struct BakeLimits {
    /// Bytes of memory of what runs in the sandbox.
    pub memory: u64,
    pub pids: u32,
    pub cpus: f64,
    /// Bytes that a bake's trees may take; they lie in memory.
    pub tree: u64,
    /// Wall-clock time of one step.
    pub step: Duration,
}

impl Default for BakeLimits {
    fn default() -> Self {
        Self { memory: 4 << 30, pids: 4096, cpus: 64.0, tree: 8 << 30, step: Duration::from_secs(30 * 60) }
    }
}

/// Locks that are resolved at once. Solving is one process's work on one core, and mostly waits for another of the same
/// archives.
const RESOLVES: usize = 4;

/// Takes one line of a build's log, without its line end.
pub type LogSink = Arc<dyn Fn(&str) + Send + Sync>;

/// The system at the root of a chain of parents: where packages on top of a parent's image come from.
#[derive(Debug, Clone)]
pub struct DebianRoot {
    /// None where the image itself says which it is.
    pub suite: Option<String>,
    pub archives: Vec<ArchiveSpec>,
    /// Folder of the definition that names them; key rings are in it.
    pub context: PathBuf,
}

/// The image of the server that a definition is `from`.
#[derive(Debug, Clone)]
pub struct ParentImage {
    pub digest: Digest,
    /// `None` where the chain of parents begins with `scratch`: no packages can be added then.
    pub debian: Option<DebianRoot>,
}

pub struct ResolveRequest<'a> {
    pub definition: &'a Definition,
    /// Folder of the definition.
    pub context: &'a Path,
    /// Where the definition is `from` a server, that server's newest image.
    pub parent: Option<ParentImage>,
    /// The one time that is stamped on files.
    pub timestamp: Timestamp,
    /// Keep this lock's packages while base and package lists are what they were: then no archive is asked, and apt is not
    /// called.
    pub pinned: Option<&'a Lock>,
    /// What is in force, where there is anything. It stays where nothing differs but what archives hold that its playbooks,
    /// manifests and scripts with a network have not installed.
    pub current: Option<Current>,
    pub log: LogSink,
}

/// A lock, and the image that was made from it.
#[derive(Debug, Clone)]
pub struct Current {
    pub lock: Lock,
    pub image: Digest,
}

/// An archive's release file as it was when the packages were resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReleaseFile {
    /// Of `InRelease`; a `Release` where the archive has no other.
    pub url: String,
    /// Of the bytes that this address gives.
    pub digest: Digest,
}

/// Every input of an image.
#[derive(Debug, Clone)]
pub struct Resolution {
    pub lock: Lock,
    /// Packages of it, with their versions, that an archive for security updates has.
    pub security: PackageVersions,
    /// `None` where the lock was pinned: nothing was asked, what was known before stays true.
    pub release_files: Option<Vec<ReleaseFile>>,
}

/// How far a bake is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Known before the first step begins.
    Steps {
        total: u32,
    },
    Began {
        step: u32,
        name: String,
    },
    Ended {
        step: u32,
        report: StepReport,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepReport {
    /// `debian bookworm`, `packages nginx-light curl`, `files /etc/nginx/nginx.conf`, `run nginx -t`.
    pub name: String,
    /// Taken from the layer cache.
    pub cached: bool,
    pub millis: u64,
}

/// How one bake is run.
#[derive(Clone)]
pub struct BakeRun {
    /// Names the sandbox, its mounts and its cgroups; also tells two bakes of one lock apart.
    pub build: BuildId,
    pub log: LogSink,
    pub progress: Arc<dyn Fn(Progress) + Send + Sync>,
    pub cancel: CancellationToken,
    pub timings: Timings,
    /// `false` bakes every step anew, and leaves the cache as it is.
    pub use_layer_cache: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BakedLayer {
    pub digest: Digest,
    pub size: u64,
    /// The step that made it.
    pub created_by: String,
}

/// An image in the store, not signed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BakedImage {
    pub digest: Digest,
    pub layers: Vec<BakedLayer>,
    pub steps: Vec<StepReport>,
}

/// Resolves definitions and bakes locks. Cheap to clone; several bakes can run at once.
#[derive(Clone)]
pub struct Baker {
    config: Arc<BakeConfig>,
    registry: Option<Registry>,
    /// Each resolve keeps a thread and an apt, whoever asks: plans of the loop, and plans and builds of people.
    resolving: Arc<Semaphore>,
    underway: Arc<Underway>,
}

impl Baker {
    /// Makes the folders that are not there yet.
    ///
    /// # Errors
    /// Where this process lacks a right that bakes use, a folder can't be made, the signing key can't be read, or the
    /// registry's settings are wrong.
    pub fn new(config: BakeConfig) -> Result<Self, BakeError> {
        rights::check()?;
        std::fs::create_dir_all(&config.home).map_err(BakeError::io("make folder", &config.home))?;
        ImageStore::open(&config.images)?;
        packages::PackageStore::open(&config.packages)?;
        cache::LayerCache::open(&config.layer_cache)?;
        signers(&config)?;
        let registry = config.registry.as_ref().map(Registry::new).transpose()?;
        let resolving = Arc::new(Semaphore::new(RESOLVES));
        Ok(Self { config: Arc::new(config), registry, resolving, underway: Arc::default() })
    }

    /// Every input of the definition's image, exactly.
    ///
    /// # Errors
    /// What the definition asks for can't be had; an archive is not reachable or not to be trusted.
    pub async fn resolve(&self, request: ResolveRequest<'_>) -> Result<Resolution, BakeError> {
        let config = Arc::clone(&self.config);
        let ResolveRequest { definition, context, parent, timestamp, pinned, current, log } = request;
        let (definition, context) = (definition.clone(), context.to_owned());
        let pinned = pinned.cloned();
        let cancel = CancellationToken::new();
        // A caller that gives up takes what runs with it.
        let guard = cancel.clone().drop_guard();
        // The work keeps it to its end, also where the caller has given up.
        let resolving = Arc::clone(&self.resolving);
        if resolving.available_permits() == 0 {
            log("waiting for others that resolve");
        }
        let Ok(place) = resolving.acquire_owned().await else {
            return Err(BakeError::Cancelled);
        };
        let result = blocking(move || {
            let _place = place;
            resolve::Resolver {
                config: &config,
                definition: &definition,
                context: &context,
                parent: parent.as_ref(),
                timestamp,
                pinned: pinned.as_ref(),
                current: current.as_ref(),
                log: &log,
                cancel: &cancel,
                contents: context::Contents::open(&config.home)?,
                archive: OnceCell::new(),
                image: OnceCell::new(),
                bases: OnceCell::new(),
            }
            .resolve()
        })
        .await;
        drop(guard);
        result
    }

    /// Turns a lock into an image in the store. The same lock gives the same digest.
    ///
    /// # Errors
    /// A step fails, a package can't be fetched, or the run is cancelled; nothing is left over then.
    pub async fn bake(&self, lock: &Lock, run: BakeRun) -> Result<BakedImage, BakeError> {
        let (config, underway, lock) = (Arc::clone(&self.config), Arc::clone(&self.underway), lock.clone());
        let guard = run.cancel.clone().drop_guard();
        let span = Span::current();
        let result = blocking(move || span.in_scope(|| steps::bake(&config, &underway, &lock, &run))).await;
        guard.disarm();
        result
    }

    /// Signs an image and where it comes from with each of the site's keys, and gives the keys' ids.
    ///
    /// # Errors
    /// The image is not in the store, or a key can't be had.
    pub async fn sign(&self, image: Digest, made: &Provenance) -> Result<String, BakeError> {
        let (config, made) = (Arc::clone(&self.config), made.clone());
        blocking(move || {
            let images = ImageStore::open(&config.images)?;
            let signers = signers(&config)?;
            let ids = signers.iter().map(|signer| Ok(images.sign(&image, signer)?.to_string()));
            let ids = ids.collect::<Result<Vec<_>, BakeError>>()?;
            describe::attest_provenance(&images, &image, &made, &signers)?;
            Ok(ids.join(", "))
        })
        .await
    }

    /// Attaches a page for people to an image.
    ///
    /// # Errors
    /// The image is not in the store, or can't be read.
    pub async fn describe(&self, image: Digest, about: &About) -> Result<(), BakeError> {
        let (config, about) = (Arc::clone(&self.config), about.clone());
        blocking(move || describe::attach_datasheet(&ImageStore::open(&config.images)?, &image, &about)).await
    }

    /// Pushes an image to the registry, if the site has one.
    ///
    /// # Errors
    /// The image is not in the store, or the registry does not take it.
    pub async fn share(&self, image: Digest) -> Result<bool, BakeError> {
        let Some(registry) = &self.registry else { return Ok(false) };
        registry.push(&ImageStore::open(&self.config.images)?, &image).await?;
        Ok(true)
    }

    /// Signs an image that may run with those of the site's keys that have not signed it yet: a key that takes another's
    /// place is to count for what was made before it came. True where that was so of any.
    ///
    /// # Errors
    /// As [`Baker::sign`].
    pub async fn countersign(&self, image: Digest, trust: Trust) -> Result<bool, BakeError> {
        let config = Arc::clone(&self.config);
        blocking(move || {
            let images = ImageStore::open(&config.images)?;
            let has_signed = |signer: &Signer| {
                images.verify(&image, &[signer.public()], 1, Thoroughness::Manifest).is_ok()
            };
            let mut missing = signers(&config)?;
            missing.retain(|signer| !has_signed(signer));
            // Before every byte is read: at most starts there is nothing to sign.
            if missing.is_empty() {
                return Ok(false);
            }
            let trusted = trust.keys.iter().map(|key| kiln_image::read_trusted_key(key));
            let trusted = trusted.collect::<Result<Vec<_>, _>>()?;
            // What nobody vouches for now gets nobody's word.
            images.verify(&image, &trusted, trust.threshold, Thoroughness::Blobs)?;
            images.attest_again(&image, describe::PROVENANCE, &trusted, &signers(&config)?)?;
            for signer in &missing {
                images.sign(&image, signer)?;
            }
            Ok(true)
        })
        .await
    }

    /// Removes what bakes of this site left over: containers, mounts, cgroups and work trees. To be called at boot, before
    /// the first bake.
    ///
    /// # Errors
    /// Something can't be removed.
    pub async fn sweep(&self) -> Result<(), BakeError> {
        let config = Arc::clone(&self.config);
        blocking(move || leftovers::sweep(&config)).await
    }

    /// Removes what bakes keep for later ones and what no bake has used for so long. The packages of `locks` count as used:
    /// their archives may have them no more.
    ///
    /// # Errors
    /// Something can't be removed.
    pub async fn forget_unused(
        &self,
        unused: Duration,
        locks: Vec<Lock>,
        how: How,
    ) -> Result<Vec<Collected>, BakeError> {
        let config = Arc::clone(&self.config);
        blocking(move || {
            let home = &config.home;
            let packages = packages::PackageStore::open(&config.packages)?;
            packages.note_use(locks.iter().flat_map(Lock::needed_packages))?;
            let layers = cache::LayerCache::open(&config.layer_cache)?;
            let mut collected = vec![packages.forget(unused, how)?, layers.forget(unused, how)?];
            for (what, kept) in [
                ("programs of playbooks and manifests", tools::all(home)),
                ("lists of archives", snapshot::all(home)),
                ("files of definitions and images of others", context::all(home)),
                ("parents' package databases", system::all(home)),
            ] {
                collected.push(kept::forget(what, &kept, unused, how)?);
            }
            Ok(collected)
        })
        .await
    }
}

/// Removes what bakes of a site left on the machine, and nothing of its folder; the builder must not run. Blocks.
///
/// # Errors
/// Something can't be removed.
pub fn sweep(config: &BakeConfig) -> Result<(), BakeError> {
    leftovers::sweep(config)
}

/// What bakes of a site have on the machine.
///
/// # Errors
/// The machine can't be looked at.
pub fn leftovers(config: &BakeConfig) -> Result<Vec<Leftover>, BakeError> {
    leftovers::find(config)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BakeError> + Send + 'static,
) -> Result<T, BakeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The runtime is going down, or the work panicked, which has been logged.
        Err(_) => Err(BakeError::Cancelled),
    }
}

fn signers(config: &BakeConfig) -> Result<Vec<Signer>, BakeError> {
    let signer = |key: &SigningKey| match key {
        SigningKey::File(path) => Signer::file(path),
        SigningKey::Command { run, public } => Signer::command(run.clone(), public),
    };
    Ok(config.signing_keys.iter().map(signer).collect::<Result<_, _>>()?)
}
