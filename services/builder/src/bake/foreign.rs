//! Images that others have made: found in a registry or in the definition's folder, brought here, and unpacked as one tree.
//!
//! Nothing that is said of an image is believed: each part has the digest that the part above it gives, the topmost that of the
//! lock.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use kiln_image::tar::Problem;
use kiln_image::{
    Blob, FOREIGN_LIMIT, Foreign, ForeignConfig, ForeignManifest, Hidden, Limits, parse_foreign,
    parse_foreign_config, parse_layout, unpack_layer,
};
use kiln_model::definition::ImagePlace;
use kiln_model::digest::Digest;
use kiln_model::repository::{ImageReference, Repository};
use kiln_service::config::Registry;
use tokio_util::sync::CancellationToken;

use super::archive;
use super::command::{self, Outcome, Stdout};
use super::context::{Contents, HashingReader, open_in};
use super::dpkg;
use super::error::BakeError;
use super::system::System;
use super::tree::open_root;
use super::{BakeConfig, LogSink, whole};

/// Of a compressed layer.
const LAYER_LIMIT: u64 = 16 << 30;
const ASK_LIMIT: Duration = Duration::from_secs(300);
const COPY_LIMIT: Duration = Duration::from_secs(1800);
/// Of one question or transfer, with a pause before each but the first that doubles. skopeo's own are for fewer failures: not
/// for a registry that is just being started behind its proxy.
const TRIES: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(50);
/// What registries and TLS say where another try would get the same answer.
const FINAL: [&str; 7] = [
    "unauthorized",
    "authentication required",
    "denied",
    "manifest unknown",
    "name unknown",
    "not found",
    "x509",
];

/// Where images are looked for, and where their parts are kept.
pub(crate) struct Images<'a> {
    pub(crate) config: &'a BakeConfig,
    pub(crate) architecture: &'a str,
    pub(crate) contents: &'a Contents,
    pub(crate) log: &'a LogSink,
    pub(crate) cancel: &'a CancellationToken,
}

/// A root file system that was taken from an image.
pub(crate) struct Unpacked {
    /// The time of its youngest file, in seconds.
    pub(crate) newest: i64,
    /// What the image says of the environment.
    pub(crate) env: BTreeMap<String, String>,
}

impl Unpacked {
    pub(crate) fn without_env(newest: i64) -> Self {
        Self { newest, env: BTreeMap::new() }
    }
}

/// Where a layer's bytes are.
type LayerSource<'a> = dyn Fn(&Blob) -> Result<File, BakeError> + 'a;

/// A manifest that is here, and what it names.
struct Found {
    digest: Digest,
    manifest: ForeignManifest,
    config: ForeignConfig,
}

impl Images<'_> {
    /// The digest of the image's manifest for the architecture, and what its configuration says. What it takes to unpack an
    /// image of the definition's folder is kept with it: the folder may not be there later.
    pub(crate) fn find(
        &self,
        place: &ImagePlace,
        context: &Path,
    ) -> Result<(Digest, ForeignConfig), BakeError> {
        let found = match place {
            ImagePlace::Registry(reference) => self.ask(reference)?,
            ImagePlace::Layout { folder, tag } => {
                self.of_layout(&Layout { context, folder }, tag.as_deref())?
            }
        };
        Ok((found.digest, found.config))
    }

    /// As [`Images::find`], of a manifest that is known.
    pub(crate) fn find_again(
        &self,
        place: &ImagePlace,
        digest: &Digest,
    ) -> Result<(Digest, ForeignConfig), BakeError> {
        let found = self.bring(place, digest)?;
        Ok((found.digest, found.config))
    }

    fn ask(&self, reference: &ImageReference) -> Result<Found, BakeError> {
        let refused = |error: kiln_image::Error| malformed(&reference.to_string(), &error.to_string());
        let top = self.inspect(reference, &[])?;
        if let Some(wanted) = reference.digest {
            same(&wanted, &top, &reference.to_string())?;
        }
        // By its digest from here on: a tag can move between two questions.
        let pinned = |digest| ImageReference { digest: Some(digest), ..reference.clone() };
        let (digest, content, manifest) = match parse_foreign(&top, self.architecture).map_err(refused)? {
            Foreign::Manifest(manifest) => (Digest::of(&top), top, manifest),
            Foreign::Index(blob) => {
                let content = self.inspect(&pinned(blob.digest), &[])?;
                same(&blob.digest, &content, &reference.to_string())?;
                let manifest = self.manifest(&content, &reference.to_string())?;
                (blob.digest, content, manifest)
            }
        };
        let text = self.inspect(&pinned(digest), &["--config"])?;
        same(&manifest.config.digest, &text, &format!("the configuration of {reference}"))?;
        let config =
            parse_foreign_config(&text, self.architecture, manifest.layers.len()).map_err(refused)?;
        self.contents.put(&content)?;
        self.contents.put(&text)?;
        Ok(Found { digest, manifest, config })
    }

    fn of_layout(&self, layout: &Layout<'_>, tag: Option<&str>) -> Result<Found, BakeError> {
        let (found, parts) = self.look(layout, tag)?;
        for layer in &found.manifest.layers {
            let (file, path) = layout.blob(layer)?;
            let (digest, _) = self.contents.put_file(&file, LAYER_LIMIT, &path)?;
            if digest != layer.digest {
                return Err(malformed(&path, "it holds something else than its name says"));
            }
        }
        for part in &parts {
            self.contents.put(part)?;
        }
        Ok(found)
    }

    /// With manifest and configuration as they are.
    fn look(&self, layout: &Layout<'_>, tag: Option<&str>) -> Result<(Found, [Vec<u8>; 2]), BakeError> {
        let shown = layout.shown();
        let refused = |error: kiln_image::Error| malformed(&shown, &error.to_string());
        let mut blob = parse_layout(&layout.small("index.json")?, tag).map_err(refused)?;
        let mut content = layout.small_blob(&blob)?;
        if let Foreign::Index(inner) = parse_foreign(&content, self.architecture).map_err(refused)? {
            blob = inner;
            content = layout.small_blob(&blob)?;
        }
        let manifest = self.manifest(&content, &shown)?;
        let text = layout.small_blob(&manifest.config)?;
        let config =
            parse_foreign_config(&text, self.architecture, manifest.layers.len()).map_err(refused)?;
        Ok((Found { digest: blob.digest, manifest, config }, [content, text]))
    }

    fn manifest(&self, content: &[u8], shown: &str) -> Result<ForeignManifest, BakeError> {
        match parse_foreign(content, self.architecture) {
            Ok(Foreign::Manifest(manifest)) => Ok(manifest),
            Ok(Foreign::Index(_)) => Err(malformed(shown, "an index that names an index")),
            Err(error) => Err(malformed(shown, &error.to_string())),
        }
    }

    /// What apt has to know of the image to add packages.
    pub(crate) fn system(&self, place: &ImagePlace, digest: &Digest) -> Result<System, BakeError> {
        let found = self.bring(place, digest)?;
        let mut system = System::default();
        for layer in found.manifest.layers.iter().rev() {
            let of_layer = archive::look(self.contents.get(&layer.digest)?, &layer.digest, self.cancel)?;
            system.os_release = system.os_release.or(of_layer.os_release);
            if system.status.is_none() {
                system.status = of_layer.status;
            }
            if system.status.is_some() && system.os_release.is_some()
                || self.hidden(layer, &|it| self.contents.get(&it.digest))?.hides(dpkg::STATUS)
            {
                break;
            }
        }
        Ok(system)
    }

    /// Onto an empty folder; gives the time of its youngest file, in seconds.
    pub(crate) fn unpack(
        &self,
        place: &ImagePlace,
        digest: &Digest,
        to: &Path,
        bytes: u64,
    ) -> Result<i64, BakeError> {
        let found = self.bring(place, digest)?;
        self.unpack_found(&found, &|layer| self.contents.get(&layer.digest), to, bytes)
    }

    /// As [`Images::unpack`], of the one image of a layout in a folder of this machine.
    pub(crate) fn unpack_layout(
        &self,
        above: &Path,
        folder: &str,
        to: &Path,
        bytes: u64,
    ) -> Result<Unpacked, BakeError> {
        let layout = Layout { context: above, folder };
        let (found, _) = self.look(&layout, None)?;
        let newest = self.unpack_found(&found, &|layer| Ok(layout.blob(layer)?.0), to, bytes)?;
        Ok(Unpacked { newest, env: found.config.env })
    }

    /// Puts an image into a folder that is not there yet, as skopeo's and buildah's transport `dir` has it.
    pub(crate) fn put_folder(
        &self,
        reference: &ImageReference,
        digest: &Digest,
        to: &Path,
    ) -> Result<(), BakeError> {
        let found = self.bring(&ImagePlace::Registry(reference.clone()), digest)?;
        fs::create_dir(to).map_err(BakeError::io("make folder", to))?;
        let version = to.join("version");
        fs::write(&version, "Directory Transport Version: 1.1\n")
            .map_err(BakeError::io("write", &version))?;
        self.contents.link(digest, &to.join("manifest.json"))?;
        let mut parts: BTreeSet<Digest> = found.manifest.layers.iter().map(|layer| layer.digest).collect();
        parts.insert(found.manifest.config.digest);
        parts.iter().try_for_each(|part| self.contents.link(part, &to.join(part.hex())))
    }

    fn unpack_found(
        &self,
        found: &Found,
        source: &LayerSource<'_>,
        to: &Path,
        bytes: u64,
    ) -> Result<i64, BakeError> {
        let root = open_root(to).map_err(BakeError::io("open", to))?;
        let mut newest = 0;
        for (layer, diff_id) in found.manifest.layers.iter().zip(&found.config.diff_ids) {
            let problem = |problem: Problem| malformed(&shown(layer), &problem.to_string());
            // Read to its end once before anything of it is written.
            let hidden = self.verified(layer, diff_id, source)?;
            hidden.remove_from(&root).map_err(problem)?;
            let tar = self.open(layer, source)?;
            newest =
                newest.max(unpack_layer(tar, &root, Limits { bytes, ..Limits::default() }).map_err(problem)?);
        }
        Ok(newest)
    }

    fn open(&self, layer: &Blob, source: &LayerSource<'_>) -> Result<impl Read + use<>, BakeError> {
        archive::open(source(layer)?, &layer.digest, self.cancel)
    }

    fn hidden(&self, layer: &Blob, source: &LayerSource<'_>) -> Result<Hidden, BakeError> {
        Hidden::read(self.open(layer, source)?, Limits::default())
            .map_err(|problem| malformed(&shown(layer), &problem.to_string()))
    }

    /// What a layer hides, where it unpacks to what the configuration says.
    fn verified(
        &self,
        layer: &Blob,
        diff_id: &Digest,
        source: &LayerSource<'_>,
    ) -> Result<Hidden, BakeError> {
        let shown = shown(layer);
        let mut tar = HashingReader::new(self.open(layer, source)?);
        let hidden = Hidden::read(&mut tar, Limits::default())
            .map_err(|problem| malformed(&shown, &problem.to_string()))?;
        io::copy(&mut tar, &mut io::sink()).map_err(|error| malformed(&shown, &error.to_string()))?;
        let found = tar.digest();
        if found == *diff_id {
            return Ok(hidden);
        }
        Err(malformed(&shown, &format!("it unpacks to {found}, and the configuration says {diff_id}")))
    }

    /// Everything that the manifest names, here.
    fn bring(&self, place: &ImagePlace, digest: &Digest) -> Result<Found, BakeError> {
        if let Some(found) = self.kept(place, digest)? {
            return Ok(found);
        }
        let ImagePlace::Registry(reference) = place else {
            return Err(BakeError::Definition {
                what: place.to_string(),
                why: "the lock names it, and it is not kept any more".to_owned(),
                remedy: "resolve it anew: build without pinning".to_owned(),
            });
        };
        self.copy(&reference.repository, digest)?;
        self.kept(place, digest)?.ok_or_else(|| malformed(&reference.to_string(), "parts of it are missing"))
    }

    fn kept(&self, place: &ImagePlace, digest: &Digest) -> Result<Option<Found>, BakeError> {
        let shown = place.to_string();
        let Some(content) = self.small(digest, &shown)? else { return Ok(None) };
        let manifest = self.manifest(&content, &shown)?;
        let Some(text) = self.small(&manifest.config.digest, &shown)? else { return Ok(None) };
        let config = parse_foreign_config(&text, self.architecture, manifest.layers.len())
            .map_err(|error| malformed(&shown, &error.to_string()))?;
        let all_here = manifest.layers.iter().all(|layer| self.contents.get(&layer.digest).is_ok());
        Ok(all_here.then_some(Found { digest: *digest, manifest, config }))
    }

    fn small(&self, digest: &Digest, shown: &str) -> Result<Option<Vec<u8>>, BakeError> {
        let Ok(file) = self.contents.get(digest) else { return Ok(None) };
        let mut content = Vec::new();
        file.take(FOREIGN_LIMIT).read_to_end(&mut content).map_err(BakeError::io("read", shown))?;
        same(digest, &content, shown)?;
        Ok(Some(content))
    }

    fn copy(&self, repository: &Repository, digest: &Digest) -> Result<(), BakeError> {
        let folder = self.contents.folder()?;
        let to = folder.path().join("image");
        let from = format!("docker://{repository}@{digest}");
        (self.log)(&format!("fetching {repository}@{}", digest.short()));
        let mut command = self.skopeo(repository);
        command.args(["copy", "--quiet"]);
        command.args(self.trust(repository, "src-")?).arg(from);
        command.arg(format!("dir:{}", to.display()));
        self.ended(&mut command, Stdout::Log, COPY_LIMIT, &format!("{repository}@{digest}"))?;
        for item in fs::read_dir(&to).map_err(BakeError::io("list", &to))? {
            let path = item.map_err(BakeError::io("list", &to))?.path();
            let file = File::open(&path).map_err(BakeError::io("open", &path))?;
            self.contents.put_file(&file, LAYER_LIMIT, &path.display().to_string())?;
        }
        Ok(())
    }

    fn inspect(&self, reference: &ImageReference, options: &[&str]) -> Result<Vec<u8>, BakeError> {
        let mut command = self.skopeo(&reference.repository);
        command.args(["inspect", "--raw"]).args(options);
        command.args(self.trust(&reference.repository, "")?);
        command.arg(format!("docker://{reference}"));
        Ok(self.ended(&mut command, Stdout::Keep, ASK_LIMIT, &reference.to_string())?.stdout)
    }

    /// With the credentials of the site for its own registry; for others with those that docker and podman would have.
    fn skopeo(&self, repository: &Repository) -> Command {
        let mut command = Command::new("skopeo");
        command.args(["--override-os", "linux", "--override-arch", self.architecture]);
        let credentials = self.site_s(repository).and_then(|registry| registry.credentials.clone());
        let of_docker =
            std::env::var_os("DOCKER_CONFIG").map(|folder| PathBuf::from(folder).join("config.json"));
        if let Some(file) = credentials.or(of_docker.filter(|file| file.is_file())) {
            command.env("REGISTRY_AUTH_FILE", file);
        }
        command
    }

    /// What the site says of the registry, where that is its own.
    fn site_s(&self, repository: &Repository) -> Option<&Registry> {
        self.config.registry.as_ref().filter(|it| it.repository.host == repository.host)
    }

    /// How a registry is known, as options whose names begin with `prefix`.
    fn trust(&self, repository: &Repository, prefix: &str) -> Result<Vec<String>, BakeError> {
        if repository.is_on_loopback() {
            return Ok(vec![format!("--{prefix}tls-verify=false")]);
        }
        let Some(authority) = self.site_s(repository).and_then(|registry| registry.ca.as_ref()) else {
            return Ok(Vec::new());
        };
        // It takes a folder, in which each `.crt` is an authority.
        let folder = self.config.home.join("registry-ca");
        fs::create_dir_all(&folder).map_err(BakeError::io("make folder", &folder))?;
        let content = fs::read(authority).map_err(BakeError::io("read", authority))?;
        let path = folder.join("ca.crt");
        whole::write(&path, &[&content]).map_err(BakeError::io("write", &path))?;
        Ok(vec![format!("--{prefix}cert-dir={}", folder.display())])
    }

    fn ended(
        &self,
        command: &mut Command,
        stdout: Stdout,
        limit: Duration,
        what: &str,
    ) -> Result<Outcome, BakeError> {
        let mut pause = FIRST_PAUSE;
        for left in (0..TRIES).rev() {
            let outcome = command::run(command, stdout, self.log, self.cancel, limit).map_err(not_there)?;
            if outcome.succeeded() {
                return Ok(outcome);
            }
            let said = outcome.last_lines.join("; ");
            if left == 0 || is_final(&said) {
                return Err(BakeError::Fetch {
                    what: what.to_owned(),
                    why: format!("{}: {said}", outcome.why(limit)),
                    remedy: "see that the builder's machine reaches the registry, that the image is there, and that the \
                             builder has credentials for it (`docker login` or `podman login` as its user)"
                        .to_owned(),
                });
            }
            (self.log)(&format!("{what} could not be fetched; again in {} s", pause.as_secs()));
            self.sleep(pause);
            pause *= 2;
        }
        Err(BakeError::Cancelled)
    }

    /// Until then, or until nobody waits for the build any more.
    fn sleep(&self, pause: Duration) {
        let end = Instant::now() + pause;
        while Instant::now() < end && !self.cancel.is_cancelled() {
            thread::sleep(TICK);
        }
    }
}

fn is_final(said: &str) -> bool {
    let said = said.to_lowercase();
    FINAL.iter().any(|words| said.contains(words))
}

fn not_there(error: BakeError) -> BakeError {
    match error {
        BakeError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => BakeError::Machine {
            what: "skopeo".to_owned(),
            why: "it fetches images from registries, and is not there".to_owned(),
            remedy: "run `apt install skopeo` on the builder's machine".to_owned(),
        },
        other => other,
    }
}

/// An OCI image layout in the definition's folder.
struct Layout<'a> {
    context: &'a Path,
    folder: &'a str,
}

impl Layout<'_> {
    fn shown(&self) -> String {
        format!("oci:{}", self.folder)
    }

    fn small(&self, name: &str) -> Result<Vec<u8>, BakeError> {
        let path = format!("{}/{name}", self.folder);
        let mut content = Vec::new();
        let file = open_in(self.context, &path)?;
        file.take(FOREIGN_LIMIT + 1).read_to_end(&mut content).map_err(BakeError::io("read", &path))?;
        if content.len() as u64 > FOREIGN_LIMIT {
            return Err(malformed(&path, &format!("it has more than {FOREIGN_LIMIT} bytes")));
        }
        Ok(content)
    }

    fn path(blob: &Blob) -> String {
        format!("blobs/sha256/{}", blob.digest.hex())
    }

    fn small_blob(&self, blob: &Blob) -> Result<Vec<u8>, BakeError> {
        let content = self.small(&Self::path(blob))?;
        same(&blob.digest, &content, &self.shown())?;
        Ok(content)
    }

    fn blob(&self, blob: &Blob) -> Result<(File, String), BakeError> {
        let path = format!("{}/{}", self.folder, Self::path(blob));
        Ok((open_in(self.context, &path)?, path))
    }
}

fn shown(layer: &Blob) -> String {
    format!("layer {}", layer.digest.short())
}

fn same(wanted: &Digest, content: &[u8], shown: &str) -> Result<(), BakeError> {
    let found = Digest::of(content);
    if found == *wanted {
        return Ok(());
    }
    Err(malformed(shown, &format!("what is there has the digest {found}, wanted {wanted}")))
}

fn malformed(what: &str, why: &str) -> BakeError {
    BakeError::Definition {
        what: what.to_owned(),
        why: why.to_owned(),
        remedy: "take an image for linux as docker, buildah or Kiln make it".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As skopeo 1.9 says it.
    #[test]
    fn what_may_be_otherwise_in_a_moment_is_tried_again() {
        for (said, is_over) in [
            (
                "pinging container registry 127.0.0.1:5091: invalid status code from registry 503 (Service Unavailable)",
                false,
            ),
            (
                "pinging container registry 127.0.0.1:5091: Get \"http://127.0.0.1:5091/v2/\": dial tcp 127.0.0.1:5091: connect: connection refused",
                false,
            ),
            (
                "reading manifest 1 in 127.0.0.1:5000/app: received unexpected HTTP status: 502 Bad Gateway",
                false,
            ),
            ("reading blob: unexpected EOF", false),
            ("reading manifest 2 in 127.0.0.1:5000/app: manifest unknown: manifest unknown", true),
            ("reading manifest 1 in 127.0.0.1:5000/app: unauthorized: authentication required", true),
            ("requested access to the resource is denied", true),
            ("tls: failed to verify certificate: x509: certificate signed by unknown authority", true),
        ] {
            assert_eq!(is_final(said), is_over, "{said}");
        }
    }
}
