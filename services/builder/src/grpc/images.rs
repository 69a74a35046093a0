//! Images: what is in them, their way out, and who needs them.

use std::collections::BTreeSet;

use kiln_api::builder::{
    ExportImageRequest, ExportImageResponse, GetImageRequest, GetImageResponse, HoldRequest, HoldResponse,
    Image, Layer,
};
use kiln_builder_core::build::State;
use kiln_image::{Thoroughness, read_trusted_key};
use kiln_model::digest::Digest;
use kiln_model::name::BuildId;
use kiln_service::clock::Clock;
use kiln_service::config::Trust;
use kiln_service::error::ApiError;
use kiln_service::requests;
use kiln_store::{AuditRecord, Batch, Store};

use super::{Api, Streamed};
use crate::bakery::Bakery;
use crate::store::{Edit, HOLD_KIND, StoredHold};

/// Images that one holder may hold.
const MAX_HELD: usize = 100_000;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    /// A digest, a build's image, or a server's newest one.
    pub(super) async fn image_digest(&self, image: &str) -> Result<Digest, ApiError> {
        if let Ok(digest) = image.parse() {
            return Ok(digest);
        }
        if let Ok(id) = image.parse::<BuildId>() {
            let read = self.builder.documents.build(&id).await?;
            if let Some(build) = read.map(|read| read.value) {
                let State::Succeeded { image } = build.state else {
                    let todo = format!("see `kiln why {id}`");
                    return Err(ApiError::precondition(format!("build {id} made no image"), todo));
                };
                return Ok(image);
            }
        }
        let read = self.server(image).await?;
        read.value.in_force.map(|in_force| in_force.image).ok_or_else(|| {
            let todo = format!("see `kiln status {image}`");
            ApiError::precondition(format!("server {image} has no image"), todo)
        })
    }

    pub(super) async fn get_one_image(
        &self,
        request: &GetImageRequest,
    ) -> Result<GetImageResponse, ApiError> {
        let digest = self.image_digest(&request.image).await?;
        let stored = self.builder.documents.image(&digest).await?.map(|read| read.value);
        let server = stored.as_ref().map(|stored| stored.server.to_string()).unwrap_or_default();
        let (images, trust) = (self.images.clone(), self.signing.trust(&server).cloned());
        let read = tokio::task::spawn_blocking(move || {
            let image = images.image(&digest)?;
            let trust = trust.unwrap_or(Trust { keys: Vec::new(), threshold: 1 });
            let trusted =
                trust.keys.iter().map(|key| read_trusted_key(key)).collect::<Result<Vec<_>, _>>()?;
            let verified = images.verify(&digest, &trusted, trust.threshold, Thoroughness::Manifest);
            let ids =
                verified.map(|keys| keys.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
            Ok::<_, kiln_image::Error>((image, ids))
        });
        let read = read.await.map_err(|error| ApiError::internal(&error))?;
        let (image, verified) = read.map_err(|error| image_error(&error, &digest))?;
        let config = serde_json::to_string(&image.config).map_err(|error| ApiError::internal(&error))?;
        let layers = image.layers.into_iter().map(|layer| Layer {
            digest: layer.diff_id.to_string(),
            size: layer.size,
            created_by: layer.created_by,
        });
        let mut answer = Image {
            digest: digest.to_string(),
            layers: layers.collect(),
            config_json: config,
            verified: verified.is_ok(),
            key_id: verified.unwrap_or_default(),
            ..Image::default()
        };
        if let Some(stored) = stored {
            answer.server = stored.server.to_string();
            answer.lock_key = stored.lock_key.to_string();
            answer.build = stored.build.to_string();
            answer.packages = stored.packages;
        }
        Ok(GetImageResponse { image: Some(answer) })
    }

    pub(super) async fn export(
        &self,
        request: &ExportImageRequest,
    ) -> Result<Streamed<ExportImageResponse>, ApiError> {
        let digest = self.image_digest(&request.image).await?;
        let stored = self.builder.documents.image(&digest).await?;
        let server = stored.map_or_else(|| "image".to_owned(), |read| read.value.server.to_string());
        // As Docker wants a name: repository and tag.
        let name = format!("kiln/{server}:{}", digest.short());
        self.exports.begin(self.images.clone(), digest, name, request.form())
    }

    pub(super) async fn hold_images(&self, request: HoldRequest, by: &str) -> Result<HoldResponse, ApiError> {
        if request.holder.is_empty()
            || request.holder.len() > 128
            || request.holder.chars().any(char::is_control)
        {
            return Err(ApiError::invalid(
                "holder",
                "is no name of 1 to 128 characters",
                "say who holds them",
            ));
        }
        if request.image_digests.len() > MAX_HELD {
            let why = format!("more than {MAX_HELD} images");
            return Err(ApiError::invalid("image_digests", why, "hold what is needed"));
        }
        let mut images = Vec::new();
        for text in &request.image_digests {
            images.push(kiln_api::convert::text::<Digest>("image_digests", text)?);
        }
        images.sort();
        images.dedup();
        let (store, id) = (self.builder.documents.store(), &request.request_id);
        let unknown = self.unknown_images(&request.holder, &images).await?;
        let Some(first) = unknown.first() else {
            let decide = || async { Ok((self.decide_hold(&request, &images, by).await?, HoldResponse {})) };
            return requests::once(store, id, &request, decide).await;
        };
        // What is there is held all the same: the one that is not must not cost the holder the others.
        images.retain(|image| !unknown.contains(image));
        let batch = self.decide_hold(&request, &images, by).await?;
        store.commit(batch).await?;
        Err(ApiError::not_found("image", first.to_string()))
    }

    /// Those that are not held yet and are not there. What is held stays so, also where a restored store forgot it.
    async fn unknown_images(&self, holder: &str, images: &[Digest]) -> Result<BTreeSet<Digest>, ApiError> {
        let held =
            self.builder.documents.hold(holder).await?.map(|read| read.value.images).unwrap_or_default();
        let mut unknown = BTreeSet::new();
        for image in images.iter().filter(|image| !held.contains(image)) {
            if self.builder.documents.image(image).await?.is_none() {
                unknown.insert(*image);
            }
        }
        Ok(unknown)
    }

    async fn decide_hold(
        &self,
        request: &HoldRequest,
        images: &[Digest],
        by: &str,
    ) -> Result<Batch, ApiError> {
        let holder = request.holder.as_str();
        let known = self.builder.documents.hold(holder).await?;
        let mut edit = Edit::new(self.builder.now());
        let (version, held) = known.map_or((0, Vec::new()), |known| (known.version, known.value.images));
        if version == 0 || held != images {
            for image in images.iter().filter(|image| !held.contains(image)) {
                self.builder.need(&mut edit, image).await?;
            }
            let record = AuditRecord::new(edit.now(), by, "hold", holder).asked(&request.request_id);
            edit.audit(record.changed(serde_json::json!(held), serde_json::json!(images)));
            edit.put(HOLD_KIND, holder, version, &StoredHold { images: images.to_vec() })?;
        }
        Ok(edit.finish())
    }
}

pub(super) fn image_error(error: &kiln_image::Error, digest: &Digest) -> ApiError {
    match error {
        kiln_image::Error::NoBlob(missing) if missing == digest => {
            ApiError::not_found("image", digest.to_string())
        }
        kiln_image::Error::NoImage(missing) => ApiError::not_found("image", missing.to_string()),
        other => ApiError::internal(other),
    }
}
