//! What is not Kiln: a repository, an archive, and what the images made from them are like.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use kiln_builder::git::{self, Address};
use kiln_builder::repositories::Repositories;
use kiln_builder::tree::{Node, Tree};
use kiln_builder_core::source::SourceId;
use kiln_model::digest::Digest;
use kiln_model::release_file::ReleaseFile;
use kiln_monitor::ports::{Archive, Git, Problem};

use crate::life::Life;
use crate::nature::Nature;
use crate::world::{Extras, Policy};

pub(crate) const URL: &str = "/srv/git/web";
pub(crate) const ARCHIVE: &str = "archive";

/// A definition as somebody commits it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Definition {
    /// What goes into the image.
    pub(crate) image: u64,
    pub(crate) nature: Nature,
    /// What only `run` says.
    pub(crate) run: u64,
    pub(crate) replicas: u64,
    pub(crate) tested: bool,
}

/// Of the server beside `web`, in a folder of its own, which nobody commits anything to.
pub(crate) const SIDE: &str = "side";

/// What all definitions of a story have in common.
#[derive(Debug, Clone, Copy, Default)]
struct Habits {
    policy: Policy,
    /// Updates of packages wait for a person.
    approve: bool,
    side: bool,
}

impl Definition {
    fn text(&self, server: &str, habits: Habits) -> String {
        let Self { image, nature, run, replicas, tested } = self;
        let Policy { surge, unavailable } = habits.policy;
        let port = if server == SIDE { 8081 } else { 8080 };
        let approve = if habits.approve && server != SIDE { "  on: { packages: approve }\n" } else { "" };
        let tests = if *tested { "  tests: [{ command: { run: ask } }]\n" } else { "" };
        format!(
            "apiVersion: kiln/v1\nname: {server}\nimage:\n  from: {{ debian: bookworm }}\n  env: {{ IMAGE: \"{image}\", NATURE: {nature} \
             }}\n  command: [serve]\n{tests}run:\n  replicas: {replicas}\n  ports: [{{ listen: {port}, target: 80 }}]\n  env: {{ RUN: \
             \"{run}\" }}\n  health: {{ command: {{ run: ask }}, interval: 2s, timeout: 1s, healthy: 1, unhealthy: 2, start: 10s }}\n  \
             rollout: {{ rolling: {{ maxSurge: {surge}, maxUnavailable: {unavailable} }}, soak: 10s, deadline: 10m }}\n  drain: 1s\nupdate:\n{approve}  debounce: \
             1s\n",
            nature = nature.word()
        )
    }
}

impl fmt::Display for Definition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { image, nature, run, replicas, tested } = self;
        let tested = if *tested { ", tested" } else { "" };
        write!(f, "image {image} ({}), run {run}, {replicas} replicas{tested}", nature.word())
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Outside {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    habits: Habits,
    commits: u64,
    /// None where the newest commit can't be taken.
    head: Option<Definition>,
    git_away: bool,
    packages: u64,
    natures: BTreeMap<u64, Nature>,
    archive_away: bool,
    images: BTreeMap<Digest, Image>,
    signed: BTreeSet<Digest>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) image: u64,
    pub(crate) packages: u64,
    pub(crate) nature: Nature,
}

impl Outside {
    pub(crate) fn new(extras: Extras) -> Self {
        let outside = Self::default();
        let Extras { policy, approve, second: side, .. } = extras;
        outside.known().habits = Habits { policy, approve, side };
        outside
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap()
    }

    pub(crate) fn commit(&self, definition: Option<Definition>) {
        let mut known = self.known();
        known.commits += 1;
        known.head = definition;
    }

    /// The newest definition; none where it can't be taken.
    pub(crate) fn definition(&self) -> Option<Definition> {
        self.known().head.clone()
    }

    pub(crate) fn publish(&self, nature: Nature) {
        let mut known = self.known();
        known.packages += 1;
        let version = known.packages;
        known.natures.insert(version, nature);
    }

    /// The newest version of the packages, and what it makes of an image.
    pub(crate) fn packages(&self) -> (u64, Nature) {
        let known = self.known();
        (known.packages, known.natures.get(&known.packages).copied().unwrap_or(Nature::Good))
    }

    pub(crate) fn set_git_away(&self, away: bool) {
        self.known().git_away = away;
    }

    pub(crate) fn set_archive_away(&self, away: bool) {
        self.known().archive_away = away;
    }

    pub(crate) fn archive_is_away(&self) -> bool {
        self.known().archive_away
    }

    pub(crate) fn baked(&self, digest: Digest, image: u64, packages: u64, own: Nature) {
        let mut known = self.known();
        let of_packages = known.natures.get(&packages).copied().unwrap_or(Nature::Good);
        let nature = if of_packages.is_bad() { of_packages } else { own };
        known.images.insert(digest, Image { image, packages, nature });
    }

    pub(crate) fn image(&self, digest: &Digest) -> Option<Image> {
        self.known().images.get(digest).copied()
    }

    pub(crate) fn sign(&self, digest: Digest) {
        self.known().signed.insert(digest);
    }

    pub(crate) fn is_signed(&self, digest: &Digest) -> bool {
        self.known().signed.contains(digest)
    }

    fn head(&self) -> Option<String> {
        let known = self.known();
        (!known.git_away).then(|| format!("{:040x}", known.commits))
    }
}

/// The outside as one process reaches it.
pub(crate) struct Reach {
    pub(crate) outside: Outside,
    pub(crate) life: Life,
}

impl fmt::Debug for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.life.name())
    }
}

#[async_trait]
impl Repositories for Reach {
    async fn head(&self, _: &SourceId, address: Address) -> Result<(String, Tree), git::Error> {
        self.life.does("fetch");
        self.life.here().await;
        let head = self.outside.head();
        let away = || git::Error::Failed {
            what: "fetch",
            place: address.url().to_owned(),
            reason: "is away".to_owned(),
        };
        let commit = head.ok_or_else(away)?;
        let (head, habits) = {
            let known = self.outside.known();
            (known.head.clone(), known.habits)
        };
        let text = head.map_or_else(|| "name: [".to_owned(), |definition| definition.text("web", habits));
        let mut tree = Tree::default();
        let file = |text: String| Node::File { content: text.into_bytes().into(), executable: false };
        if habits.side {
            let side = Definition { image: 0, nature: Nature::Good, run: 0, replicas: 2, tested: false };
            tree.insert("web/server.yaml", file(text))?;
            tree.insert("side/server.yaml", file(side.text(SIDE, habits)))?;
        } else {
            tree.insert("server.yaml", file(text))?;
        }
        Ok((commit, tree))
    }
}

#[async_trait]
impl Git for Reach {
    async fn head(&self, _: &str, _: &str) -> Result<String, Problem> {
        self.life.does("ask for the head");
        self.life.here().await;
        self.outside.head().ok_or_else(|| Problem("the repository is away".to_owned()))
    }
}

#[async_trait]
impl Archive for Reach {
    async fn release_file(&self, _: &str) -> Result<ReleaseFile, Problem> {
        self.life.does("ask for the release file");
        self.life.here().await;
        if self.outside.archive_is_away() {
            return Err(Problem("the archive is away".to_owned()));
        }
        Ok(ReleaseFile { digest: release_file(self.outside.packages().0), date: None })
    }
}

/// The digest of the release file with this version of the packages.
pub(crate) fn release_file(packages: u64) -> Digest {
    Digest::of(format!("release file {packages}").as_bytes())
}
