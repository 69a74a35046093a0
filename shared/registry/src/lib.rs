//! Images on their way between machines: pushed by the builder to an OCI registry, pulled from it by the nodes that do
//! not share its folder.
//!
//! All images of a site lie in one repository, by their digests, since servers can share an image; its signatures beside
//! it, as the referrers tag schema of OCI has it: an index under the tag `sha256-<hex>` names them. Nothing that a registry
//! answers is believed: what is pulled has its digest compared on the way, and is verified like any other image before it
//! runs.

mod credentials;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use kiln_image::{ImageStore, Referrer};
use kiln_model::digest::Digest;
use kiln_model::repository::Repository;
use kiln_service::config;
use kiln_service::error::chain;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::errors::{DigestError, OciDistributionError};
use oci_client::manifest::{OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE, OciDescriptor};
use oci_client::{Client, Reference};
use serde_json::{Value, json};

use crate::credentials::Credentials;

const CONNECT: Duration = Duration::from_secs(10);
/// Without a byte.
const SILENT: Duration = Duration::from_secs(30);
/// Of one image, each way.
const TRANSFER: Duration = Duration::from_secs(1800);
/// Tries of a transfer that fails in passing, with a pause that doubles.
const TRIES: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Signatures of an image that are pulled.
const SIGNATURES: usize = 64;
/// A layer is at most this large.
const BLOB_LIMIT: u64 = 64 << 30;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("registry credentials in {}: {why}; see `registry.credentials` in site.toml", path.display())]
    Credentials { path: PathBuf, why: String },
    #[error("the registry's authority in {}: {why}; see `registry.ca` in site.toml", path.display())]
    Authority { path: PathBuf, why: String },
    #[error("can't set up calls to a registry: {0}")]
    Setup(OciDistributionError),
    #[error("{doing} {image} at {place}: {why}")]
    Transfer { doing: &'static str, image: Digest, place: String, why: String, passing: bool },
    #[error(transparent)]
    Store(#[from] kiln_image::Error),
}

impl Error {
    fn is_passing(&self) -> bool {
        matches!(self, Self::Transfer { passing: true, .. })
    }
}

/// The registry of a site. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    client: Client,
    settings: Arc<config::Registry>,
    auth: Arc<Credentials>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({})", self.settings.repository.host)
    }
}

impl Registry {
    /// # Errors
    /// The credentials or the authority can't be read. Nothing is connected yet.
    pub fn new(settings: &config::Registry) -> Result<Self, Error> {
        // Whoever is first decides for the process, and everything here is of one kind.
        let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
        let auth = match &settings.credentials {
            Some(path) => credentials::of(&settings.repository.host, path)?,
            None => Credentials::anonymous(),
        };
        let tls_certs_only = match &settings.ca {
            Some(path) => {
                let data = std::fs::read(path)
                    .map_err(|error| Error::Authority { path: path.clone(), why: error.to_string() })?;
                vec![Certificate { encoding: CertificateEncoding::Pem, data }]
            }
            None => Vec::new(),
        };
        let protocol =
            if settings.repository.is_on_loopback() { ClientProtocol::Http } else { ClientProtocol::Https };
        let client = Client::try_from(ClientConfig {
            protocol,
            tls_certs_only,
            // One request for each blob: its size and digest are known beforehand.
            use_monolithic_push: true,
            connect_timeout: Some(CONNECT),
            read_timeout: Some(SILENT),
            user_agent: concat!("kiln/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
        .map_err(Error::Setup)?;
        Ok(Self { client, settings: Arc::new(settings.clone()), auth: Arc::new(auth) })
    }

    fn by_digest(&self, digest: &Digest) -> Reference {
        let Repository { host, path } = self.settings.repository.clone();
        Reference::with_digest(host, path, digest.to_string())
    }

    /// Of the index that names what refers to an image: where a registry that has no API for it keeps it.
    fn referrers_tag(&self, image: &Digest) -> Reference {
        let tag = format!("sha256-{}", image.hex());
        let Repository { host, path } = self.settings.repository.clone();
        Reference::with_tag(host, path, tag)
    }

    /// Puts an image and what refers to it into the registry. What is there already is not sent again.
    ///
    /// # Errors
    /// The image is not in the store, or the registry does not take it.
    pub async fn push(&self, images: &ImageStore, image: &Digest) -> Result<(), Error> {
        self.repeat("push", image, || self.push_once(images, image)).await
    }

    /// Brings what the store lacks of an image and its signatures. It still has to be verified.
    ///
    /// # Errors
    /// The registry is away, has no such image, or gives something else.
    pub async fn pull(&self, images: &ImageStore, image: &Digest) -> Result<(), Error> {
        self.repeat("pull", image, || self.pull_once(images, image)).await
    }

    async fn repeat<F: Future<Output = Result<(), Error>>>(
        &self,
        doing: &'static str,
        image: &Digest,
        once: impl Fn() -> F,
    ) -> Result<(), Error> {
        let all = async {
            let mut pause = FIRST_PAUSE;
            for _ in 1..TRIES {
                match once().await {
                    Err(error) if error.is_passing() => {
                        tracing::warn!(%error, again_in = ?pause, "a registry's passing failure");
                        tokio::time::sleep(pause).await;
                        pause *= 2;
                    }
                    done => return done,
                }
            }
            once().await
        };
        tokio::time::timeout(TRANSFER, all).await.unwrap_or_else(|_| {
            let why = format!("not done within {} minutes", TRANSFER.as_secs() / 60);
            Err(self.failed(doing, image, why, false))
        })
    }

    fn failed(&self, doing: &'static str, image: &Digest, why: String, passing: bool) -> Error {
        let place = self.settings.repository.to_string();
        Error::Transfer { doing, image: *image, place, why, passing }
    }

    async fn push_once(&self, images: &ImageStore, image: &Digest) -> Result<(), Error> {
        let failed = |error| self.transfer("push", image, &error);
        self.client.store_auth_if_needed(&self.settings.repository.host, self.auth.expose()).await;
        let referrers = images.referrers_of(image)?;
        for manifest in [image].into_iter().chain(referrers.iter().map(|referrer| &referrer.digest)) {
            let place = self.by_digest(manifest);
            for (blob, _) in images.parts_of(manifest)? {
                let name = blob.to_string();
                if self.client.blob_exists(&place, &name).await.map_err(failed)?
                    || self.takes_over(&place, &name).await
                {
                    continue;
                }
                let (file, size) = images.open_blob(&blob)?;
                let chunks =
                    tokio_util::io::ReaderStream::with_capacity(tokio::fs::File::from_std(file), 1 << 18);
                let chunks = chunks.map_err(OciDistributionError::from);
                self.client.push_blob_stream(&place, chunks, &name, Some(size)).await.map_err(failed)?;
            }
            self.push_manifest(&place, images.manifest(manifest)?.into(), OCI_IMAGE_MEDIA_TYPE)
                .await
                .map_err(failed)?;
        }
        let index = self.index(images, &referrers)?.to_string();
        let place = self.referrers_tag(image);
        self.push_manifest(&place, index.into(), OCI_IMAGE_INDEX_MEDIA_TYPE).await.map_err(failed)
    }

    /// Whether the registry has given the repository a blob that another one of it has. Where it has not, for whatever
    /// reason, the blob is sent.
    async fn takes_over(&self, place: &Reference, blob: &str) -> bool {
        for Repository { host, path } in &self.settings.mount_from {
            let from = Reference::with_digest(host.clone(), path.clone(), blob.to_owned());
            match self.client.mount_blob(place, &from, blob).await {
                Ok(()) => return true,
                Err(error) => tracing::debug!(%error, %from, "a blob is not taken over"),
            }
        }
        false
    }

    async fn push_manifest(
        &self,
        place: &Reference,
        content: Bytes,
        media_type: &'static str,
    ) -> Result<(), OciDistributionError> {
        let media_type = http::HeaderValue::from_static(media_type);
        self.client.push_manifest_raw(place, content, media_type).await.map(drop)
    }

    fn index(&self, images: &ImageStore, referrers: &[Referrer]) -> Result<Value, Error> {
        let mut manifests = Vec::new();
        for referrer in referrers {
            let (_, size) = images.open_blob(&referrer.digest)?;
            manifests.push(json!({
                "mediaType": OCI_IMAGE_MEDIA_TYPE,
                "artifactType": referrer.artifact_type,
                "digest": referrer.digest,
                "size": size,
            }));
        }
        Ok(json!({ "schemaVersion": 2, "mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE, "manifests": manifests }))
    }

    async fn pull_once(&self, images: &ImageStore, image: &Digest) -> Result<(), Error> {
        self.client.store_auth_if_needed(&self.settings.repository.host, self.auth.expose()).await;
        self.pull_manifest(images, image, image).await?;
        let tag = self.referrers_tag(image);
        let accepted = [OCI_IMAGE_INDEX_MEDIA_TYPE];
        let (index, _) = self
            .client
            .pull_manifest_raw(&tag, self.auth.expose(), &accepted)
            .await
            .map_err(|error| self.transfer("pull the signatures of", image, &error))?;
        let signatures =
            parse_index(&index).map_err(|why| self.failed("pull the signatures of", image, why, false))?;
        for signature in &signatures {
            self.pull_manifest(images, image, signature).await?;
        }
        images.adopt(image, &signatures)?;
        Ok(())
    }

    /// A manifest, and the blobs that it names.
    async fn pull_manifest(
        &self,
        images: &ImageStore,
        image: &Digest,
        manifest: &Digest,
    ) -> Result<(), Error> {
        let place = self.by_digest(manifest);
        let failed = |error| self.transfer("pull", image, &error);
        if !images.has_blob(manifest) {
            let accepted = [OCI_IMAGE_MEDIA_TYPE];
            let (content, _) =
                self.client.pull_manifest_raw(&place, self.auth.expose(), &accepted).await.map_err(failed)?;
            images.put_blob(&mut content.as_ref(), Some(manifest))?;
        }
        for (blob, size) in images.parts_of(manifest)? {
            if images.has_blob(&blob) {
                continue;
            }
            if size > BLOB_LIMIT {
                let why =
                    format!("blob {blob} is said to have {size} bytes, which is more than {BLOB_LIMIT}");
                return Err(self.failed("pull", image, why, false));
            }
            let name = OciDescriptor { digest: blob.to_string(), ..OciDescriptor::default() };
            let stream = self.client.pull_blob_stream(&place, &name).await.map_err(failed)?;
            let mut stream = stream.stream.boxed();
            let mut writer = images.blob_writer()?;
            let mut left = size;
            while let Some(chunk) = stream.next().await {
                let chunk = chunk.map_err(|error| failed(error.into()))?;
                left = left.checked_sub(chunk.len() as u64).ok_or_else(|| {
                    self.failed("pull", image, format!("blob {blob} has more than {size} bytes"), false)
                })?;
                // Some hundred KiB at most into the page cache: not worth a thread of its own.
                std::io::Write::write_all(&mut writer, &chunk).map_err(|source| kiln_image::Error::Io {
                    doing: "write blob",
                    path: blob.to_string().into(),
                    source,
                })?;
            }
            let found = writer.digest();
            if found != blob {
                return Err(kiln_image::Error::Corrupt { wanted: blob, found }.into());
            }
            tokio::task::spawn_blocking(move || writer.finish())
                .await
                .map_err(|error| self.failed("pull", image, error.to_string(), false))??;
        }
        Ok(())
    }

    fn transfer(&self, doing: &'static str, image: &Digest, error: &OciDistributionError) -> Error {
        self.failed(doing, image, chain(error), is_passing(error))
    }
}

/// The signatures that an index names. An entry of before there was anything else has no type.
fn parse_index(content: &[u8]) -> Result<Vec<Digest>, String> {
    let index: Value = serde_json::from_slice(content).map_err(|error| error.to_string())?;
    let manifests = index.get("manifests").and_then(Value::as_array).ok_or("the index has no `manifests`")?;
    let signatures = manifests
        .iter()
        .filter(|entry| entry.get("artifactType").is_none_or(|of| of == kiln_image::SIGNATURE));
    let digests = signatures.take(SIGNATURES).map(|entry| {
        let digest = entry.get("digest").and_then(Value::as_str).ok_or("an entry has no digest")?;
        digest.parse().map_err(|_| format!("`{}` is no digest", digest.chars().take(80).collect::<String>()))
    });
    digests.collect()
}

/// Whether it may be otherwise in a moment.
fn is_passing(error: &OciDistributionError) -> bool {
    match error {
        OciDistributionError::ServerError { code, .. } => *code >= 500 || *code == 429,
        OciDistributionError::RequestError(error) => {
            error.status().is_none_or(|status| status.is_server_error() || status.as_u16() == 429)
        }
        OciDistributionError::IoError(error) => {
            !error.get_ref().is_some_and(|inner| inner.is::<DigestError>())
        }
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_index_of_signatures_is_read_or_refused() {
        let digest = Digest::of(b"x");
        let index = json!({ "manifests": [{ "digest": digest, "size": 3 }] }).to_string();
        assert_eq!(parse_index(index.as_bytes()), Ok(vec![digest]));
        let other = json!({ "digest": Digest::of(b"y"), "size": 3, "artifactType": "application/spdx+json" });
        let signature = json!({ "digest": digest, "size": 3, "artifactType": kiln_image::SIGNATURE });
        let index = json!({ "manifests": [other, signature] }).to_string();
        assert_eq!(parse_index(index.as_bytes()), Ok(vec![digest]));
        for wrong in [
            "{",
            "[]",
            r#"{"manifests": {}}"#,
            r#"{"manifests": [{}]}"#,
            r#"{"manifests": [{"digest": "sha256:../x"}]}"#,
            r#"{"manifests": [{"digest": "md5:00"}]}"#,
        ] {
            assert!(parse_index(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }
}
