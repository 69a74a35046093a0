//! No image reaches an instance without its digest and signature verified. What can't be verified is refused.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use kiln_image::{Image, ImageStore, Thoroughness};
use kiln_model::digest::Digest;
use kiln_registry::Registry;
use kiln_service::config::Signing;
use kiln_service::error::{ApiError, chain};
use kiln_store::Store;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use crate::book::Book;
use crate::node::{blocking, to_the_end};

#[derive(Debug, Clone)]
pub(crate) struct Verifier {
    images: ImageStore,
    signing: Signing,
    registry: Option<Registry>,
    /// One at a time: several instances of an image come at once, and the first brings it for all.
    pulling: Arc<tokio::sync::Mutex<()>>,
}

/// An image that may run, with its layers' trees from the lowest to the topmost.
#[derive(Debug)]
pub(crate) struct Verified {
    pub(crate) image: Image,
    pub(crate) layers: Vec<PathBuf>,
    pub(crate) key_id: String,
}

/// A blob as the file system knows it. Its content can't change without its change time, which nobody can set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct BlobState {
    digest: Digest,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Verifier {
    pub(crate) fn new(images: ImageStore, signing: Signing, registry: Option<Registry>) -> Self {
        Self { images, signing, registry, pulling: Arc::default() }
    }

    /// Brings an image that is not here from the registry, if the site has one; with `anew`, also what came to one that is.
    /// What is wrong with it is found when it is verified.
    async fn fetch(&self, digest: Digest, anew: bool) -> Result<(), ApiError> {
        let Some(registry) = self.registry.clone() else { return Ok(()) };
        let (images, pulling) = (self.images.clone(), Arc::clone(&self.pulling));
        let pull = async move {
            let _turn = pulling.lock().await;
            let held = images.clone();
            if !anew && blocking(move || held.image(&digest)).await?.is_ok() {
                return Ok(());
            }
            let began = Instant::now();
            registry.pull(&images, &digest).await.map_err(|error| {
                ApiError::Unavailable(format!("image {digest} is not here: {}", chain(&error)))
            })?;
            tracing::info!(image = %digest, took = ?began.elapsed(), "was brought from the registry");
            Ok(())
        };
        // Whoever asks for it may give up before it is here, and asks again.
        to_the_end(pull).await
    }

    /// How an image wants to be told to stop.
    pub(crate) fn stop_signal(&self, digest: &Digest) -> Signal {
        let image = self.images.image(digest).ok();
        let config = image.as_ref().and_then(|image| image.config.config().as_ref());
        let name = config.and_then(|config| config.stop_signal().as_deref()).unwrap_or_default();
        match name.trim_start_matches("SIG") {
            "QUIT" | "3" => Signal::QUIT,
            "INT" | "2" => Signal::INT,
            "HUP" | "1" => Signal::HUP,
            "USR1" | "10" => Signal::USR1,
            "USR2" | "12" => Signal::USR2,
            "KILL" | "9" => Signal::KILL,
            _ => Signal::TERM,
        }
    }

    fn blobs(&self, image: &Image) -> Result<Vec<BlobState>, kiln_image::Error> {
        let state = |digest: Digest| {
            let (file, size) = self.images.open_blob(&digest)?;
            let metadata = file.metadata().map_err(|source| kiln_image::Error::Io {
                doing: "look at blob",
                path: digest.to_string().into(),
                source,
            })?;
            let changed = (metadata.ctime(), metadata.ctime_nsec());
            Ok(BlobState { digest, inode: metadata.ino(), size, changed })
        };
        image.layers.iter().map(|layer| state(layer.diff_id)).collect()
    }

    /// Signature, manifest and configuration each time; every byte of the layers where they are not the files that were
    /// hashed before.
    fn check(
        &self,
        digest: &Digest,
        server: &str,
        before: Option<&[BlobState]>,
    ) -> Result<(Verified, Vec<BlobState>), kiln_image::Error> {
        let Some(trust) = self.signing.trust(server) else {
            let why = format!("no rule of `signing.trust` in site.toml is about the server `{server}`");
            return Err(kiln_image::Error::Untrusted { image: *digest, why });
        };
        // Read each time: a key that is taken away counts no more.
        let trusted = trust.keys.iter().map(|key| kiln_image::read_trusted_key(key));
        let trusted = trusted.collect::<Result<Vec<_>, _>>()?;
        let image = self.images.image(digest)?;
        // Looked at before hashing: what changes meanwhile is hashed again the next time.
        let blobs = self.blobs(&image)?;
        let thoroughness = if before == Some(&blobs) { Thoroughness::Manifest } else { Thoroughness::Blobs };
        let signers = self.images.verify(digest, &trusted, trust.threshold, thoroughness)?;
        let key_id = signers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let trees = image.layers.iter().map(|layer| self.images.layer_tree(&layer.diff_id));
        let layers = trees.collect::<Result<_, _>>()?;
        Ok((Verified { image, layers, key_id }, blobs))
    }

    /// Verifies an image and has its layers ready to be mounted.
    pub(crate) async fn verify<S: Store>(
        &self,
        book: &Book<S>,
        digest: Digest,
        server: &str,
    ) -> Result<Verified, ApiError> {
        self.fetch(digest, false).await?;
        let name = digest.to_string();
        let before: Option<Vec<BlobState>> = book.verified(&name).await?;
        let check = async || {
            let (verifier, server, before) = (self.clone(), server.to_owned(), before.clone());
            blocking(move || verifier.check(&digest, &server, before.as_deref())).await
        };
        let mut checked = check().await?;
        // Another key may have signed it since it was brought here. Where that can't be found out, it stays as it is.
        if matches!(&checked, Err(kiln_image::Error::Untrusted { .. } | kiln_image::Error::Unsigned(_)))
            && self.registry.is_some()
            && self.fetch(digest, true).await.is_ok()
        {
            checked = check().await?;
        }
        let (verified, blobs) = checked.map_err(|error| {
            ApiError::precondition(
                format!("image {digest} can't be verified: {}", chain(&error)),
                "nothing of this image is run: build the server again, or see `signing` in site.toml",
            )
        })?;
        if before.as_ref() != Some(&blobs) {
            book.set_verified(&name, &blobs).await?;
        }
        Ok(verified)
    }
}
