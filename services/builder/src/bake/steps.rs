//! A lock into an image: each step in its tree, each tree into its layer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use jiff::Timestamp;
use kiln_builder_core::build::Phase;
use kiln_image::{ImageStore, Layer, NewImage, Packer, Whiteouts};
use kiln_model::definition::ImagePlace;
use kiln_model::digest::Digest;
use kiln_model::lock::{Containerfile, Lock, LockedBase, LockedPackage, LockedStep};
use tracing::Span;

use super::ahead::Ahead;
use super::buildah::Build;
use super::cache::{LayerCache, Record, keys};
use super::context::Contents;
use super::error::BakeError;
use super::foreign::{Images, Unpacked};
use super::install::Installer;
use super::laid::{Laid, Made, Name};
use super::packages::PackageStore;
use super::provision::Place;
use super::sandbox::{Job, PATH, Rights, Sandbox};
use super::seal::seal;
use super::tree::{SHIFT, Tree};
use super::underway::Underway;
use super::work::{Work, mount_overlay, mount_shifted, unmount_below};
use super::{
    BakeConfig, BakeRun, BakedImage, BakedLayer, Progress, StepReport, archive, files, provision, reach,
};
use crate::{describe, timings};

/// One layer to come: the base, or a step.
enum Step<'a> {
    Base(&'a [LockedPackage]),
    Archive(&'a Digest),
    Image(&'a ImagePlace, &'a Digest),
    Containerfile(&'a Containerfile),
    Locked(&'a LockedStep),
}

struct Plan<'a> {
    name: String,
    key: Digest,
    step: Step<'a>,
}

impl<'a> Plan<'a> {
    fn packages(&self) -> &'a [LockedPackage] {
        match self.step {
            Step::Base(packages) => packages,
            Step::Locked(LockedStep::Packages { packages, .. }) => packages,
            Step::Locked(LockedStep::Provision(provision)) => &provision.tools,
            Step::Archive(_)
            | Step::Image(..)
            | Step::Containerfile(_)
            | Step::Locked(LockedStep::Files { .. } | LockedStep::Run { .. }) => &[],
        }
    }
}

pub(crate) fn bake(
    config: &BakeConfig,
    underway: &Underway,
    lock: &Lock,
    run: &BakeRun,
) -> Result<BakedImage, BakeError> {
    let store = ImageStore::open(&config.images)?;
    let cache = LayerCache::open(&config.layer_cache)?;
    let plans = plan(lock)?;
    (run.progress)(Progress::Steps { total: u32::try_from(plans.len()).unwrap_or(u32::MAX) });

    let below = parent_layers(lock, &store)?;
    let stamp = below.iter().map(|layer| seconds(&layer.created)).max().unwrap_or(0);
    let mut there = There { below, env: BTreeMap::new(), stamp, reports: Vec::new() };
    let mut missing = plans.as_slice();
    let mut making = None;
    if run.use_layer_cache {
        loop {
            missing = there.take(missing, &cache, &store, run)?;
            let Some(first) = missing.first() else { break };
            making = underway.begin(missing.iter().map(|plan| plan.key));
            if making.is_none() {
                (run.log)(&format!("{}: waiting for another build that makes it", first.name));
                run.timings.during(Phase::Wait, || underway.wait(&first.key, &run.cancel))?;
            } else if there.find(first, &cache, &store).is_none() {
                break;
            }
        }
    }
    let There { mut below, mut env, stamp, mut reports } = there;
    if !missing.is_empty() {
        let names = missing.iter().map(|plan| Name { step: plan.name.clone(), key: plan.key }).collect();
        let laid = Laid::new(&store, making.map(|making| (&cache, making)), below.clone(), names);
        let kitchen = Kitchen { config, lock, run, store: &store };
        kitchen.make(missing, &laid, &below, &mut env, stamp, &mut reports)?;
        below = laid.finish()?;
    }
    env.extend(lock.env.clone());
    let digest = store.put_image(&new_image(lock, env, &below)?)?;
    run.timings.during(Phase::Describe, || describe::attach_sbom(&store, &digest))?;
    let layers = below
        .into_iter()
        .map(|layer| BakedLayer { digest: layer.diff_id, size: layer.size, created_by: layer.created_by })
        .collect();
    Ok(BakedImage { digest, layers, steps: reports })
}

/// What of an image is there without being made.
struct There {
    below: Vec<Layer>,
    env: BTreeMap<String, String>,
    /// Seconds: the youngest time of all.
    stamp: i64,
    reports: Vec<StepReport>,
}

impl There {
    fn find(&self, plan: &Plan<'_>, cache: &LayerCache, store: &ImageStore) -> Option<Record> {
        let digests: Vec<Digest> = self.below.iter().map(|layer| layer.diff_id).collect();
        cache.get(&plan.key, &digests, store)
    }

    /// Takes the layers that the cache has, and gives the steps whose layers are missing.
    fn take<'p, 'l>(
        &mut self,
        mut plans: &'p [Plan<'l>],
        cache: &LayerCache,
        store: &ImageStore,
        run: &BakeRun,
    ) -> Result<&'p [Plan<'l>], BakeError> {
        while let Some((plan, rest)) = plans.split_first() {
            let began = Instant::now();
            let Some(record) = self.find(plan, cache, store) else { break };
            self.stamp = record.stamp;
            self.env.extend(record.env);
            self.below.push(Layer {
                diff_id: record.diff_id,
                size: record.size,
                created_by: plan.name.clone(),
                created: rfc3339(record.stamp)?,
            });
            let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            let report = StepReport { name: plan.name.clone(), cached: true, millis };
            tell(run, self.reports.len(), &report);
            self.reports.push(report);
            plans = rest;
        }
        Ok(plans)
    }
}

fn parent_layers(lock: &Lock, store: &ImageStore) -> Result<Vec<Layer>, BakeError> {
    match &lock.base {
        LockedBase::Server { image_digest } => Ok(store.image(image_digest)?.layers),
        LockedBase::Scratch
        | LockedBase::Debian { .. }
        | LockedBase::Archive { .. }
        | LockedBase::Image { .. }
        | LockedBase::Containerfile(_) => Ok(Vec::new()),
    }
}

fn plan(lock: &Lock) -> Result<Vec<Plan<'_>>, BakeError> {
    let mut keys = keys(lock)?.into_iter();
    let base_key = keys.next();
    let mut plans = Vec::new();
    match (&lock.base, base_key) {
        (LockedBase::Debian { suite, variant, packages }, Some(key)) => {
            plans.push(Plan { name: format!("debian {suite} {variant}"), key, step: Step::Base(packages) });
        }
        (LockedBase::Archive { digest, .. }, Some(key)) => {
            plans.push(Plan {
                name: format!("archive {}", digest.short()),
                key,
                step: Step::Archive(digest),
            });
        }
        (LockedBase::Image { place, digest }, Some(key)) => {
            plans.push(Plan { name: format!("image {place}"), key, step: Step::Image(place, digest) });
        }
        (LockedBase::Containerfile(of), Some(key)) => {
            plans.push(Plan {
                name: format!("containerfile {}", of.file),
                key,
                step: Step::Containerfile(of),
            });
        }
        _ => {}
    }
    for (step, key) in lock.steps.iter().zip(keys) {
        let name = match step {
            LockedStep::Packages { requested, .. } => format!("packages {}", requested.join(" ")),
            LockedStep::Files { files } => match files.as_slice() {
                [] => "files".to_owned(),
                [one] => format!("files {}", one.dest),
                [first, rest @ ..] => format!("files {} and {} more", first.dest, rest.len()),
            },
            LockedStep::Run { script, .. } => format!("run {}", script.lines().next().unwrap_or_default()),
            LockedStep::Provision(provision) => format!("{} {}", provision.by.as_str(), provision.file),
        };
        plans.push(Plan { name, key, step: Step::Locked(step) });
    }
    Ok(plans)
}

fn tell(run: &BakeRun, step: usize, report: &StepReport) {
    let step = u32::try_from(step).unwrap_or(u32::MAX);
    if report.cached {
        (run.progress)(Progress::Began { step, name: report.name.clone() });
    }
    let how = if report.cached { "cached" } else { "done" };
    (run.log)(&format!("{}: {how} ({} ms)", report.name, report.millis));
    (run.progress)(Progress::Ended { step, report: report.clone() });
}

fn new_image(
    lock: &Lock,
    mut env: BTreeMap<String, String>,
    layers: &[Layer],
) -> Result<NewImage, BakeError> {
    env.entry("PATH".to_owned()).or_insert_with(|| PATH.to_owned());
    let key = lock.key().map_err(|e| BakeError::io("write", "the lock")(e.into()))?;
    Ok(NewImage {
        architecture: lock.architecture.clone(),
        created: rfc3339(lock.timestamp.as_second())?,
        env,
        // An image from scratch has no file that says who root is.
        user: if lock.user == "root" { "0".to_owned() } else { lock.user.clone() },
        command: lock.command.clone(),
        labels: BTreeMap::from([("kiln.lock".to_owned(), key.to_string())]),
        layers: layers.to_vec(),
    })
}

pub(crate) fn rfc3339(seconds: i64) -> Result<String, BakeError> {
    Timestamp::from_second(seconds).map(|time| time.to_string()).map_err(|error| BakeError::Definition {
        what: "the time that is stamped on files".to_owned(),
        why: error.to_string(),
        remedy: "a package's files are from an impossible time: leave it out".to_owned(),
    })
}

fn seconds(created: &str) -> i64 {
    created.parse::<Timestamp>().map_or(0, Timestamp::as_second)
}

/// Says that no step is to come any more.
struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(usize::MAX, Ordering::Relaxed);
    }
}

/// Makes the layers that the cache lacks.
struct Kitchen<'a> {
    config: &'a BakeConfig,
    lock: &'a Lock,
    run: &'a BakeRun,
    store: &'a ImageStore,
}

impl Kitchen<'_> {
    fn make(
        &self,
        plans: &[Plan<'_>],
        laid: &Laid<'_>,
        below: &[Layer],
        env: &mut BTreeMap<String, String>,
        mut stamp: i64,
        reports: &mut Vec<StepReport>,
    ) -> Result<(), BakeError> {
        let packages = PackageStore::open(&self.config.packages)?;
        let wanted: Vec<_> = plans.iter().map(Plan::packages).collect();
        let transport = self.config.transport(&self.run.log, &self.run.cancel);
        let fetch = || packages.fetch(wanted.iter().copied().flatten(), transport);
        self.run.timings.during(Phase::Fetch, fetch)?;
        let work = Work::new(&self.config.site, &self.run.build, self.config.limits.tree)?;
        let mut lowers = self.mount_below(&work, below)?;

        // While a step runs, the layers before it are packed: nothing writes to their trees any more.
        let under_way = AtomicUsize::new(0);
        let ahead = Ahead { store: &packages, steps: wanted, step: &under_way, cancel: &self.run.cancel };
        thread::scope(|scope| {
            scope.spawn(|| ahead.run());
            // However the steps end: the scope waits for what is opened ahead.
            let _ended = Ended(&under_way);
            for (at, plan) in plans.iter().enumerate() {
                under_way.store(at, Ordering::Relaxed);
                if self.run.cancel.is_cancelled() {
                    return Err(BakeError::Cancelled);
                }
                let began = Instant::now();
                let number = u32::try_from(reports.len()).unwrap_or(u32::MAX);
                (self.run.progress)(Progress::Began { step: number, name: plan.name.clone() });
                let below = Below { lowers: &lowers, env, stamp };
                let cooked = self.cook(plan, &work, &packages, &below, at)?;
                stamp = cooked.stamp;
                env.extend(cooked.env.clone());
                lowers.insert(0, cooked.lower.clone());
                let span = Span::current();
                scope.spawn(move || laid.put(at, span.in_scope(|| self.pack(cooked))));
                let millis = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
                let report = StepReport { name: plan.name.clone(), cached: false, millis };
                tell(self.run, reports.len(), &report);
                reports.push(report);
            }
            Ok(())
        })
    }

    /// Extracted at once too: the image's tests and the first launch need it.
    fn pack(&self, cooked: Cooked) -> Result<Made, BakeError> {
        let Cooked { tree, shift, stamp, env, .. } = cooked;
        let whiteouts = if shift == 0 { Whiteouts::None } else { Whiteouts::Overlay };
        let packer = Packer { whiteouts, newest: stamp, shift };
        let (put, took) = timings::watch(Phase::Write, || self.store.put_layer(&packer, &tree));
        let (packed, hashing) = put?;
        self.run.timings.add(Phase::Hash, hashing);
        self.run.timings.add(Phase::Write, took.saturating_sub(hashing));
        Ok(Made { digest: packed.diff_id, size: packed.size, stamp, env })
    }

    /// The trees of the layers that are there, the topmost first.
    fn mount_below(&self, work: &Work, below: &[Layer]) -> Result<Vec<PathBuf>, BakeError> {
        let mut lowers = Vec::new();
        for (at, layer) in below.iter().enumerate() {
            let tree = self.store.layer_tree(&layer.diff_id)?;
            let target = work.folder(&format!("b{at}"), SHIFT)?;
            mount_shifted(&tree, &target, true)?;
            lowers.insert(0, target);
        }
        Ok(lowers)
    }

    fn cook(
        &self,
        plan: &Plan<'_>,
        work: &Work,
        store: &PackageStore,
        below: &Below<'_>,
        at: usize,
    ) -> Result<Cooked, BakeError> {
        let Below { lowers, stamp, .. } = *below;
        let sandbox = Sandbox {
            config: self.config,
            build: &self.run.build,
            work,
            log: &self.run.log,
            cancel: &self.run.cancel,
        };
        let timings = &self.run.timings;
        let installer =
            Installer { sandbox: &sandbox, store, architecture: &self.lock.architecture, timings };
        let step = match &plan.step {
            Step::Base(packages) => {
                let tree = work.folder(&format!("s{at}"), 0)?;
                let lower = work.folder(&format!("r{at}"), SHIFT)?;
                let stamp = installer.base(&plan.name, packages, &tree, &lower)?;
                seal(&tree, stamp, true).map_err(BakeError::io("seal", &tree))?;
                return Ok(Cooked { tree, lower, shift: 0, stamp, env: BTreeMap::new() });
            }
            Step::Archive(digest) => {
                let file = Contents::open(&self.config.home)?.get(digest)?;
                let (bytes, cancel) = (self.config.limits.tree, &self.run.cancel);
                return whole(work, at, |tree| {
                    let unpack = || archive::unpack(file, digest, tree, bytes, cancel);
                    timings.during(Phase::Unpack, unpack).map(Unpacked::without_env)
                });
            }
            Step::Image(place, digest) => {
                let contents = Contents::open(&self.config.home)?;
                let images = self.images(&contents);
                // What it says of the environment is in the lock.
                return whole(work, at, |tree| {
                    let unpack = || images.unpack(place, digest, tree, self.config.limits.tree);
                    timings.during(Phase::Unpack, unpack).map(Unpacked::without_env)
                });
            }
            Step::Containerfile(of) => {
                let contents = Contents::open(&self.config.home)?;
                let images = &self.images(&contents);
                let (sandbox, step, time) = (&sandbox, &plan.name, self.lock.timestamp.as_second());
                return whole(work, at, |tree| {
                    let build = Build { sandbox, images, of, at, step, time };
                    timings.during(Phase::Run, || build.run(tree))
                });
            }
            Step::Locked(step) => step,
        };
        let overlay = Overlay::mount(work, lowers, &format!("s{at}"))?;
        let (stamp, with_content) = match step {
            LockedStep::Packages { packages, .. } => {
                let newest = match installer.step(&plan.name, packages, &overlay.root, stamp)? {
                    Ok(newest) => newest,
                    Err(why) => {
                        (self.run.log)(&format!("dpkg unpacks these packages itself: {why}"));
                        drop(overlay);
                        let overlay = Overlay::mount(work, lowers, &format!("d{at}"))?;
                        let newest = installer.by_dpkg(&plan.name, packages, &overlay.root, stamp)?;
                        return self.close(overlay, newest.max(stamp), true);
                    }
                };
                (newest.max(stamp), true)
            }
            LockedStep::Files { files } => {
                let stamp = stamp.max(self.lock.timestamp.as_second());
                let contents = Contents::open(&self.config.home)?;
                let tree = Tree::open(&overlay.root, SHIFT).map_err(BakeError::io("open", &overlay.root))?;
                timings.during(Phase::Unpack, || files::put(&tree, files, &contents))?;
                (stamp, false)
            }
            LockedStep::Run { script, reach, .. } => {
                let tree = Tree::open(&overlay.root, SHIFT).map_err(BakeError::io("open", &overlay.root))?;
                let env = self.step_env(below);
                let hidden = super::install::hides_ischroot(&tree)?;
                super::install::forbid_services(&tree)?;
                let job = Job {
                    step: &plan.name,
                    root: &overlay.root,
                    script,
                    env: &env,
                    folders: &[],
                    hide_ischroot: hidden,
                    own_run: false,
                    resolver: None,
                    rights: Rights::Step,
                };
                let step = reach::Step { at, reach, upper: &overlay.upper };
                timings.during(Phase::Run, || reach::run(&sandbox, &step, &job))?;
                (stamp, true)
            }
            LockedStep::Provision(provision) => {
                // Files that it copies are as old as those of a files step.
                let stamp = stamp.max(self.lock.timestamp.as_second());
                let place = Place {
                    installer: &installer,
                    store,
                    at,
                    step: &plan.name,
                    root: &overlay.root,
                    upper: &overlay.upper,
                    env: self.step_env(&Below { stamp, ..*below }),
                };
                provision::run(provision, place)?;
                (stamp, true)
            }
        };
        self.close(overlay, stamp, with_content)
    }

    /// What a step's own programs see, where the definition does not say otherwise.
    fn step_env(&self, below: &Below<'_>) -> BTreeMap<String, String> {
        let mut env = below.env.clone();
        env.extend(self.lock.env.clone());
        for (name, value) in [
            ("PATH", PATH.to_owned()),
            ("HOME", "/root".to_owned()),
            ("DEBIAN_FRONTEND", "noninteractive".to_owned()),
            ("SOURCE_DATE_EPOCH", below.stamp.to_string()),
        ] {
            env.entry(name.to_owned()).or_insert(value);
        }
        env
    }

    fn close(&self, overlay: Overlay, stamp: i64, with_content: bool) -> Result<Cooked, BakeError> {
        let upper = overlay.upper.clone();
        drop(overlay);
        seal(&upper, stamp, with_content).map_err(BakeError::io("seal", &upper))?;
        Ok(Cooked { tree: upper.clone(), lower: upper, shift: SHIFT, stamp, env: BTreeMap::new() })
    }

    fn images<'b>(&'b self, contents: &'b Contents) -> Images<'b> {
        Images {
            config: self.config,
            architecture: &self.lock.architecture,
            contents,
            log: &self.run.log,
            cancel: &self.run.cancel,
        }
    }
}

/// What a step is done on.
#[derive(Clone, Copy)]
struct Below<'a> {
    /// The topmost first.
    lowers: &'a [PathBuf],
    /// What the image that was taken from elsewhere says.
    env: &'a BTreeMap<String, String>,
    /// Seconds: the youngest time of all.
    stamp: i64,
}

/// A root file system that was made elsewhere, unpacked into a tree by what also gives the time of its youngest file.
fn whole(
    work: &Work,
    at: usize,
    unpack: impl FnOnce(&Path) -> Result<Unpacked, BakeError>,
) -> Result<Cooked, BakeError> {
    let tree = work.folder(&format!("s{at}"), 0)?;
    let lower = work.folder(&format!("r{at}"), SHIFT)?;
    let Unpacked { newest: stamp, env } = unpack(&tree)?;
    mount_shifted(&tree, &lower, true)?;
    seal(&tree, stamp, true).map_err(BakeError::io("seal", &tree))?;
    Ok(Cooked { tree, lower, shift: 0, stamp, env })
}

/// A step's tree as it is when the step is done.
struct Cooked {
    /// To be packed.
    tree: PathBuf,
    /// To go on top of; the same, with the sandbox's owners.
    lower: PathBuf,
    shift: u32,
    stamp: i64,
    env: BTreeMap<String, String>,
}

/// A step's view: what is below, with its own changes on top.
struct Overlay {
    root: PathBuf,
    upper: PathBuf,
}

impl Overlay {
    fn mount(work: &Work, lowers: &[PathBuf], name: &str) -> Result<Self, BakeError> {
        let root = work.folder(&format!("{name}-root"), SHIFT)?;
        let upper = work.folder(&format!("{name}-upper"), SHIFT)?;
        let scratch = work.folder(&format!("{name}-work"), 0)?;
        let nothing;
        let lowers = if lowers.is_empty() {
            nothing = [work.folder(&format!("{name}-nothing"), SHIFT)?];
            &nothing
        } else {
            lowers
        };
        mount_overlay(lowers, &upper, &scratch, &root)?;
        Ok(Self { root, upper })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(error) = unmount_below(&self.root) {
            tracing::error!(path = %self.root.display(), %error, "an overlay stays mounted until its bake ends");
        }
    }
}
