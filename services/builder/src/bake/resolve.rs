//! A definition's inputs, exactly: the lock.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use jiff::Timestamp;
use kiln_formats::containerfile;
use kiln_image::{ForeignConfig, ImageStore, Stack};
use kiln_model::architecture::Architecture;
use kiln_model::definition::{
    ArchivePlace, ArchiveSpec, ContainerfileSpec, DebianVariant, Definition, FileSpec, ImagePlace,
    Provisioner, RunStep, Source, Step,
};
use kiln_model::digest::Digest;
use kiln_model::lock::{
    BUILDER_FORMAT, Containerfile, Lock, LockedBase, LockedFile, LockedPackage, LockedStep, Provision,
};
use kiln_model::revision::PackageVersions;
use kiln_service::emulation;
use tokio_util::sync::CancellationToken;

use super::apt::{Apt, Solved, is_request};
use super::context::{Contents, Context};
use super::error::BakeError;
use super::fetch::Transport;
use super::foreign::Images;
use super::packages::PackageStore;
use super::snapshot::Snapshot;
use super::solutions::Solutions;
use super::system::System;
use super::{
    BakeConfig, Current, DebianRoot, LogSink, ParentImage, Resolution, archive, buildah, provision, secrets,
    security, sources,
};
use crate::describe;

pub(crate) struct Resolver<'a> {
    pub(crate) config: &'a BakeConfig,
    pub(crate) definition: &'a Definition,
    pub(crate) context: &'a Path,
    pub(crate) parent: Option<&'a ParentImage>,
    pub(crate) timestamp: Timestamp,
    pub(crate) pinned: Option<&'a Lock>,
    pub(crate) current: Option<&'a Current>,
    pub(crate) log: &'a LogSink,
    pub(crate) cancel: &'a CancellationToken,
    pub(crate) contents: Contents,
    /// Of the root file system's archive, once it was read.
    pub(crate) archive: OnceCell<(Digest, u64)>,
    /// The image that others have made, once it was found.
    pub(crate) image: OnceCell<(Digest, ForeignConfig)>,
    /// The images that the Containerfile named when the lock was made that is to be kept.
    pub(crate) bases: OnceCell<BTreeMap<String, Digest>>,
}

/// Of each playbook and manifest: the packages that it is run by, and what the archives held.
type Provisions = Vec<(Vec<LockedPackage>, Digest)>;

/// The packages of the base, and those of each `packages` step; and of each step that installs packages by itself, what it is
/// run with.
struct Packages {
    base: Vec<LockedPackage>,
    steps: Vec<Vec<LockedPackage>>,
    provisions: Provisions,
    /// Of the release files, where any were asked for.
    archives: Option<Digest>,
}

impl Resolver<'_> {
    pub(crate) fn resolve(&self) -> Result<Resolution, BakeError> {
        let requested = self.requested()?;
        if let Source::Containerfile(spec) = &self.definition.image.from {
            secrets::are_known(&spec.secrets, self.config)?;
        }
        for reach in self.definition.image.steps.iter().filter_map(Step::reach) {
            secrets::are_known(&reach.secrets, self.config)?;
        }
        match self.pinned_packages(&requested)? {
            Some(packages) => {
                let security = PackageVersions::new();
                Ok(Resolution { lock: self.lock(packages)?, security, release_files: None })
            }
            None => self.solve(&requested),
        }
    }

    fn transport(&self) -> Transport<'_> {
        self.config.transport(self.log, self.cancel)
    }

    /// What processors the image is for, where this machine can run what is to be in it.
    fn architecture(&self) -> Result<Architecture, BakeError> {
        let architecture = match (self.definition.image.architecture, self.parent) {
            (Some(architecture), _) => architecture,
            (None, Some(parent)) => self.of_parent(parent)?,
            (None, None) => of_machine()?,
        };
        emulation::can_run(architecture).map_err(|why| BakeError::Machine {
            what: format!("architecture {architecture}"),
            why,
            remedy: emulation::REMEDY.to_owned(),
        })?;
        Ok(architecture)
    }

    fn of_parent(&self, parent: &ParentImage) -> Result<Architecture, BakeError> {
        let image = ImageStore::open(&self.config.images)?.image(&parent.digest)?;
        let name = image.config.architecture().to_string();
        Architecture::named(&name).ok_or_else(|| BakeError::Definition {
            what: format!("parent image {}", parent.digest.short()),
            why: format!("it is for {}", name.escape_debug()),
            remedy: "begin with an image for amd64 or arm64".to_owned(),
        })
    }

    fn lock(&self, packages: Packages) -> Result<Lock, BakeError> {
        let image = &self.definition.image;
        // What the definition says comes last, and so wins.
        let mut env = BTreeMap::new();
        let base = match &image.from {
            Source::Scratch => LockedBase::Scratch,
            Source::Debian { suite, variant, .. } => LockedBase::Debian {
                suite: suite.to_string(),
                variant: variant_name(*variant).to_owned(),
                packages: packages.base,
            },
            Source::Archive { place, .. } => {
                let (digest, size) = self.archive(place)?;
                LockedBase::Archive { digest, size }
            }
            Source::Image { place, .. } => {
                let (digest, config) = self.others_image(place)?;
                env.extend(config.env.clone());
                LockedBase::Image { place: place.clone(), digest: *digest }
            }
            Source::Containerfile(spec) => LockedBase::Containerfile(self.containerfile(spec)?),
            Source::Server { name } => LockedBase::Server { image_digest: self.parent_image(name)?.digest },
        };
        env.extend(image.env.clone());
        let context = Context::open(self.context, &self.contents, &self.definition.name, &image.env)?;
        let mut added = packages.steps.into_iter();
        let mut provisions = packages.provisions.into_iter();
        let steps = image.steps.iter().map(|step| {
            Ok(match step {
                Step::Packages(requested) => LockedStep::Packages {
                    requested: requested.clone(),
                    packages: added.next().unwrap_or_default(),
                },
                Step::Files(specs) => LockedStep::Files { files: context.files(specs)? },
                Step::Run(RunStep { script, reach }) => LockedStep::Run {
                    script: script.clone(),
                    reach: reach.clone(),
                    archives: packages.archives.filter(|_| reach.network),
                },
                Step::Provision(spec) => {
                    let (tools, snapshot) =
                        provisions.next().ok_or_else(|| no_archive("nothing was resolved"))?;
                    LockedStep::Provision(Provision {
                        by: spec.by.clone(),
                        file: spec.file.rsplit('/').next().unwrap_or_default().to_owned(),
                        files: all_files(&context, spec.folder())?,
                        idempotent: spec.idempotent,
                        reach: spec.reach.clone(),
                        host: self.definition.name.to_string(),
                        tools,
                        snapshot,
                    })
                }
            })
        });
        Ok(Lock {
            format: BUILDER_FORMAT,
            architecture: self.architecture()?.to_string(),
            base,
            steps: steps.collect::<Result<_, BakeError>>()?,
            env,
            user: image.user.clone(),
            command: image.command.clone(),
            timestamp: self.timestamp,
        })
    }

    fn requested(&self) -> Result<Vec<&Vec<String>>, BakeError> {
        let lists: Vec<_> = self
            .definition
            .image
            .steps
            .iter()
            .filter_map(|step| if let Step::Packages(list) = step { Some(list) } else { None })
            .collect();
        match lists.iter().flat_map(|list| list.iter()).find(|name| !is_request(name)) {
            None => Ok(lists),
            Some(name) => Err(BakeError::Definition {
                what: format!("package `{}`", name.escape_debug()),
                why: "it is not a package's name".to_owned(),
                remedy: "write `name`, or `name=version`".to_owned(),
            }),
        }
    }

    fn provisioners(&self) -> Vec<&Provisioner> {
        let steps = self.definition.image.steps.iter().filter_map(|step| match step {
            Step::Provision(spec) => Some(&spec.by),
            _ => None,
        });
        steps.collect()
    }

    fn needs_no_archive(&self, requested: &[&Vec<String>]) -> bool {
        requested.iter().all(|list| list.is_empty()) && self.provisioners().is_empty()
    }

    fn parent_image(&self, name: &impl std::fmt::Display) -> Result<&ParentImage, BakeError> {
        self.parent.ok_or_else(|| BakeError::Definition {
            what: format!("from server {name}"),
            why: "it has no image yet".to_owned(),
            remedy: "apply it, and wait for its first build".to_owned(),
        })
    }

    /// Those of the pinned lock, where base and lists are what they were, so that solving would begin at the same place.
    fn pinned_packages(&self, requested: &[&Vec<String>]) -> Result<Option<Packages>, BakeError> {
        let architecture = self.architecture()?.as_str();
        let is_alike = |lock: &&Lock| lock.format == BUILDER_FORMAT && lock.architecture == architecture;
        let Some(pinned) = self.pinned.filter(is_alike) else { return Ok(None) };
        let base = match (&pinned.base, &self.definition.image.from) {
            (LockedBase::Scratch, Source::Scratch) => Vec::new(),
            (
                LockedBase::Debian { suite, variant, packages },
                Source::Debian { suite: s, variant: v, .. },
            ) if suite == s.as_str() && variant == variant_name(*v) => packages.clone(),
            // On another parent image other packages may be missing.
            (LockedBase::Server { image_digest }, Source::Server { .. })
                if self.needs_no_archive(requested)
                    || Some(*image_digest) == self.parent.map(|parent| parent.digest) =>
            {
                Vec::new()
            }
            // On another root file system too.
            (LockedBase::Archive { digest, .. }, Source::Archive { place, .. })
                if self.needs_no_archive(requested) || *digest == self.archive(place)?.0 =>
            {
                Vec::new()
            }
            // What the tag meant then.
            (LockedBase::Image { place, digest }, Source::Image { place: wanted, .. }) if place == wanted => {
                self.keep_others_image(place, digest)?;
                Vec::new()
            }
            // What its names meant then.
            (LockedBase::Containerfile(of), Source::Containerfile(_)) => {
                self.bases.get_or_init(|| of.images.clone());
                Vec::new()
            }
            _ => return Ok(None),
        };
        let locked: Vec<_> = pinned
            .steps
            .iter()
            .filter_map(|step| match step {
                LockedStep::Packages { requested, packages } => Some((requested, packages)),
                LockedStep::Files { .. } | LockedStep::Run { .. } | LockedStep::Provision(_) => None,
            })
            .collect();
        let same = locked.iter().map(|(list, _)| *list).eq(requested.iter().copied());
        Ok(self.kept_provisions(pinned).filter(|_| same).map(|provisions| Packages {
            base,
            steps: locked.into_iter().map(|(_, packages)| packages.clone()).collect(),
            provisions,
            archives: archives_of(pinned),
        }))
    }

    /// It can be large: it is read once.
    fn archive(&self, place: &ArchivePlace) -> Result<(Digest, u64), BakeError> {
        if let Some(known) = self.archive.get() {
            return Ok(*known);
        }
        let taken = archive::take(place, self.context, &self.contents, self.transport())?;
        Ok(*self.archive.get_or_init(|| taken))
    }

    fn images(&self) -> Result<Images<'_>, BakeError> {
        Ok(Images {
            config: self.config,
            architecture: self.architecture()?.as_str(),
            contents: &self.contents,
            log: self.log,
            cancel: self.cancel,
        })
    }

    /// What a registry has under a tag may change at any time: it is asked once.
    fn others_image(&self, place: &ImagePlace) -> Result<&(Digest, ForeignConfig), BakeError> {
        if let Some(known) = self.image.get() {
            return Ok(known);
        }
        let found = self.images()?.find(place, self.context)?;
        Ok(self.image.get_or_init(|| found))
    }

    /// Takes that image, whatever is under the tag now.
    fn keep_others_image(&self, place: &ImagePlace, digest: &Digest) -> Result<(), BakeError> {
        let found = self.images()?.find_again(place, digest)?;
        self.image.get_or_init(|| found);
        Ok(())
    }

    /// With what each of its images is now, or was in the lock that is kept.
    fn containerfile(&self, spec: &ContainerfileSpec) -> Result<Containerfile, BakeError> {
        let nothing = BTreeMap::new();
        let context = Context::open(self.context, &self.contents, &self.definition.name, &nothing)?;
        let files = all_files(&context, &spec.context)?;
        let file = spec.file_in_context().unwrap_or_default().to_owned();
        let text = buildah::read(&file, &files, &self.contents)?;
        let names = containerfile::images(&text, &spec.args, self.architecture()?.as_str())
            .map_err(|refused| buildah::not_understood(&file, &refused))?;
        let kept = self.bases.get();
        let images = names.into_iter().map(|name| {
            let reference = buildah::reference(&name)?;
            let digest = match kept.and_then(|kept| kept.get(&name)) {
                Some(digest) => *digest,
                None => self.images()?.find(&ImagePlace::Registry(reference), self.context)?.0,
            };
            Ok((name, digest))
        });
        Ok(Containerfile {
            file,
            images: images.collect::<Result<_, BakeError>>()?,
            files,
            target: spec.target.clone(),
            args: spec.args.clone(),
            secrets: spec.secrets.clone(),
        })
    }

    fn solve(&self, requested: &[&Vec<String>]) -> Result<Resolution, BakeError> {
        let (suite, root, base_wanted, status) = match &self.definition.image.from {
            Source::Scratch => return self.nothing_to_solve(requested, "the source is scratch"),
            Source::Debian { suite, variant, archives } => {
                let root = self.own_root(archives);
                let mut wanted = vec!["?essential".to_owned()];
                if *variant == DebianVariant::Minbase {
                    // What debootstrap and mmdebstrap call minbase.
                    wanted.extend(["?priority(required)".to_owned(), "apt".to_owned()]);
                }
                (suite.clone(), root, wanted, None)
            }
            Source::Server { name } => {
                let parent = self.parent_image(name)?;
                let Some(root) = &parent.debian else {
                    return self.nothing_to_solve(requested, "its first parent is from scratch");
                };
                if self.needs_no_archive(requested) {
                    return self.nothing_to_solve(requested, "");
                }
                let what = format!("parent image {}", parent.digest.short());
                let system =
                    System::of_stack(&ImageStore::open(&self.config.images)?.stack(&parent.digest)?)?;
                let suite = root.suite.clone().map_or_else(|| system.suite(&what), Ok)?;
                let status = system.keep_status(&what, &parent.digest, &self.config.home)?;
                (suite, root.clone(), Vec::new(), Some(status))
            }
            Source::Containerfile(_) => {
                return self.nothing_to_solve(requested, "it begins with what a Containerfile makes");
            }
            Source::Archive { place, archives } => {
                if self.needs_no_archive(requested) {
                    return self.nothing_to_solve(requested, "");
                }
                let (digest, _) = self.archive(place)?;
                let what = format!("archive {}", digest.short());
                let system = archive::look(self.contents.get(&digest)?, &digest, self.cancel)?;
                let status = system.keep_status(&what, &digest, &self.config.home)?;
                (system.suite(&what)?, self.own_root(archives), Vec::new(), Some(status))
            }
            Source::Image { place, archives } => {
                if self.needs_no_archive(requested) {
                    return self.nothing_to_solve(requested, "");
                }
                let (digest, _) = self.others_image(place)?;
                let system = self.images()?.system(place, digest)?;
                let what = place.to_string();
                let status = system.keep_status(&what, digest, &self.config.home)?;
                (system.suite(&what)?, self.own_root(archives), Vec::new(), Some(status))
            }
        };
        let keys = self.config.home.join("apt/keys");
        let archives = sources::archives(&suite, &root, &self.config.archives, &keys)?;
        let apt = Apt::open(&self.config.home, self.architecture()?.as_str(), &archives, self.transport())?;
        apt.update(self.cancel)?;
        let began = Instant::now();
        let package_lists = apt.package_lists(self.cancel)?;
        let release_files = Apt::release_files(&package_lists)?;
        let solutions = Solutions::open(apt.folder(), apt.configuration(), &release_files)?;
        let mut lists: Vec<&[String]> = requested.iter().map(|list| list.as_slice()).collect();
        lists.insert(0, &base_wanted);
        let solver = Solver { apt: &apt, status: status.as_deref(), cancel: self.cancel };
        let mut added = solutions.get_or(&lists, solver.status, || {
            let mut added = solver.each(&lists)?;
            security::mark(&package_lists, added.iter_mut().flatten())?;
            Ok(added)
        })?;
        let mut all: Vec<Solved> = added.concat();
        let security = all.iter().filter(|solved| solved.security);
        let security =
            security.map(|Solved { package, .. }| (package.name.clone(), package.version.clone())).collect();
        let base = packages_of(&added.remove(0));
        let steps = added.iter().map(|solved| packages_of(solved)).collect();
        let archives_now = Digest::of_json(&release_files)
            .map_err(|error| BakeError::io("name", "release files")(error.into()))?;
        let mut packages = Packages { base, steps, provisions: Vec::new(), archives: Some(archives_now) };
        if let Some(lock) = self.stays_in_force(&packages, &apt)? {
            return Ok(Resolution { lock, security, release_files: Some(release_files) });
        }
        let provisioners = self.provisioners();
        if !provisioners.is_empty() {
            let snapshot = Snapshot::keep(&self.config.home, &archives, &package_lists)?;
            for by in provisioners {
                let wanted: Vec<String> = provision::packages(by).into_iter().map(str::to_owned).collect();
                // Beside the image, so on top of nothing.
                let solve = || Ok(vec![apt.solve(&wanted, None, self.cancel)?]);
                let tools = solutions.get_or(&[&wanted], None, solve)?.concat();
                packages.provisions.push((packages_of(&tools), snapshot));
                all.extend(tools);
            }
        }
        PackageStore::open(&self.config.packages)?.remember(&all)?;
        (self.log)(&format!("resolved {} packages ({} ms)", all.len(), began.elapsed().as_millis()));
        Ok(Resolution { lock: self.lock(packages)?, security, release_files: Some(release_files) })
    }

    /// The lock in force, where nothing differs but what archives hold that its playbooks and manifests have not installed: an
    /// archive that has moved on elsewhere is no reason to run them again.
    fn stays_in_force(&self, packages: &Packages, apt: &Apt<'_>) -> Result<Option<Lock>, BakeError> {
        let Some(Current { lock: in_force, image }) = self.current else { return Ok(None) };
        let Some(provisions) = self.kept_provisions(in_force) else { return Ok(None) };
        let archives = archives_of(in_force);
        if provisions.is_empty() && archives.is_none() {
            return Ok(None);
        }
        let (base, steps) = (packages.base.clone(), packages.steps.clone());
        let lock = self.lock(Packages { base, steps, provisions, archives })?;
        if lock != *in_force {
            return Ok(None);
        }
        match self.has_upgrades(in_force, image, apt) {
            Ok(false) => Ok(Some(lock)),
            Ok(true) => Ok(None),
            Err(BakeError::Cancelled) => Err(BakeError::Cancelled),
            // Another builder may have made the image, it was collected, or a step took dpkg's database away.
            Err(error) => {
                (self.log)(&format!("nobody can tell what could be newer in the image in force: {error}"));
                Ok(None)
            }
        }
    }

    /// Whether an archive has a newer version of what the playbooks and manifests of an image have installed.
    fn has_upgrades(&self, lock: &Lock, image: &Digest, apt: &Apt<'_>) -> Result<bool, BakeError> {
        let stack = ImageStore::open(&self.config.images)?.stack(image)?;
        let what = format!("image {}", image.short());
        let installed = installed_by_provisions(lock, &stack, &what)?;
        let status = System::of_stack(&stack)?.keep_status(&what, image, &self.config.home)?;
        let upgrades = apt.upgrades(&status, self.cancel)?;
        Ok(upgrades.iter().any(|solved| installed.contains(&solved.package.name)))
    }

    /// What the steps of a lock are run with, where they are run by the same programs, and what the archives held is kept.
    fn kept_provisions(&self, lock: &Lock) -> Option<Provisions> {
        let locked: Vec<&Provision> = lock
            .steps
            .iter()
            .filter_map(|step| if let LockedStep::Provision(it) = step { Some(it) } else { None })
            .collect();
        let names = locked.iter().map(|it| it.by.as_str());
        let same = names.eq(self.provisioners().into_iter().map(Provisioner::as_str));
        let are_kept = locked.iter().all(|it| Snapshot::open(&self.config.home, &it.snapshot).is_ok());
        (same && are_kept).then(|| locked.iter().map(|it| (it.tools.clone(), it.snapshot)).collect())
    }

    fn nothing_to_solve(&self, requested: &[&Vec<String>], why: &str) -> Result<Resolution, BakeError> {
        if self.needs_no_archive(requested) {
            let steps = requested.iter().map(|_| Vec::new()).collect();
            let packages = Packages { base: Vec::new(), steps, provisions: Vec::new(), archives: None };
            let (lock, security) = (self.lock(packages)?, PackageVersions::new());
            return Ok(Resolution { lock, security, release_files: Some(Vec::new()) });
        }
        Err(no_archive(why))
    }

    fn own_root(&self, archives: &[ArchiveSpec]) -> DebianRoot {
        DebianRoot { suite: None, archives: archives.to_vec(), context: self.context.to_owned() }
    }
}

fn no_archive(why: &str) -> BakeError {
    BakeError::Definition {
        what: "packages".to_owned(),
        why: format!("there is no archive to take them from: {why}"),
        remedy: "begin with `from: { debian: … }`, or leave packages and playbooks out".to_owned(),
    }
}

/// The release files' digest that scripts which could install from them were run with.
fn archives_of(lock: &Lock) -> Option<Digest> {
    lock.steps.iter().find_map(|step| match step {
        LockedStep::Run { archives, .. } => *archives,
        _ => None,
    })
}

/// The names of what playbooks, manifests and scripts with a network have installed: packages that were not there before them,
/// or in another version.
fn installed_by_provisions(lock: &Lock, stack: &Stack, what: &str) -> Result<BTreeSet<String>, BakeError> {
    let versions = |layers: usize| -> Result<PackageVersions, BakeError> {
        Ok(describe::versions(&describe::of_system(&System::of_stack(&stack.lowest(layers))?, what)?))
    };
    let below = stack.layers().saturating_sub(lock.steps.len());
    let mut names = BTreeSet::new();
    let can_install = |step: &LockedStep| {
        matches!(step, LockedStep::Provision(_) | LockedStep::Run { archives: Some(_), .. })
    };
    for (at, _) in lock.steps.iter().enumerate().filter(|(_, step)| can_install(step)) {
        let (before, after) = (versions(below + at)?, versions(below + at + 1)?);
        let differs = |name: &&String| before.get(*name) != after.get(*name);
        names.extend(after.keys().filter(differs).cloned());
    }
    Ok(names)
}

/// All that lies in the folder of a playbook, a manifest or a Containerfile, but for `server.yaml`: what is said there of how
/// instances run changes no image.
fn all_files(context: &Context<'_>, folder: &str) -> Result<Vec<LockedFile>, BakeError> {
    let all = FileSpec {
        src: folder.to_owned(),
        dest: "/".to_owned(),
        mode: None,
        owner: "root:root".to_owned(),
        template: false,
    };
    let mut files = context.files(&[all])?;
    files.retain(|file| folder != "." || file.dest != "/server.yaml");
    Ok(files)
}

/// What each list adds to the ones before it.
struct Solver<'a> {
    apt: &'a Apt<'a>,
    status: Option<&'a Path>,
    cancel: &'a CancellationToken,
}

impl Solver<'_> {
    fn each(&self, lists: &[&[String]]) -> Result<Vec<Vec<Solved>>, BakeError> {
        // As many at once as there are processors: each list with all before it. Nearly always what one gives holds what the
        // one before gave.
        let next = AtomicUsize::new(1);
        let threads = thread::available_parallelism().map_or(2, NonZero::get).min(lists.len());
        let mut guesses: Vec<(usize, Result<Vec<Solved>, BakeError>)> = thread::scope(|scope| {
            let work = || {
                let mut done = Vec::new();
                while let Some(some) = lists.get(..next.fetch_add(1, Ordering::Relaxed)) {
                    let solved = self.solve(&some.concat());
                    let failed = solved.is_err();
                    done.push((some.len(), solved));
                    if failed {
                        break;
                    }
                }
                done
            };
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let panicked = |_| vec![(0, Err(BakeError::Cancelled))];
            threads.into_iter().flat_map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        });
        guesses.sort_by_key(|(length, _)| *length);
        let guesses = guesses.into_iter().map(|(_, guess)| guess).collect::<Result<Vec<_>, _>>()?;
        let grows = guesses.windows(2).all(|pair| pair[0].iter().all(|solved| pair[1].contains(solved)));
        if !grows {
            return self.one_after_the_other(lists);
        }
        let mut known = BTreeSet::new();
        Ok(guesses
            .into_iter()
            .map(|solved| {
                solved.into_iter().filter(|solved| known.insert(solved.package.name.clone())).collect()
            })
            .collect())
    }

    /// A later list made apt choose otherwise for an earlier one: what an earlier step has stays what it is.
    fn one_after_the_other(&self, lists: &[&[String]]) -> Result<Vec<Vec<Solved>>, BakeError> {
        let mut all: Vec<Solved> = Vec::new();
        let mut added = Vec::new();
        for list in lists {
            let mut wanted: Vec<String> =
                all.iter().map(|s| format!("{}={}", s.package.name, s.package.version)).collect();
            wanted.extend_from_slice(list);
            let mut new = self.solve(&wanted)?;
            new.retain(|solved| all.iter().all(|known| known.package.name != solved.package.name));
            all.extend_from_slice(&new);
            added.push(new);
        }
        Ok(added)
    }

    fn solve(&self, wanted: &[String]) -> Result<Vec<Solved>, BakeError> {
        if wanted.is_empty() { Ok(Vec::new()) } else { self.apt.solve(wanted, self.status, self.cancel) }
    }
}

fn packages_of(solved: &[Solved]) -> Vec<LockedPackage> {
    solved.iter().map(|solved| solved.package.clone()).collect()
}

fn of_machine() -> Result<Architecture, BakeError> {
    Architecture::of_machine().ok_or_else(|| BakeError::Machine {
        what: format!("processor {}", std::env::consts::ARCH),
        why: "Kiln makes images for amd64 and arm64".to_owned(),
        remedy: "say which of them in `image.architecture`, or run the builder on one of these".to_owned(),
    })
}

fn variant_name(variant: DebianVariant) -> &'static str {
    match variant {
        DebianVariant::Minbase => "minbase",
        DebianVariant::Essential => "essential",
    }
}
