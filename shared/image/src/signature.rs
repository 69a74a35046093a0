//! Signatures: a DSSE envelope over the image's digest, stored as an OCI artifact that refers to the image.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use ed25519_dalek::pkcs8::{DecodePrivateKey as _, DecodePublicKey as _};
use ed25519_dalek::{SigningKey, VerifyingKey};
use kiln_model::digest::Digest;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::Zeroizing;

use crate::dsse;
use crate::error::Error;
use crate::index::{Index, MANIFEST_TYPE, SUBJECT};
use crate::manifest::{MANIFEST_LIMIT, image_entry, parse_digest, parse_manifest};
use crate::referrers::{ARTIFACT_LIMIT, Part, referrer_entry, subject_of};
use crate::signer::Signer;
use crate::store::ImageStore;

/// The artifact type of signatures.
pub const SIGNATURE: &str = "application/vnd.kiln.signature.v1";
const PAYLOAD_TYPE: &str = "application/vnd.kiln.image.v1+json";
/// Source: in-toto's attestation framework, "Envelope".
const STATEMENT_TYPE: &str = "application/vnd.in-toto+json";
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

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Payload {
    image: Digest,
    #[serde(rename = "mediaType")]
    media_type: String,
    size: u64,
}

impl ImageStore {
    /// Signs an image. Signing it again with the same key changes nothing.
    ///
    /// # Errors
    /// The image is not in the store, or is not well-formed.
    pub fn sign(&self, digest: &Digest, signer: &Signer) -> Result<KeyId, Error> {
        let image = self.image(digest)?;
        let payload = json!({"image": digest, "mediaType": MANIFEST_TYPE, "size": image.size}).to_string();
        let envelope = dsse::seal(PAYLOAD_TYPE, &payload, std::slice::from_ref(signer))?;
        let part = Part { media_type: dsse::MEDIA_TYPE, content: envelope.as_bytes(), ..Part::default() };
        // Last: whoever finds this one takes it that all was signed.
        self.sign_for_cosign(digest, signer)?;
        self.attach(digest, SIGNATURE, &part)?;
        Ok(signer.id())
    }

    /// Attaches an in-toto statement about an image, signed by each of the signers.
    ///
    /// # Errors
    /// The image is not in the store, or a signer does not sign.
    pub fn attest(
        &self,
        image: &Digest,
        artifact_type: &str,
        statement: &str,
        signers: &[Signer],
    ) -> Result<(), Error> {
        let envelope = dsse::seal(STATEMENT_TYPE, statement, signers)?;
        let part = Part { media_type: artifact_type, content: envelope.as_bytes(), ..Part::default() };
        self.attach(image, artifact_type, &part).map(drop)
    }

    /// Attaches the newest statement of a type again, signed by these signers, where one of the trusted keys has signed it.
    ///
    /// # Errors
    /// It is not well-formed, or a signer does not sign.
    pub fn attest_again(
        &self,
        image: &Digest,
        artifact_type: &str,
        trusted: &[VerifyingKey],
        signers: &[Signer],
    ) -> Result<(), Error> {
        let Some(envelope) = self.attached(image, artifact_type, ARTIFACT_LIMIT)? else { return Ok(()) };
        let malformed = |why: String| Error::malformed(format!("{artifact_type} of image {image}"), why);
        let opened = dsse::read(&envelope, STATEMENT_TYPE).map_err(malformed)?;
        if opened.signers(trusted).is_empty() {
            return Ok(());
        }
        let statement = String::from_utf8(opened.payload).map_err(|error| malformed(error.to_string()))?;
        self.attest(image, artifact_type, &statement, signers)
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
            entries.push(referrer_entry(digest, SIGNATURE, *signature, content.len() as u64));
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
        let mut referrers = self.referrers_of(digest)?;
        referrers.retain(|referrer| referrer.artifact_type == SIGNATURE);
        Ok(referrers.into_iter().map(|referrer| referrer.digest).collect())
    }

    /// Every blob that an image and what refers to it are made of, each once.
    ///
    /// # Errors
    /// It is not in the store, or is not well-formed.
    pub fn blobs_of(&self, digest: &Digest) -> Result<Vec<Digest>, Error> {
        let image = self.image(digest)?;
        let mut blobs = vec![*digest, image.config_digest];
        blobs.extend(image.layers.iter().map(|layer| layer.diff_id));
        for referrer in self.referrers_of(digest)? {
            blobs.extend(self.referrer_blobs(&referrer.digest)?);
        }
        // What an artifact has in the place of a configuration.
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
        let content =
            self.referring(manifest, &wanted.image, ENVELOPE_LIMIT).map_err(|error| error.to_string())?;
        check_envelope(&content, wanted, trusted)
    }
}

/// Those of the trusted keys that signed it; at least one.
fn check_envelope(
    content: &[u8],
    wanted: &Payload,
    trusted: &[VerifyingKey],
) -> Result<BTreeSet<KeyId>, String> {
    let envelope = dsse::read(content, PAYLOAD_TYPE)?;
    // The signature goes first: nothing in the payload is looked at before it is known who wrote it.
    let signers = envelope.signers(trusted);
    if signers.is_empty() {
        return Err(format!("signed by {}", envelope.said_signers()));
    }
    let payload: Payload = serde_json::from_slice(&envelope.payload).map_err(|e| format!("payload: {e}"))?;
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
