//! Signatures: a DSSE envelope over the image's digest, stored as an OCI artifact that refers to the image.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::pkcs8::{DecodePrivateKey as _, DecodePublicKey as _};
use ed25519_dalek::{Signature, SigningKey, VerifyingKey};
use kiln_model::digest::Digest;
use oci_spec::image::ImageManifest;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::Zeroizing;

use crate::error::Error;
use crate::index::{Entry, Index, MANIFEST_TYPE, SUBJECT};
use crate::manifest::{MANIFEST_LIMIT, image_entry, parse_digest, parse_manifest};
use crate::signer::Signer;
use crate::store::ImageStore;

const ARTIFACT_TYPE: &str = "application/vnd.kiln.signature.v1";
const PAYLOAD_TYPE: &str = "application/vnd.kiln.image.v1+json";
const ENVELOPE_TYPE: &str = "application/vnd.dsse.envelope.v1+json";
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const ENVELOPE_LIMIT: u64 = 64 << 10;
/// Of one image. Whoever can write the store must not be able to make verification long.
const SIGNATURES_LIMIT: usize = 64;

/// The sha256 of a public key's 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(Digest);

impl KeyId {
    pub fn of(key: &VerifyingKey) -> Self {
        Self(Digest::of(key.as_bytes()))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.hex())
    }
}

/// How far verification goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thoroughness {
    /// Signature, manifest, configuration; layers by name and size. A layer's content is checked when it is extracted.
    Manifest,
    /// Every byte.
    Blobs,
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    #[serde(rename = "payloadType")]
    payload_type: String,
    payload: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Serialize, Deserialize)]
struct EnvelopeSignature {
    keyid: String,
    sig: String,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    image: Digest,
    #[serde(rename = "mediaType")]
    media_type: String,
    size: u64,
}

/// What is signed: type and payload with their lengths, so that neither can be taken for the other.
fn pre_authentication_encoding(payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {PAYLOAD_TYPE} {} ", PAYLOAD_TYPE.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}

impl ImageStore {
    /// Signs an image. Signing it again with the same key changes nothing.
    ///
    /// # Errors
    /// The image is not in the store, or is not well-formed.
    pub fn sign(&self, digest: &Digest, signer: &Signer) -> Result<KeyId, Error> {
        let image = self.image(digest)?;
        let id = signer.id();
        let payload = json!({"image": digest, "mediaType": MANIFEST_TYPE, "size": image.size}).to_string();
        let signature = signer.sign(&pre_authentication_encoding(payload.as_bytes()))?;
        let envelope = json!({
            "payloadType": PAYLOAD_TYPE,
            "payload": BASE64.encode(&payload),
            "signatures": [{"keyid": id.to_string(), "sig": BASE64.encode(signature.to_bytes())}],
        });
        let (envelope_digest, envelope_size) = self.put_json(&envelope)?;
        let (empty_digest, empty_size) = self.put_json(&json!({}))?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": EMPTY_TYPE, "digest": empty_digest, "size": empty_size},
            "layers": [{"mediaType": ENVELOPE_TYPE, "digest": envelope_digest, "size": envelope_size}],
            "subject": {"mediaType": MANIFEST_TYPE, "digest": digest, "size": image.size},
        });
        let (manifest_digest, size) = self.put_json(&manifest)?;
        self.add_entries(vec![signature_entry(digest, manifest_digest, size)])?;
        Ok(id)
    }

    /// Names an image that was brought here from elsewhere, once its blobs and those of its signatures are in the store.
    /// Nothing is believed of what is said about the signatures: what is none of this image is refused.
    ///
    /// # Errors
    /// Something is missing, is not well-formed, or is about another image.
    pub fn adopt(&self, digest: &Digest, signatures: &[Digest]) -> Result<(), Error> {
        let image = self.image(digest)?;
        let mut entries = vec![image_entry(*digest, image.size)];
        for signature in signatures.iter().take(SIGNATURES_LIMIT) {
            let content = self.manifest(signature)?;
            if subject_of(&parse_manifest(signature, &content)?) != Some(digest.to_string()) {
                let why = format!("it is not about image {digest}");
                return Err(Error::malformed(format!("signature {signature}"), why));
            }
            entries.push(signature_entry(digest, *signature, content.len() as u64));
        }
        self.add_entries(entries)
    }

    /// A manifest as it is written, checked against its digest.
    ///
    /// # Errors
    /// It is not there, is too large, or is something else.
    pub fn manifest(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        self.small_blob(digest, MANIFEST_LIMIT)
    }

    /// The blobs that a manifest in the store names, with the sizes that it gives them: its configuration, its layers.
    ///
    /// # Errors
    /// It is not there, or is not well-formed.
    pub fn parts_of(&self, manifest: &Digest) -> Result<Vec<(Digest, u64)>, Error> {
        let parsed = parse_manifest(manifest, &self.manifest(manifest)?)?;
        let parts = [parsed.config()].into_iter().chain(parsed.layers());
        parts.map(|part| Ok((parse_digest(part.digest().as_ref())?, part.size()))).collect()
    }

    /// Checks that so many different ones of the trusted keys signed the image, and that the image is what was signed.
    /// Gives those that did, as far as they were needed.
    ///
    /// # Errors
    /// Everything but enough good signatures of a well-formed image.
    pub fn verify(
        &self,
        digest: &Digest,
        trusted: &[VerifyingKey],
        threshold: usize,
        thoroughness: Thoroughness,
    ) -> Result<BTreeSet<KeyId>, Error> {
        let image = self.image(digest)?;
        let wanted = Payload { image: *digest, media_type: MANIFEST_TYPE.to_owned(), size: image.size };
        let mut problem = None;
        let mut signers = BTreeSet::new();
        // At least one, whatever a caller worked out.
        let threshold = threshold.max(1);
        for signature in self.signatures_of(digest)?.into_iter().take(SIGNATURES_LIMIT) {
            match self.check_signature(&signature, &wanted, trusted) {
                Ok(ids) => signers.extend(ids),
                Err(why) => problem = Some(why),
            }
            if signers.len() >= threshold {
                break;
            }
        }
        if signers.len() < threshold {
            return Err(match (signers.len(), problem) {
                (0, None) => Error::Unsigned(*digest),
                (0, Some(why)) => Error::Untrusted { image: *digest, why },
                (some, _) => {
                    let why = format!("{some} of the {threshold} keys that are needed have signed it");
                    Error::Untrusted { image: *digest, why }
                }
            });
        }
        if thoroughness == Thoroughness::Blobs {
            for layer in &image.layers {
                self.rehash(&layer.diff_id)?;
            }
        }
        Ok(signers)
    }

    /// The manifests of an image's signatures.
    ///
    /// # Errors
    /// The index can't be read.
    pub fn signatures_of(&self, digest: &Digest) -> Result<Vec<Digest>, Error> {
        let subject = digest.to_string();
        let index = self.index()?;
        Ok(index
            .manifests
            .iter()
            .filter(|e| e.artifact_type.as_deref() == Some(ARTIFACT_TYPE))
            .filter(|e| e.annotations.get(SUBJECT) == Some(&subject))
            .map(|e| e.digest)
            .collect())
    }

    /// The digests of what a signature is made of, to remove it by.
    pub(crate) fn signature_blobs(&self, manifest: &Digest) -> Result<Vec<Digest>, Error> {
        let parsed = parse_manifest(manifest, &self.manifest(manifest)?)?;
        let mut blobs = vec![*manifest];
        for layer in parsed.layers() {
            blobs.push(parse_digest(layer.digest().as_ref())?);
        }
        Ok(blobs)
    }

    /// Every blob that an image and its signatures are made of, each once.
    ///
    /// # Errors
    /// It is not in the store, or is not well-formed.
    pub fn blobs_of(&self, digest: &Digest) -> Result<Vec<Digest>, Error> {
        let image = self.image(digest)?;
        let mut blobs = vec![*digest, image.config_digest];
        blobs.extend(image.layers.iter().map(|layer| layer.diff_id));
        for signature in self.signatures_of(digest)? {
            blobs.extend(self.signature_blobs(&signature)?);
        }
        // What a signature has in the place of a configuration.
        blobs.extend(Some(Digest::of(b"{}")).filter(|empty| self.has_blob(empty)));
        blobs.sort_unstable();
        blobs.dedup();
        Ok(blobs)
    }

    /// The part of the index that is about some images, for [`ImageStore::take_over`].
    ///
    /// # Errors
    /// The index can't be read.
    pub fn index_of(&self, digests: &[Digest]) -> Result<Vec<u8>, Error> {
        let names: Vec<String> = digests.iter().map(ToString::to_string).collect();
        let mut index = self.index()?;
        index.manifests.retain(|entry| {
            digests.contains(&entry.digest)
                || entry.annotations.get(SUBJECT).is_some_and(|subject| names.contains(subject))
        });
        serde_json::to_vec(&index)
            .map_err(|error| Error::malformed("the index".to_owned(), error.to_string()))
    }

    /// Names images whose blobs were put into the store, by the part of an index that is about them.
    ///
    /// # Errors
    /// It is no index, or names what is not there.
    pub fn take_over(&self, part: &[u8]) -> Result<(), Error> {
        let part: Index = serde_json::from_slice(part)
            .map_err(|error| Error::malformed("a part of an index".to_owned(), error.to_string()))?;
        for entry in &part.manifests {
            self.manifest(&entry.digest)?;
        }
        self.add_entries(part.manifests)
    }

    fn check_signature(
        &self,
        manifest: &Digest,
        wanted: &Payload,
        trusted: &[VerifyingKey],
    ) -> Result<BTreeSet<KeyId>, String> {
        let content = self.manifest(manifest).map_err(|e| e.to_string())?;
        let parsed = parse_manifest(manifest, &content).map_err(|e| e.to_string())?;
        if subject_of(&parsed) != Some(wanted.image.to_string()) {
            return Err(format!("signature {manifest} is about another image"));
        }
        let [layer] = parsed.layers().as_slice() else {
            return Err(format!("signature {manifest} does not hold exactly one envelope"));
        };
        let envelope = parse_digest(layer.digest().as_ref()).map_err(|e| e.to_string())?;
        let content = self.small_blob(&envelope, ENVELOPE_LIMIT).map_err(|e| e.to_string())?;
        check_envelope(&content, wanted, trusted)
    }
}

/// Of a signature's manifest: the digest of what it is about.
fn subject_of(manifest: &ImageManifest) -> Option<String> {
    manifest.subject().as_ref().map(|subject| subject.digest().to_string())
}

fn signature_entry(image: &Digest, manifest: Digest, size: u64) -> Entry {
    Entry {
        media_type: MANIFEST_TYPE.to_owned(),
        digest: manifest,
        size,
        artifact_type: Some(ARTIFACT_TYPE.to_owned()),
        annotations: BTreeMap::from([(SUBJECT.to_owned(), image.to_string())]),
    }
}

/// Those of the trusted keys that signed it; at least one.
fn check_envelope(
    content: &[u8],
    wanted: &Payload,
    trusted: &[VerifyingKey],
) -> Result<BTreeSet<KeyId>, String> {
    let envelope: Envelope = serde_json::from_slice(content).map_err(|e| format!("envelope: {e}"))?;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(format!("the envelope's payload type is not {PAYLOAD_TYPE}"));
    }
    let payload = BASE64.decode(&envelope.payload).map_err(|e| format!("payload: {e}"))?;
    let signed = pre_authentication_encoding(&payload);
    // The signature goes first: nothing in the payload is looked at before it is known who wrote it.
    let found = envelope.signatures.iter().take(SIGNATURES_LIMIT).filter_map(|signature| {
        let bytes = BASE64.decode(&signature.sig).ok()?;
        let parsed = Signature::from_slice(&bytes).ok()?;
        trusted.iter().find(|key| key.verify_strict(&signed, &parsed).is_ok()).map(KeyId::of)
    });
    let signers: BTreeSet<KeyId> = found.collect();
    if signers.is_empty() {
        let named = envelope.signatures.iter().take(4);
        let keys: Vec<_> = named.map(|it| it.keyid.chars().take(64).collect::<String>()).collect();
        return Err(format!("signed by {}", keys.join(", ")));
    }
    let payload: Payload = serde_json::from_slice(&payload).map_err(|e| format!("payload: {e}"))?;
    if payload != *wanted {
        return Err("a good signature, but of another image".to_owned());
    }
    Ok(signers)
}

fn read_key(path: &Path) -> Result<Zeroizing<String>, Error> {
    kiln_secret::read(path).map_err(Error::io("read key", path))
}

/// Reads a private key: ed25519, PKCS#8, PEM.
///
/// # Errors
/// It can't be read, or is no such key.
pub fn read_signing_key(path: &Path) -> Result<SigningKey, Error> {
    SigningKey::from_pkcs8_pem(&read_key(path)?).map_err(|e| Error::Key {
        path: path.to_owned(),
        why: format!("not an ed25519 private key in PKCS#8 PEM: {e}"),
    })
}

/// Reads a public key: ed25519, SubjectPublicKeyInfo, PEM.
///
/// # Errors
/// It can't be read, or is no such key.
pub fn read_trusted_key(path: &Path) -> Result<VerifyingKey, Error> {
    VerifyingKey::from_public_key_pem(&read_key(path)?).map_err(|e| Error::Key {
        path: path.to_owned(),
        why: format!("not an ed25519 public key in PEM: {e}"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
