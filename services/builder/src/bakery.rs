//! What the loops need of the bake machinery, so that a simulation can put its own in the place.

use std::time::Duration;

use async_trait::async_trait;
use kiln_model::digest::Digest;
use kiln_model::lock::Lock;

use crate::bake::{BakeError, BakeRun, BakedImage, Baker, Resolution, ResolveRequest};
use crate::collect::{Collected, How};
use crate::describe::{About, Provenance};

#[async_trait]
pub trait Bakery: Clone + Send + Sync + 'static {
    /// Every input of a definition's image.
    async fn resolve(&self, request: ResolveRequest<'_>) -> Result<Resolution, BakeError>;

    /// An image out of a lock; the same lock gives the same digest.
    async fn bake(&self, lock: &Lock, run: BakeRun) -> Result<BakedImage, BakeError>;

    /// Signs an image and where it comes from, and gives the key's id.
    async fn sign(&self, image: Digest, made: &Provenance) -> Result<String, BakeError>;

    /// Attaches a page for people to an image that has passed its tests.
    async fn describe(&self, image: Digest, about: &About) -> Result<(), BakeError>;

    /// Removes what bakes keep for later ones and what none has used for so long; the packages of `locks` count as used.
    async fn forget_unused(
        &self,
        _unused: Duration,
        _locks: Vec<Lock>,
        _how: How,
    ) -> Result<Vec<Collected>, BakeError> {
        // One that keeps nothing has nothing to remove.
        Ok(Vec::new())
    }

    /// Puts a signed image where the nodes of other machines find it. True where the site has such a place.
    async fn share(&self, image: Digest) -> Result<bool, BakeError>;
}

#[async_trait]
impl Bakery for Baker {
    async fn resolve(&self, request: ResolveRequest<'_>) -> Result<Resolution, BakeError> {
        Self::resolve(self, request).await
    }

    async fn bake(&self, lock: &Lock, run: BakeRun) -> Result<BakedImage, BakeError> {
        Self::bake(self, lock, run).await
    }

    async fn sign(&self, image: Digest, made: &Provenance) -> Result<String, BakeError> {
        Self::sign(self, image, made).await
    }

    async fn describe(&self, image: Digest, about: &About) -> Result<(), BakeError> {
        Self::describe(self, image, about).await
    }

    async fn forget_unused(
        &self,
        unused: Duration,
        locks: Vec<Lock>,
        how: How,
    ) -> Result<Vec<Collected>, BakeError> {
        Self::forget_unused(self, unused, locks, how).await
    }

    async fn share(&self, image: Digest) -> Result<bool, BakeError> {
        Self::share(self, image).await
    }
}
