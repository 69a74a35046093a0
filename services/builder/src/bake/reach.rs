//! Steps that reach more than the image: a network, and secrets.

use std::fs;
use std::path::Path;

use kiln_model::definition::Reach;

use super::error::BakeError;
use super::network::Resolver;
use super::sandbox::{Access, Folder, Job, Sandbox};
use super::secrets::{self, Secrets};
use super::tree::{SHIFT, Tree};

/// What tells a step from others of its bake.
pub(crate) struct Step<'a> {
    pub(crate) at: usize,
    pub(crate) reach: &'a Reach,
    /// What it changes, without what lies below.
    pub(crate) upper: &'a Path,
}

/// Runs a step's job, which can reach what the step says; refuses what it leaves where that holds a secret.
pub(crate) fn run(sandbox: &Sandbox<'_>, step: &Step<'_>, job: &Job<'_>) -> Result<(), BakeError> {
    let Step { at, reach, upper } = step;
    if reach.is_nothing() {
        return sandbox.run(job);
    }
    let told = Secrets::read(&reach.secrets, sandbox.config)?;
    let folder = sandbox.work.folder(&format!("secrets{at}"), SHIFT)?;
    told.put(&folder)?;
    let mut folders = job.folders.to_vec();
    if !told.is_empty() {
        folders.push(Folder { outside: folder.clone(), inside: secrets::INSIDE, access: Access::Read });
    }
    let tree = Tree::open(job.root, SHIFT).map_err(BakeError::io("open", job.root))?;
    let resolver = reach.network.then(|| Resolver::new(sandbox.work.path(), &tree)).transpose()?;
    let log = told.hide_in(sandbox.log);
    let sandbox = Sandbox { log: &log, ..*sandbox };
    let job = Job {
        folders: &folders,
        // Where it sees secrets, and where the mount for them leaves nothing.
        own_run: true,
        resolver: resolver.as_ref().map(Resolver::file),
        ..*job
    };
    let ran = sandbox.run(&job).map_err(|error| match error {
        BakeError::Step { step, why, last_lines } => {
            let last_lines = last_lines.iter().map(|line| told.hide(line).into_owned()).collect();
            BakeError::Step { step, why, last_lines }
        }
        other => other,
    });
    fs::remove_dir_all(&folder).map_err(BakeError::io("remove", &folder))?;
    ran?;
    if let Some(resolver) = &resolver {
        resolver.leave(&tree)?;
    }
    told.look_for(job.step, upper)
}
