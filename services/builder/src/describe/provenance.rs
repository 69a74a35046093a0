//! Where an image comes from: SLSA provenance, version 1, in an in-toto statement.
//! Sources: the in-toto attestation framework's Statement v1, and SLSA's Provenance v1.

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::digest::Digest;
use kiln_model::lock::{Lock, LockedBase, LockedFile, LockedFileKind, LockedPackage, LockedStep};
use kiln_model::name::BuildId;
use serde_json::{Value, json};

/// How the lock, which is among the inputs, is turned into the image: the version is that of the lock's format.
const BUILD_TYPE: &str = "urn:kiln:bake:v1";
const BUILDER: &str = "urn:kiln:builder";

/// What a build knows of how an image was made, beside its lock.
#[derive(Debug, Clone)]
pub struct Provenance {
    pub build: BuildId,
    pub lock: Lock,
    pub lock_key: Digest,
    pub definition: Digest,
    /// Git's name for where the definition was taken from; empty for a folder.
    pub commit: String,
    pub cause: Cause,
    pub begun: Timestamp,
    pub ended: Timestamp,
}

/// The statement on an image. What people decided is an external parameter, what Kiln resolved from it an internal one.
pub(crate) fn statement(image: &Digest, made: &Provenance) -> Value {
    let Provenance { build, lock, lock_key, definition, commit, cause, begun, ended } = made;
    let server = &build.server;
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": server, "digest": sha256(image)}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "server": server,
                    "definition": {"digest": sha256(definition)},
                    "commit": commit,
                    "cause": {"kind": cause.kind, "id": cause.id, "actor": cause.actor, "summary": cause.summary},
                },
                "internalParameters": {"lock": {"digest": sha256(lock_key)}, "architecture": lock.architecture},
                "resolvedDependencies": dependencies(lock, commit),
            },
            "runDetails": {
                "builder": {"id": BUILDER, "version": {"kiln": env!("CARGO_PKG_VERSION")}},
                "metadata": {"invocationId": build, "startedOn": begun, "finishedOn": ended},
            },
        },
    })
}

fn sha256(digest: &Digest) -> Value {
    json!({"sha256": digest.hex()})
}

/// Everything that goes into the image, in the order in which it does.
fn dependencies(lock: &Lock, commit: &str) -> Vec<Value> {
    let mut all = Vec::new();
    if !commit.is_empty() {
        all.push(json!({"name": "definition", "digest": {"gitCommit": commit}}));
    }
    match &lock.base {
        LockedBase::Scratch => {}
        LockedBase::Debian { packages, .. } => all.extend(packages.iter().map(package)),
        LockedBase::Archive { digest, .. } => all.push(json!({"name": "archive", "digest": sha256(digest)})),
        LockedBase::Image { place, digest } => {
            all.push(json!({"name": place, "digest": sha256(digest)}));
        }
        LockedBase::Containerfile(of) => {
            let images = of.images.iter();
            all.extend(images.map(|(name, digest)| json!({"name": name, "digest": sha256(digest)})));
            all.extend(of.files.iter().filter_map(|file| content(file, "context")));
        }
        LockedBase::Server { image_digest } => {
            all.push(json!({"name": "parent image", "digest": sha256(image_digest)}));
        }
    }
    for step in &lock.steps {
        match step {
            LockedStep::Packages { packages, .. } => all.extend(packages.iter().map(package)),
            LockedStep::Files { files } => all.extend(files.iter().filter_map(|file| content(file, ""))),
            LockedStep::Provision(provision) => {
                let below = provision.by.as_str();
                all.extend(provision.files.iter().filter_map(|file| content(file, below)));
                all.extend(provision.tools.iter().map(package));
                all.push(json!({"name": "snapshot of the archives", "digest": sha256(&provision.snapshot)}));
            }
            LockedStep::Run { script, .. } => {
                all.push(json!({"name": "script", "digest": sha256(&Digest::of(script.as_bytes()))}));
            }
        }
    }
    all
}

fn content(file: &LockedFile, below: &str) -> Option<Value> {
    match &file.kind {
        LockedFileKind::Regular { digest, .. } => {
            Some(json!({"name": format!("{below}{}", file.dest), "digest": sha256(digest)}))
        }
        LockedFileKind::Directory | LockedFileKind::Symlink { .. } => None,
    }
}

fn package(package: &LockedPackage) -> Value {
    let LockedPackage { name, version, architecture, sha256: digest, .. } = package;
    json!({"name": format!("{name}_{version}_{architecture}.deb"), "digest": sha256(digest)})
}
