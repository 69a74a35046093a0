//! What differs between two locks beside their packages, for people.

use std::collections::{BTreeMap, BTreeSet};

use kiln_model::definition::Reach;
use kiln_model::digest::Digest;
use kiln_model::lock::{Containerfile, Lock, LockedBase, LockedFile, LockedStep, Provision};

/// More lines than this are summed up.
const MAX_LINES: usize = 50;

pub fn differences(from: &Lock, to: &Lock) -> Vec<String> {
    let mut lines = Vec::new();
    let base = |lock: &Lock| match &lock.base {
        LockedBase::Scratch => "scratch".to_owned(),
        LockedBase::Debian { suite, variant, .. } => format!("debian {suite} {variant}"),
        LockedBase::Archive { digest, .. } => format!("archive {}", digest.short()),
        LockedBase::Image { place, digest } => format!("{place} ({})", digest.short()),
        LockedBase::Containerfile(of) => format!("Containerfile {}", of.file),
        LockedBase::Server { image_digest } => format!("image {}", image_digest.short()),
    };
    let mut compare = |what: &str, from: &str, to: &str| {
        if from != to {
            lines.push(format!("{what}: {from} -> {to}"));
        }
    };
    compare("from", &base(from), &base(to));
    compare("user", &from.user, &to.user);
    compare("command", &from.command.join(" "), &to.command.join(" "));
    compare("architecture", &from.architecture, &to.architecture);
    for name in from.env.keys().chain(to.env.keys().filter(|name| !from.env.contains_key(*name))) {
        if from.env.get(name) != to.env.get(name) {
            lines.push(format!("env: {name} changed"));
        }
    }
    let (before, after) = (files(from), files(to));
    for (dest, file) in &after {
        match before.get(dest) {
            None => lines.push(format!("files: {dest} added")),
            Some(known) if known != file => lines.push(format!("files: {dest} changed")),
            Some(_) => {}
        }
    }
    lines.extend(
        before.keys().filter(|dest| !after.contains_key(*dest)).map(|dest| format!("files: {dest} removed")),
    );
    if scripts(from) != scripts(to) {
        lines.push("run: steps changed".to_owned());
    }
    lines.extend(containerfile(from, to));
    lines.extend(provisions(from, to));
    if lines.is_empty() && from.timestamp != to.timestamp {
        lines.push("files: stamped with another time".to_owned());
    }
    if lines.len() > MAX_LINES {
        let more = lines.len() - MAX_LINES;
        lines.truncate(MAX_LINES);
        lines.push(format!("and {more} more"));
    }
    lines
}

fn files(lock: &Lock) -> BTreeMap<&str, &LockedFile> {
    let steps = lock.steps.iter().flat_map(|step| match step {
        LockedStep::Files { files } => files.as_slice(),
        _ => &[],
    });
    steps.map(|file| (file.dest.as_str(), file)).collect()
}

fn containerfile(from: &Lock, to: &Lock) -> Vec<String> {
    let (LockedBase::Containerfile(before), LockedBase::Containerfile(after)) = (&from.base, &to.base) else {
        return Vec::new();
    };
    let of = |image: &str, digest: Option<&Digest>| {
        digest.map_or_else(|| format!("without {image}"), |digest| format!("{image} ({})", digest.short()))
    };
    let all: BTreeSet<&String> = before.images.keys().chain(after.images.keys()).collect();
    let moved = all.into_iter().filter(|image| before.images.get(*image) != after.images.get(*image));
    let mut lines: Vec<String> = moved
        .map(|image| {
            let (before, after) = (before.images.get(image), after.images.get(image));
            format!("containerfile: {} -> {}", of(image, before), of(image, after))
        })
        .collect();
    if before.files != after.files {
        lines.push("containerfile: files changed".to_owned());
    }
    let how = |it: &'_ Containerfile| (it.target.clone(), it.args.clone(), it.secrets.clone());
    if how(before) != how(after) {
        lines.push("containerfile: is built in another way".to_owned());
    }
    lines
}

/// Of each playbook or manifest, what makes it run anew.
fn provisions(from: &Lock, to: &Lock) -> Vec<String> {
    let (before, after) = (provisions_of(from), provisions_of(to));
    if before.len() != after.len() {
        return vec!["provision: steps changed".to_owned()];
    }
    let mut lines = Vec::new();
    for (before, after) in before.iter().zip(&after) {
        let changes = [
            ("is another one", before.file != after.file),
            (
                "is run in another way",
                before.by != after.by || before.idempotent != after.idempotent || before.reach != after.reach,
            ),
            ("files changed", before.files != after.files),
            ("is run by other packages", before.tools != after.tools),
            ("installs from archives that have changed", before.snapshot != after.snapshot),
        ];
        let changes = changes.iter().filter(|(_, so)| *so);
        lines.extend(changes.map(|(what, _)| format!("{} {}: {what}", after.by.as_str(), after.file)));
    }
    lines
}

fn provisions_of(lock: &Lock) -> Vec<&Provision> {
    let steps = lock.steps.iter().filter_map(|step| match step {
        LockedStep::Provision(provision) => Some(provision),
        _ => None,
    });
    steps.collect()
}

/// Each with what it reaches.
fn scripts(lock: &Lock) -> Vec<(&str, &Reach, &Option<Digest>)> {
    let steps = lock.steps.iter().filter_map(|step| match step {
        LockedStep::Run { script, reach, archives } => Some((script.as_str(), reach, archives)),
        _ => None,
    });
    steps.collect()
}
