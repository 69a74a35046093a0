//! Manifests and configurations of images that others have made, as OCI and docker write them, read as hostile: nothing is
//! taken that two readers could understand in two ways.

use std::collections::BTreeMap;

use kiln_model::digest::Digest;
use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;
use crate::index::MANIFEST_TYPE;
use crate::manifest::{CONFIG_TYPE, LAYER_TYPE, LAYERS_LIMIT, oci_architecture};

/// What registries take at most.
pub const FOREIGN_LIMIT: u64 = 4 << 20;

const INDEX_TYPES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFEST_TYPES: [&str; 2] = [MANIFEST_TYPE, "application/vnd.docker.distribution.manifest.v2+json"];
const CONFIG_TYPES: [&str; 2] = [CONFIG_TYPE, "application/vnd.docker.container.image.v1+json"];
/// Which of them it is shows the blob itself.
const LAYER_TYPES: [&str; 5] = [
    LAYER_TYPE,
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
];
const NAME: &str = "org.opencontainers.image.ref.name";
const INDEX_LIMIT: usize = 1000;
const ENV_LIMIT: usize = 1000;

/// What stands under a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Foreign {
    /// Of several manifests the one for the machine that was asked for.
    Index(Blob),
    Manifest(ForeignManifest),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignManifest {
    pub config: Blob,
    /// From the lowest to the topmost; may be compressed.
    pub layers: Vec<Blob>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignConfig {
    pub env: BTreeMap<String, String>,
    /// Of the uncompressed layers, from the lowest to the topmost.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawIndex {
    schema_version: u64,
    manifests: Vec<RawDescriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: u64,
    config: RawDescriptor,
    layers: Vec<RawDescriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    urls: Vec<String>,
    platform: Option<RawPlatform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawPlatform {
    architecture: String,
    os: String,
}

#[derive(Deserialize)]
struct RawConfig {
    architecture: String,
    os: String,
    rootfs: RawRootfs,
    config: Option<RawExecution>,
}

#[derive(Deserialize)]
struct RawRootfs {
    diff_ids: Vec<String>,
}

#[derive(Deserialize)]
struct RawExecution {
    #[serde(rename = "Env")]
    env: Option<Vec<String>>,
}

impl RawDescriptor {
    fn blob(&self) -> Result<Blob, String> {
        let digest = self.digest.parse().map_err(|_| {
            format!("`{}` is no digest that is taken; wanted sha256: and 64 digits", shown(&self.digest))
        })?;
        Ok(Blob { digest, size: self.size })
    }

    /// One that says nothing of machines is for any: the configuration tells.
    fn is_for(&self, architecture: &str) -> bool {
        self.platform.as_ref().is_none_or(|it| it.os == "linux" && it.architecture == architecture)
    }
}

/// A manifest, or the place of the one for `architecture` (Debian's name), where there are several.
///
/// # Errors
/// It is neither, or could be read as both.
pub fn parse_foreign(content: &[u8], architecture: &str) -> Result<Foreign, Error> {
    foreign(content, oci_architecture(architecture)).map_err(|why| Error::malformed("manifest", why))
}

/// The manifest of a layout's image in its `index.json`: the one with the tag, or the only one.
///
/// # Errors
/// It is no index, or does not say which one.
pub fn parse_layout(content: &[u8], tag: Option<&str>) -> Result<Blob, Error> {
    layout(content, tag).map_err(|why| Error::malformed("index.json", why))
}

/// What an image's configuration says that is taken over.
///
/// # Errors
/// It is for another machine, or does not fit a manifest with so many layers.
pub fn parse_foreign_config(
    content: &[u8],
    architecture: &str,
    layers: usize,
) -> Result<ForeignConfig, Error> {
    config(content, oci_architecture(architecture), layers)
        .map_err(|why| Error::malformed("configuration", why))
}

fn foreign(content: &[u8], architecture: &str) -> Result<Foreign, String> {
    let value: Value = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    let media_type = value.get("mediaType").map(|it| it.as_str().unwrap_or_default());
    let (has_manifests, has_layers) = (value.get("manifests").is_some(), value.get("layers").is_some());
    // From the text and not from `value`, so that a key which is there twice is refused.
    match (has_manifests, has_layers) {
        (true, true) => {
            Err("it has `manifests` and `layers`, so it could be read as an index or as a manifest"
                .to_owned())
        }
        (false, false) => Err("it has neither `layers` nor `manifests`".to_owned()),
        (true, false) => {
            is_of(media_type, &INDEX_TYPES)?;
            let index: RawIndex = serde_json::from_slice(content).map_err(|error| error.to_string())?;
            version(index.schema_version)?;
            chosen(&index, architecture).map(Foreign::Index)
        }
        (false, true) => {
            is_of(media_type, &MANIFEST_TYPES)?;
            let manifest: RawManifest = serde_json::from_slice(content).map_err(|error| error.to_string())?;
            version(manifest.schema_version)?;
            manifest_of(&manifest).map(Foreign::Manifest)
        }
    }
}

/// OCI lets a manifest be silent about its own type.
fn is_of(media_type: Option<&str>, types: &[&str]) -> Result<(), String> {
    match media_type {
        Some(found) if !types.contains(&found) => {
            Err(format!("its mediaType is `{}`, wanted {}", shown(found), types.join(" or ")))
        }
        _ => Ok(()),
    }
}

fn version(found: u64) -> Result<(), String> {
    if found == 2 { Ok(()) } else { Err(format!("its schemaVersion is {found}, wanted 2")) }
}

fn chosen(index: &RawIndex, architecture: &str) -> Result<Blob, String> {
    if index.manifests.len() > INDEX_LIMIT {
        return Err(format!("it names more than {INDEX_LIMIT} manifests"));
    }
    let mut fitting = index.manifests.iter().filter(|it| it.is_for(architecture));
    let Some(found) = fitting.next() else {
        let all = index.manifests.iter().filter_map(|it| it.platform.as_ref());
        let mut all: Vec<_> =
            all.map(|it| format!("{}/{}", shown(&it.os), shown(&it.architecture))).collect();
        all.dedup();
        all.truncate(20);
        return Err(format!("it has nothing for linux/{architecture}, but for {}", all.join(", ")));
    };
    if !MANIFEST_TYPES.contains(&found.media_type.as_str()) {
        return Err(format!("it names a `{}` where a manifest is wanted", shown(&found.media_type)));
    }
    found.blob()
}

fn manifest_of(manifest: &RawManifest) -> Result<ForeignManifest, String> {
    if !CONFIG_TYPES.contains(&manifest.config.media_type.as_str()) {
        return Err(format!(
            "its configuration is a `{}`: it is no image, but something else in the place of one",
            shown(&manifest.config.media_type)
        ));
    }
    if manifest.config.size > FOREIGN_LIMIT {
        return Err(format!("its configuration has more than {FOREIGN_LIMIT} bytes"));
    }
    if manifest.layers.len() > LAYERS_LIMIT {
        return Err(format!("it has more than {LAYERS_LIMIT} layers"));
    }
    let layer = |layer: &RawDescriptor| {
        if !LAYER_TYPES.contains(&layer.media_type.as_str()) {
            return Err(format!("a layer is a `{}`, which is not taken", shown(&layer.media_type)));
        }
        if !layer.urls.is_empty() {
            return Err(format!("layer {} lies elsewhere, by URL", shown(&layer.digest)));
        }
        layer.blob()
    };
    Ok(ForeignManifest {
        config: manifest.config.blob()?,
        layers: manifest.layers.iter().map(layer).collect::<Result<_, _>>()?,
    })
}

fn layout(content: &[u8], tag: Option<&str>) -> Result<Blob, String> {
    let index: RawIndex = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    version(index.schema_version)?;
    let name = |it: &RawDescriptor| it.annotations.get(NAME).cloned();
    let mut fitting =
        index.manifests.iter().filter(|it| tag.is_none_or(|tag| name(it).as_deref() == Some(tag)));
    match (fitting.next(), fitting.next(), tag) {
        (Some(one), None, _) => one.blob(),
        (None, _, Some(tag)) => {
            let names: Vec<_> =
                index.manifests.iter().filter_map(name).take(20).map(|it| shown(&it)).collect();
            Err(format!("it holds no image `{tag}`, but: {}", names.join(", ")))
        }
        (None, _, None) => Err("it holds no image".to_owned()),
        (Some(_), Some(_), _) => {
            Err("it holds several images: say which one, as in oci:folder:tag".to_owned())
        }
    }
}

fn config(content: &[u8], architecture: &str, layers: usize) -> Result<ForeignConfig, String> {
    let config: RawConfig = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    if config.os != "linux" || config.architecture != architecture {
        return Err(format!(
            "it is for {}/{}, wanted linux/{architecture}",
            shown(&config.os),
            shown(&config.architecture)
        ));
    }
    if config.rootfs.diff_ids.len() != layers {
        return Err(format!(
            "it has {} diff_ids, where the manifest has {layers} layers",
            config.rootfs.diff_ids.len()
        ));
    }
    let digest = |text: &String| text.parse().map_err(|_| format!("`{}` is no diff_id", shown(text)));
    let env = config.config.and_then(|it| it.env).unwrap_or_default();
    if env.len() > ENV_LIMIT {
        return Err(format!("it has more than {ENV_LIMIT} variables"));
    }
    let variable = |text: &String| {
        let (name, value) = text
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| format!("`{}` is no variable", shown(text)))?;
        if text.contains('\0') {
            return Err(format!("the variable `{}` holds a NUL", shown(name)));
        }
        Ok((name.to_owned(), value.to_owned()))
    };
    Ok(ForeignConfig {
        env: env.iter().map(variable).collect::<Result<_, _>>()?,
        diff_ids: config.rootfs.diff_ids.iter().map(digest).collect::<Result<_, _>>()?,
    })
}

/// What others wrote, in a message.
fn shown(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_default).collect()
}

#[cfg(test)]
mod tests;
