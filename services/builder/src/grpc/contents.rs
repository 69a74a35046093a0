//! What is in images, written down and compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::{StreamExt as _, stream};
use kiln_api::builder::{
    CompareImagesRequest, CompareImagesResponse, ConfigurationChange, Document, FileChange, FileKind,
    FileState, ReadDocumentRequest, ReadDocumentResponse,
};
use kiln_builder_core::build::package_changes;
use kiln_image::{ARTIFACT_LIMIT, Difference, Image, ImageStore, Node, NodeKind};
use kiln_model::digest::Digest;
use kiln_model::revision::PackageVersions;
use kiln_service::clock::Clock;
use kiln_service::error::ApiError;
use kiln_store::Store;

use super::images::image_error;
use super::{Api, Streamed};
use crate::bake::BakeError;
use crate::bakery::Bakery;
use crate::describe::{self, shown, words};
use crate::wire;

pub(super) const AT_ONCE: usize = 4;
/// One message of a document.
const CHUNK: usize = 256 << 10;
/// Files in one message.
const FILES: usize = 500;

impl<S: Store, K: Bakery, C: Clock> Api<S, K, C> {
    pub(super) async fn document(
        &self,
        request: &ReadDocumentRequest,
    ) -> Result<Streamed<ReadDocumentResponse>, ApiError> {
        let (name, artifact_type) = match request.document() {
            Document::Sbom => ("SBOM", describe::SBOM),
            Document::Provenance => ("provenance", describe::PROVENANCE),
            Document::Datasheet => ("datasheet", describe::DATASHEET),
            Document::Unspecified => {
                return Err(ApiError::invalid(
                    "document",
                    "is none that is known",
                    "ask for the SBOM, the provenance or the datasheet",
                ));
            }
        };
        let digest = self.image_digest(&request.image).await?;
        let images = self.images.clone();
        let read = self.look(move || {
            images.image(&digest)?;
            images.attached(&digest, artifact_type, ARTIFACT_LIMIT)
        });
        let content = read.await?.map_err(|error| image_error(&error, &digest))?.ok_or_else(|| {
            let todo = "it was made before there were any: its next build has one".to_owned();
            ApiError::precondition(format!("image {digest} has no {name}"), todo)
        })?;
        let chunks: Vec<_> =
            content.chunks(CHUNK).map(|part| Ok(ReadDocumentResponse { data: part.to_vec() })).collect();
        Ok(stream::iter(chunks).boxed())
    }

    /// Reads images, a few at a time. It goes on where whoever asked has gone, and keeps its place until then.
    async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let Ok(place) = Arc::clone(&self.looking).try_acquire_owned() else {
            return Err(ApiError::Exhausted {
                reason: format!("{AT_ONCE} images are being looked into, as many as may be at once"),
                what_to_do: "ask again when one of these is done".to_owned(),
            });
        };
        let looked = tokio::task::spawn_blocking(move || {
            let _place = place;
            look()
        });
        looked.await.map_err(|error| ApiError::internal(&error))
    }

    pub(super) async fn compare(
        &self,
        request: &CompareImagesRequest,
    ) -> Result<Streamed<CompareImagesResponse>, ApiError> {
        let before = self.image_digest(&request.before).await?;
        let after = self.image_digest(&request.after).await?;
        let images = self.images.clone();
        let compared = self.look(move || compare(&images, &before, &after)).await?;
        let (first, files) = compared?;
        let mut files = files.into_iter();
        let rest = std::iter::from_fn(move || {
            let some: Vec<_> = files.by_ref().take(FILES).map(file).collect();
            (!some.is_empty()).then(|| Ok(CompareImagesResponse { files: some, ..Default::default() }))
        });
        Ok(stream::iter(std::iter::once(Ok(first)).chain(rest)).boxed())
    }
}

fn compare(
    images: &ImageStore,
    before: &Digest,
    after: &Digest,
) -> Result<(CompareImagesResponse, Vec<Difference>), ApiError> {
    let image = |digest: &Digest| images.image(digest).map_err(|error| image_error(&error, digest));
    let (old, new) = (image(before)?, image(after)?);
    let failed = |error: &kiln_image::Error| image_error(error, before);
    let (held, holds) = images.contents_of_both(before, after).map_err(|error| failed(&error))?;
    let files = held.differences(&holds).map_err(|error| failed(&error))?;
    let first = CompareImagesResponse {
        before: before.to_string(),
        after: after.to_string(),
        packages: wire::package_changes(&package_changes(
            &packages(images, before)?,
            &packages(images, after)?,
        )),
        configuration: changes(&configuration(&old), &configuration(&new))
            .map(|(name, before, after)| ConfigurationChange { name, before, after })
            .collect(),
        files: Vec::new(),
    };
    Ok((first, files))
}

/// What differs: its name, and what it was and is; empty where it is not there.
fn changes(
    before: &BTreeMap<String, String>,
    after: &BTreeMap<String, String>,
) -> impl Iterator<Item = (String, String, String)> {
    let names = before.keys().chain(after.keys().filter(|name| !before.contains_key(*name)));
    let side = |all: &BTreeMap<String, String>, name| all.get(name).cloned().unwrap_or_default();
    let mut changes: Vec<_> = names
        .map(|name| (name.clone(), side(before, name), side(after, name)))
        .filter(|(_, old, new)| old != new)
        .collect();
    changes.sort();
    changes.into_iter()
}

fn packages(images: &ImageStore, image: &Digest) -> Result<PackageVersions, ApiError> {
    let packages = describe::packages(images, image).map_err(|error| match error {
        BakeError::Image(error) => image_error(&error, image),
        other => ApiError::internal(&other),
    })?;
    Ok(describe::versions(&packages))
}

/// How its processes are begun.
fn configuration(image: &Image) -> BTreeMap<String, String> {
    let mut all = BTreeMap::from([("architecture".to_owned(), image.config.architecture().to_string())]);
    if let Some(config) = image.config.config() {
        all.insert("user".to_owned(), config.user().clone().unwrap_or_default());
        all.insert("entrypoint".to_owned(), words(config.entrypoint()));
        all.insert("command".to_owned(), words(config.cmd()));
        all.insert("working directory".to_owned(), config.working_dir().clone().unwrap_or_default());
        for variable in config.env().iter().flatten() {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            all.insert(format!("env {name}"), value.to_owned());
        }
    }
    all
}

fn file(difference: Difference) -> FileChange {
    let state = |node: Node| {
        let (kind, size, target) = match node.kind {
            NodeKind::File { size } => (FileKind::Regular, size, String::new()),
            NodeKind::Directory => (FileKind::Directory, 0, String::new()),
            NodeKind::Symlink { target } => (FileKind::Symlink, 0, shown(&target)),
            NodeKind::Fifo => (FileKind::Fifo, 0, String::new()),
        };
        let capabilities = node.capabilities.map(hex::encode).unwrap_or_default();
        FileState {
            kind: kind.into(),
            mode: node.mode,
            uid: node.uid,
            gid: node.gid,
            size,
            target,
            capabilities,
        }
    };
    FileChange {
        path: format!("/{}", shown(&difference.path)),
        before: difference.before.map(state),
        after: difference.after.map(state),
        content: difference.content,
    }
}
