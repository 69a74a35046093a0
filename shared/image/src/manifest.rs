//! Manifests and configurations: written in one canonical form, read as hostile.

use std::collections::BTreeMap;

use kiln_model::digest::Digest;
use oci_spec::image::{ImageConfiguration, ImageManifest};
use serde_json::{Value, json};

use crate::error::Error;
use crate::index::{Entry, MANIFEST_TYPE, NAME};
use crate::store::ImageStore;

pub(crate) const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const MANIFEST_LIMIT: u64 = 1 << 20;
const CONFIG_LIMIT: u64 = 4 << 20;
pub(crate) const LAYERS_LIMIT: usize = 256;

/// An image as the store holds it, its manifest and configuration checked.
#[derive(Debug, Clone)]
pub struct Image {
    pub digest: Digest,
    /// Size of the manifest.
    pub size: u64,
    pub config_digest: Digest,
    pub config: ImageConfiguration,
    /// From the lowest to the topmost.
    pub layers: Vec<Layer>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Of the uncompressed tar, so the same as the blob's digest.
    pub diff_id: Digest,
    pub size: u64,
    /// What made it, from the configuration's history.
    pub created_by: String,
    /// RFC 3339: the youngest time that is stamped on what is in it.
    pub created: String,
}

/// What a new image is made of, apart from the layers' contents.
#[derive(Debug, Clone)]
pub struct NewImage {
    /// Debian's name: `amd64`.
    pub architecture: String,
    /// RFC 3339.
    pub created: String,
    pub env: BTreeMap<String, String>,
    pub user: String,
    pub command: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub layers: Vec<Layer>,
}

impl ImageStore {
    /// Writes configuration and canonical manifest, and names the image in the index.
    ///
    /// # Errors
    /// A layer is not in the store, or something can't be written.
    pub fn put_image(&self, image: &NewImage) -> Result<Digest, Error> {
        for layer in &image.layers {
            let (_, size) = self.open_blob(&layer.diff_id)?;
            if size != layer.size {
                return Err(Error::malformed(format!("layer {}", layer.diff_id), "its size is another"));
            }
        }
        // `Value` keeps keys sorted: the same image has the same bytes.
        let history: Vec<Value> = image
            .layers
            .iter()
            .map(|layer| json!({"created": layer.created, "created_by": layer.created_by}))
            .collect();
        let diff_ids: Vec<String> = image.layers.iter().map(|layer| layer.diff_id.to_string()).collect();
        let env: Vec<String> = image.env.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let mut execution = json!({"Env": env, "User": image.user, "Cmd": image.command, "WorkingDir": "/"});
        if !image.labels.is_empty() {
            execution["Labels"] = json!(image.labels);
        }
        let config = json!({
            "created": image.created,
            "architecture": oci_architecture(&image.architecture),
            "os": "linux",
            "config": execution,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        });
        let (config_digest, config_size) = self.put_json(&config)?;
        let layers: Vec<Value> = image
            .layers
            .iter()
            .map(|layer| json!({"mediaType": LAYER_TYPE, "digest": layer.diff_id, "size": layer.size}))
            .collect();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": config_digest, "size": config_size},
            "layers": layers,
        });
        let (digest, size) = self.put_json(&manifest)?;
        self.add_entries(vec![image_entry(digest, size)])?;
        Ok(digest)
    }

    pub(crate) fn put_json(&self, value: &Value) -> Result<(Digest, u64), Error> {
        self.put_blob(&mut value.to_string().as_bytes(), None)
    }

    /// Reads an image's manifest and configuration, and checks that they fit one another and the layers' blobs.
    ///
    /// # Errors
    /// It is not there, or is not what its digests, sizes and types say.
    pub fn image(&self, digest: &Digest) -> Result<Image, Error> {
        let content = self.small_blob(digest, MANIFEST_LIMIT).map_err(|error| match error {
            Error::NoBlob(digest) => Error::NoImage(digest),
            other => other,
        })?;
        let manifest = parse_manifest(digest, &content)?;
        let malformed = |why: String| Error::malformed(format!("image {digest}"), why);
        if manifest.artifact_type().is_some() || manifest.subject().is_some() {
            return Err(malformed("it is about another image, not an image".to_owned()));
        }
        if manifest.config().media_type().to_string() != CONFIG_TYPE {
            return Err(malformed(format!("its configuration is not an {CONFIG_TYPE}")));
        }
        let config_digest = parse_digest(manifest.config().digest().as_ref())?;
        let content = self.small_blob(&config_digest, CONFIG_LIMIT)?;
        if content.len() as u64 != manifest.config().size() {
            return Err(malformed("its configuration has another size than it says".to_owned()));
        }
        let config: ImageConfiguration = serde_json::from_slice(&content)
            .map_err(|e| Error::malformed(format!("configuration {config_digest}"), e.to_string()))?;

        let diff_ids = config.rootfs().diff_ids();
        if manifest.layers().len() > LAYERS_LIMIT || diff_ids.len() != manifest.layers().len() {
            return Err(malformed(format!(
                "{} layers and {} diff_ids, where both have to be the same and at most {LAYERS_LIMIT}",
                manifest.layers().len(),
                diff_ids.len()
            )));
        }
        let mut made =
            config.history().iter().flatten().filter(|step| step.empty_layer() != Some(true)).map(|step| {
                (step.created_by().clone().unwrap_or_default(), step.created().clone().unwrap_or_default())
            });
        let mut layers = Vec::new();
        for (descriptor, diff_id) in manifest.layers().iter().zip(diff_ids) {
            if descriptor.media_type().to_string() != LAYER_TYPE {
                return Err(malformed(format!("a layer is not an {LAYER_TYPE}")));
            }
            if descriptor.urls().as_ref().is_some_and(|urls| !urls.is_empty()) {
                return Err(malformed("a layer lies elsewhere, by URL".to_owned()));
            }
            let blob = parse_digest(descriptor.digest().as_ref())?;
            let diff_id = parse_digest(diff_id)?;
            if blob != diff_id {
                return Err(malformed(format!("layer {blob} has diff_id {diff_id}")));
            }
            let (_, size) = self.open_blob(&blob)?;
            if size != descriptor.size() {
                return Err(malformed(format!("layer {blob} has {size} bytes, not {}", descriptor.size())));
            }
            let (created_by, created) = made.next().unwrap_or_default();
            layers.push(Layer { diff_id, size, created_by, created });
        }
        Ok(Image { digest: *digest, size: content_size(self, digest)?, config_digest, config, layers })
    }

    /// The digests of all images, without the signatures.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn images(&self) -> Result<Vec<Digest>, Error> {
        let index = self.index()?;
        Ok(index.manifests.iter().filter(|e| e.artifact_type.is_none()).map(|e| e.digest).collect())
    }
}

pub(crate) fn image_entry(digest: Digest, size: u64) -> Entry {
    Entry {
        media_type: MANIFEST_TYPE.to_owned(),
        digest,
        size,
        artifact_type: None,
        annotations: BTreeMap::from([(NAME.to_owned(), digest.hex())]),
    }
}

fn content_size(store: &ImageStore, digest: &Digest) -> Result<u64, Error> {
    store.open_blob(digest).map(|(_, size)| size)
}

/// A manifest that is one by its content too, not only by its media type.
pub(crate) fn parse_manifest(digest: &Digest, content: &[u8]) -> Result<ImageManifest, Error> {
    let malformed = |why: String| Error::malformed(format!("manifest {digest}"), why);
    let value: Value = serde_json::from_slice(content).map_err(|e| malformed(e.to_string()))?;
    if value.get("manifests").is_some() {
        return Err(malformed("it has `manifests`, so it could be read as an index".to_owned()));
    }
    if value.get("mediaType").and_then(Value::as_str) != Some(MANIFEST_TYPE) {
        return Err(malformed(format!("its mediaType is not {MANIFEST_TYPE}")));
    }
    // Read from the text and not from `value`, so that a key which is there twice is refused.
    let manifest: ImageManifest = serde_json::from_slice(content).map_err(|e| malformed(e.to_string()))?;
    if manifest.schema_version() != 2 {
        return Err(malformed("its schemaVersion is not 2".to_owned()));
    }
    Ok(manifest)
}

pub(crate) fn parse_digest(text: &str) -> Result<Digest, Error> {
    text.parse().map_err(|e: kiln_model::digest::NotADigest| Error::malformed("descriptor", e.to_string()))
}

/// Go's name, as OCI wants it, for Debian's.
pub(crate) fn oci_architecture(debian: &str) -> &str {
    match debian {
        "armhf" | "armel" => "arm",
        "i386" => "386",
        "ppc64el" => "ppc64le",
        other => other,
    }
}
