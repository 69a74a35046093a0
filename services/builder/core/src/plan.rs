//! What a plan leads to, and what the end of a build leads to.

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::name::BuildId;
use kiln_model::revision::{ImageRevision, PackageVersions, Revision, RevisionContent};
use kiln_model::time::Millis;

use crate::build::{Build, PackageChange, Progress, State, package_changes};
use crate::definition::{DefinitionRef, StoredDefinition};
use crate::server::{Building, Failure, InForce, ReleaseFile, Server};
use crate::signal::Outcome;
use crate::time::after;
use crate::wanted::is_automatic;
use crate::{Illegal, Told};

/// A lock was resolved for a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub definition: DefinitionRef,
    pub lock_key: Digest,
    pub parent_image: Option<Digest>,
    /// Everything in the image: the lock's and the parent's.
    pub packages: PackageVersions,
    /// Those of them that an archive for security updates has.
    pub security: PackageVersions,
    pub release_files: Vec<ReleaseFile>,
    pub resolving: Millis,
    /// What it was made for; never empty.
    pub cause: Cause,
    pub further_causes: Vec<Cause>,
}

/// What is there for a lock key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slot {
    Free,
    Active(BuildId),
    Succeeded { build: BuildId, image: Digest },
}

/// What became of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Made {
    /// The lock and `run` are those in force.
    Unchanged,
    /// It would bring back what a rollback convicted.
    Held {
        problem: String,
    },
    /// The image is there; `run` differs, or the image was made before.
    Revision(Box<Revision>),
    /// Another server's build makes the same image.
    Joined(BuildId),
    Queued(Box<Build>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    pub server: Server,
    pub made: Made,
    pub told: Vec<Told>,
}

/// What a lock would lead to, without doing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Comparison {
    Unchanged,
    Held(String),
    /// The image in force, with another `run`.
    RunOnly,
    Image,
}

impl Planned {
    fn causes(&self) -> Vec<Cause> {
        let mut causes = vec![self.cause.clone()];
        causes.extend(self.further_causes.iter().cloned());
        causes
    }
}

pub fn compare(server: &Server, lock_key: &Digest, run: &Digest, packages: &PackageVersions) -> Comparison {
    let same_lock = |in_force: &&InForce| in_force.lock_key == *lock_key;
    match server.in_force.as_ref().filter(same_lock) {
        Some(in_force) if in_force.definition.run_digest == *run => Comparison::Unchanged,
        in_force => match server.quarantine.objection(lock_key, run, packages) {
            Some(objection) => Comparison::Held(objection),
            None if in_force.is_some() => Comparison::RunOnly,
            None => Comparison::Image,
        },
    }
}

/// A plan was made.
///
/// # Errors
/// [`Illegal::Stale`] where the definition is no longer the one to build, or a build is under way: plan anew.
pub fn planned(
    mut server: Server,
    plan: Planned,
    definition: &StoredDefinition,
    slot: Slot,
    now: Timestamp,
) -> Result<Decided, Illegal> {
    refuse_stale(&server, &plan)?;
    let causes = plan.causes();
    server.wanted = server.wanted.take().and_then(|wanted| wanted.without(&causes));
    server.failure = None;

    let comparison = compare(&server, &plan.lock_key, &plan.definition.run_digest, &plan.packages);
    if let Comparison::Held(objection) = comparison {
        let problem = format!("not built: {objection}");
        server.failure = Some(Failure { problem: problem.clone(), time: now, transient: false });
        server.settle(&causes, Outcome::Held, now);
        return Ok(Decided { server, made: Made::Held { problem }, told: Vec::new() });
    }
    if comparison == Comparison::Unchanged {
        if let Some(in_force) = &mut server.in_force {
            in_force.definition = plan.definition;
            in_force.release_files = plan.release_files;
            in_force.resolved = now;
        }
        server.settle(&causes, Outcome::Unchanged, now);
        let told =
            Told::PlanUnchanged { server: server.name.clone(), cause: plan.cause, lock_key: plan.lock_key };
        return Ok(Decided { server, made: Made::Unchanged, told: vec![told] });
    }

    if causes.iter().all(|cause| is_automatic(cause.kind)) {
        server.note_automatic(now);
    }
    // `run` alone differs: the image in force serves, also where its slot was given up meanwhile.
    let slot = match (&server.in_force, comparison) {
        (Some(in_force), Comparison::RunOnly) => {
            Slot::Succeeded { build: in_force.build.clone(), image: in_force.image }
        }
        _ => slot,
    };
    let in_force_packages =
        server.in_force.as_ref().map(|in_force| in_force.packages.clone()).unwrap_or_default();
    let number = server.builds + 1;
    let build = match &slot {
        Slot::Free => BuildId { server: server.name.clone(), number },
        Slot::Active(build) | Slot::Succeeded { build, .. } => build.clone(),
    };
    let building = Building {
        build: build.clone(),
        definition: plan.definition,
        lock_key: plan.lock_key,
        parent_image: plan.parent_image,
        packages: plan.packages,
        security: plan.security,
        release_files: plan.release_files,
        resolved: now,
        causes,
    };
    match slot {
        Slot::Succeeded { image, .. } => {
            let revision = put_in_force(&mut server, building, definition, image, now)?;
            let told = vec![Told::RevisionCreated(Box::new(revision.clone()))];
            Ok(Decided { server, made: Made::Revision(Box::new(revision)), told })
        }
        Slot::Active(_) => {
            server.building = Some(building);
            Ok(Decided { server, made: Made::Joined(build), told: Vec::new() })
        }
        Slot::Free => {
            server.builds = number;
            let changes = package_changes(&in_force_packages, &building.packages);
            let security = changes.iter().any(|change| is_security_update(change, &building.security));
            let queued = Build {
                security,
                resolving: plan.resolving,
                ..queue(build, &building, plan.cause, changes, now)
            };
            server.building = Some(building);
            Ok(Decided { server, made: Made::Queued(Box::new(queued)), told: vec![Told::BuildQueued] })
        }
    }
}

fn refuse_stale(server: &Server, plan: &Planned) -> Result<(), Illegal> {
    if server.removed {
        return Err(Illegal::Refused { reason: format!("server {} was removed", server.name) });
    }
    if let Some(building) = &server.building {
        let detail = format!("{} is under way", building.build);
        return Err(Illegal::Stale { what: format!("server {}", server.name), detail });
    }
    match server.effective() {
        Some(effective) if effective.digest == plan.definition.digest => Ok(()),
        _ => Err(Illegal::Stale {
            what: format!("server {}", server.name),
            detail: format!("definition {} is no longer the one to build", plan.definition.digest.short()),
        }),
    }
}

/// What was not in the image before mends nothing in it.
fn is_security_update(change: &PackageChange, security: &PackageVersions) -> bool {
    change.from.is_some() && change.to.as_ref().is_some_and(|to| security.get(&change.name) == Some(to))
}

fn queue(
    id: BuildId,
    building: &Building,
    cause: Cause,
    packages: Vec<PackageChange>,
    now: Timestamp,
) -> Build {
    Build {
        id,
        lock_key: building.lock_key,
        definition: building.definition.digest,
        cause,
        state: State::Queued { not_before: now },
        token: 0,
        attempts: 0,
        interruptions: 0,
        created: now,
        started: None,
        ended: None,
        resolving: Millis(0),
        security: false,
        verify: false,
        progress: Progress::default(),
        tests: Vec::new(),
        packages,
        problem: String::new(),
        transient: false,
        last_log: Vec::new(),
    }
}

/// A build of what is in force on an empty layer cache, to compare the digests. It leads to no revision.
///
/// # Errors
/// Where nothing is in force.
pub fn verify(mut server: Server, cause: Cause, now: Timestamp) -> Result<(Server, Build), Illegal> {
    let in_force = server.in_force.clone().ok_or_else(|| Illegal::Refused {
        reason: format!("server {} has no image to verify yet", server.name),
    })?;
    server.builds += 1;
    let building = Building {
        build: BuildId { server: server.name.clone(), number: server.builds },
        definition: in_force.definition,
        lock_key: in_force.lock_key,
        parent_image: in_force.parent_image,
        packages: in_force.packages,
        security: in_force.security,
        release_files: in_force.release_files,
        resolved: in_force.resolved,
        causes: vec![cause.clone()],
    };
    let mut build = queue(building.build.clone(), &building, cause, Vec::new(), now);
    build.verify = true;
    Ok((server, build))
}

/// A plan could not be made.
///
/// One that fails in a way that may pass is wanted again after a while; another waits for its inputs to change.
pub fn plan_failed(server: &mut Server, causes: &[Cause], problem: String, transient: bool, now: Timestamp) {
    server.failure = Some(Failure { problem, time: now, transient });
    if transient {
        server.wanted = server.wanted.take().map(|wanted| wanted.again(now));
    } else {
        server.wanted = server.wanted.take().and_then(|wanted| wanted.without(causes));
        server.settle(causes, Outcome::Failed, now);
    }
}

/// The build that a server awaits has ended.
///
/// # Errors
/// [`Illegal::State`] where it has not, [`Illegal::Stale`] where the server awaits another one.
pub fn adopt(
    mut server: Server,
    build: &Build,
    definition: &StoredDefinition,
    now: Timestamp,
) -> Result<(Server, Option<Revision>), Illegal> {
    let Some(building) = server.building.take().filter(|building| building.build == build.id) else {
        return Err(Illegal::Stale {
            what: format!("server {}", server.name),
            detail: format!("{} is not awaited", build.id),
        });
    };
    let causes = building.causes.clone();
    match &build.state {
        State::Succeeded { image } => {
            let run = &building.definition.run_digest;
            let convicted = server.quarantine.convicts_definition(&building.definition.digest);
            let objection = server.quarantine.objection(&building.lock_key, run, &building.packages);
            let objection = objection
                .or_else(|| convicted.then(|| "its definition was rolled back meanwhile".to_owned()));
            if let Some(objection) = objection {
                let problem = format!("{} is not shipped: {objection}", build.id);
                server.failure = Some(Failure { problem, time: now, transient: false });
                server.settle(&causes, Outcome::Held, now);
                return Ok((server, None));
            }
            let revision = put_in_force(&mut server, building, definition, *image, now)?;
            Ok((server, Some(revision)))
        }
        // It was another server's, with tests of its own: its end says nothing of this one, and the slot is free.
        State::Failed | State::Cancelled { .. } if *build.server() != server.name => {
            for cause in causes {
                server.want(cause, now);
            }
            Ok((server, None))
        }
        // What was away says nothing of what asked: that is planned anew, on a lock that may have moved on.
        State::Failed if build.transient => {
            let problem = format!("{} failed: {}", build.id, build.problem);
            server.failure = Some(Failure { problem, time: now, transient: true });
            server.want_again(causes, after(now, build.pause()));
            Ok((server, None))
        }
        State::Failed | State::Cancelled { .. } => {
            let verb = if build.state == State::Failed { "failed:" } else { "was" };
            let problem = format!("{} {verb} {}", build.id, build.problem);
            server.failure = Some(Failure { problem, time: now, transient: false });
            server.settle(&causes, Outcome::Failed, now);
            Ok((server, None))
        }
        state => {
            Err(Illegal::State { what: build.id.to_string(), state: state.as_str(), wanted: "taken over" })
        }
    }
}

fn put_in_force(
    server: &mut Server,
    building: Building,
    definition: &StoredDefinition,
    image: Digest,
    now: Timestamp,
) -> Result<Revision, Illegal> {
    if definition.digest != building.definition.digest {
        return Err(Illegal::Stale {
            what: format!("server {}", server.name),
            detail: format!("{} is not the definition that was built", definition.digest.short()),
        });
    }
    let Some(cause) = building.causes.first().cloned() else {
        return Err(Illegal::Refused {
            reason: format!("nothing asked for a revision of server {}", server.name),
        });
    };
    server.generation += 1;
    server.failure = None;
    server.settle(&building.causes, Outcome::Shipped, now);
    let revision = Revision {
        server: server.name.clone(),
        generation: server.generation,
        content: RevisionContent::Image(Box::new(ImageRevision {
            definition_digest: definition.digest,
            image_digest: image,
            run_digest: building.definition.run_digest,
            run: definition.definition.run.clone(),
            update: definition.definition.update,
            build: building.build.clone(),
            commit: building.definition.commit.clone(),
            packages: building.packages.clone(),
            cause,
        })),
        created: now,
    };
    server.in_force = Some(InForce {
        generation: server.generation,
        definition: building.definition,
        lock_key: building.lock_key,
        image,
        parent_image: building.parent_image,
        build: building.build,
        packages: building.packages,
        security: building.security,
        release_files: building.release_files,
        resolved: building.resolved,
    });
    Ok(revision)
}
