//! What is said about an image: artifacts that refer to it, such as signatures and documents.

use std::collections::BTreeMap;

use kiln_model::digest::Digest;
use oci_spec::image::ImageManifest;
use serde_json::json;

use crate::error::Error;
use crate::index::{Entry, MANIFEST_TYPE, SUBJECT};
use crate::manifest::{parse_digest, parse_manifest};
use crate::store::ImageStore;

/// Of what is attached to an image.
pub const ARTIFACT_LIMIT: u64 = 64 << 20;
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";

/// An artifact that refers to an image, as the index has it: a hint to find it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Referrer {
    /// Of its manifest.
    pub digest: Digest,
    pub artifact_type: String,
}

/// What an artifact is made of.
#[derive(Debug, Clone, Default)]
pub struct Part<'a> {
    pub media_type: &'a str,
    pub content: &'a [u8],
    pub annotations: BTreeMap<String, String>,
}

impl ImageStore {
    /// Adds an artifact of one part that refers to an image, and gives its manifest's digest. The same again changes nothing.
    ///
    /// # Errors
    /// The image is not in the store, or is not well-formed; the part is larger than [`ARTIFACT_LIMIT`].
    pub fn attach(&self, image: &Digest, artifact_type: &str, part: &Part<'_>) -> Result<Digest, Error> {
        if part.content.len() as u64 > ARTIFACT_LIMIT {
            let why = format!("it would have more than {ARTIFACT_LIMIT} bytes");
            return Err(Error::malformed(format!("{artifact_type} of image {image}"), why));
        }
        let subject_size = self.image(image)?.size;
        let (digest, size) = self.put_blob(&mut &*part.content, None)?;
        let mut layer = json!({"mediaType": part.media_type, "digest": digest, "size": size});
        if !part.annotations.is_empty() {
            layer["annotations"] = json!(part.annotations);
        }
        let (empty_digest, empty_size) = self.put_json(&json!({}))?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": artifact_type,
            "config": {"mediaType": EMPTY_TYPE, "digest": empty_digest, "size": empty_size},
            "layers": [layer],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": image, "size": subject_size},
        });
        let (digest, size) = self.put_json(&manifest)?;
        self.add_entries(vec![referrer_entry(image, artifact_type, digest, size)])?;
        Ok(digest)
    }

    /// Everything that refers to an image.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn referrers_of(&self, image: &Digest) -> Result<Vec<Referrer>, Error> {
        let subject = image.to_string();
        let index = self.index()?;
        let about = index.manifests.into_iter().filter(|e| e.annotations.get(SUBJECT) == Some(&subject));
        Ok(about
            .filter_map(|e| Some(Referrer { digest: e.digest, artifact_type: e.artifact_type? }))
            .collect())
    }

    /// The content of the newest artifact of a type that refers to an image; none where there is none.
    ///
    /// # Errors
    /// It has more than `limit` bytes, is about another image, or is not well-formed.
    pub fn attached(
        &self,
        image: &Digest,
        artifact_type: &str,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, Error> {
        let referrers = self.referrers_of(image)?;
        let Some(newest) = referrers.iter().rfind(|it| it.artifact_type == artifact_type) else {
            return Ok(None);
        };
        self.referring(&newest.digest, image, limit).map(Some)
    }

    /// The one part of an artifact that has to be about `image`.
    pub(crate) fn referring(&self, manifest: &Digest, image: &Digest, limit: u64) -> Result<Vec<u8>, Error> {
        let parsed = parse_manifest(manifest, &self.manifest(manifest)?)?;
        let malformed = |why: String| Error::malformed(format!("artifact {manifest}"), why);
        if subject_of(&parsed) != Some(image.to_string()) {
            return Err(malformed(format!("it is not about image {image}")));
        }
        let [part] = parsed.layers().as_slice() else {
            return Err(malformed("it does not have exactly one part".to_owned()));
        };
        self.small_blob(&parse_digest(part.digest().as_ref())?, limit)
    }

    /// The digests of what an artifact is made of, to remove it by.
    pub(crate) fn referrer_blobs(&self, manifest: &Digest) -> Result<Vec<Digest>, Error> {
        let parsed = parse_manifest(manifest, &self.manifest(manifest)?)?;
        let mut blobs = vec![*manifest];
        for layer in parsed.layers() {
            blobs.push(parse_digest(layer.digest().as_ref())?);
        }
        Ok(blobs)
    }
}

/// The digest of what an artifact's manifest is about.
pub(crate) fn subject_of(manifest: &ImageManifest) -> Option<String> {
    manifest.subject().as_ref().map(|subject| subject.digest().to_string())
}

pub(crate) fn referrer_entry(image: &Digest, artifact_type: &str, manifest: Digest, size: u64) -> Entry {
    Entry {
        media_type: MANIFEST_TYPE.to_owned(),
        digest: manifest,
        size,
        artifact_type: Some(artifact_type.to_owned()),
        annotations: BTreeMap::from([(SUBJECT.to_owned(), image.to_string())]),
    }
}
