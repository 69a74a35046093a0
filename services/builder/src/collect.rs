//! Removing what nobody needs: images, what was left of unfinished ones, and logs of old builds.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use kiln_builder_core::build::State;
use kiln_builder_core::collect::{garbage, needed};
use kiln_builder_core::server::{self, Server};
use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_model::name::ServerName;
use kiln_service::aside::aside;
use kiln_service::clock::Clock;
use kiln_service::shutdown;
use kiln_store::Store;
use tokio::sync::watch;

use crate::bakery::Bakery;
use crate::builder::{Builder, Error, TRIES};
use crate::store::{Documents, Edit, HOLD_KIND, IMAGE_KIND, Read, StoredHold, StoredImage};

const PERIOD: Duration = Duration::from_secs(3600);

/// Collects once an hour until told to stop.
pub async fn run<S: Store, K: Bakery, C: Clock>(
    builder: Builder<S, K, C>,
    images: ImageStore,
    heard: watch::Receiver<Option<Timestamp>>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        tokio::select! {
            biased;
            () = shutdown::requested(&mut stop) => return,
            () = builder.clock.sleep(PERIOD) => {}
        }
        match builder.logs.prune() {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "logs of old builds were removed"),
            Err(error) => tracing::warn!(%error, "logs of old builds could not be removed"),
        }
        let store = images.clone();
        match aside(move || store.forget_unfinished()).await {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => tracing::info!(count, "layers that were never finished were removed"),
            Ok(Err(error)) => tracing::warn!(%error, "unfinished layers could not be removed"),
            Err(error) => tracing::error!(%error, "the removal of unfinished layers ended badly"),
        }
        let deployer_heard = *heard.borrow();
        match builder.collect(&images, deployer_heard).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "images that nobody needs were removed"),
            Err(error) => tracing::warn!(%error, "images could not be collected"),
        }
    }
}

impl<S: Store> Documents<S> {
    async fn holders(&self) -> Result<(BTreeSet<Digest>, Vec<Server>), kiln_store::Error> {
        let holds: Vec<Read<StoredHold>> = self.all(HOLD_KIND, "").await?;
        let held = holds.into_iter().flat_map(|hold| hold.value.images).collect();
        let servers = self.all(server::KIND, "").await?;
        Ok((held, servers.into_iter().map(|read: Read<Server>| read.value).collect()))
    }

    /// [`Documents::needed_images`], as far as they are known here, with whose they are.
    ///
    /// # Errors
    /// Where the store can't be read.
    pub async fn needed_of_servers(&self) -> Result<Vec<(Digest, ServerName)>, kiln_store::Error> {
        let mut found = Vec::new();
        for digest in self.needed_images().await? {
            if let Some(read) = self.image(&digest).await? {
                found.push((digest, read.value.server));
            }
        }
        Ok(found)
    }

    /// Images that somebody can come to need.
    ///
    /// # Errors
    /// Where the store can't be read.
    pub async fn needed_images(&self) -> Result<BTreeSet<Digest>, kiln_store::Error> {
        let (held, servers) = self.holders().await?;
        Ok(needed(&held, &servers))
    }
}

impl<S: Store, K: Bakery, C: Clock> Builder<S, K, C> {
    /// Forgets images that nobody needs and that are not there, as after a restore: the next plan for one is built.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn forget_lost(&self, images: &ImageStore) -> Result<usize, Error> {
        let needed = self.documents.needed_images().await?;
        let stored: Vec<Read<StoredImage>> = self.documents.all(IMAGE_KIND, "").await?;
        let mut forgotten = 0;
        for read in &stored {
            let digest = &read.value.digest;
            if !needed.contains(digest) && !images.has_blob(digest) {
                self.forget_image(read).await?;
                forgotten += 1;
            }
        }
        Ok(forgotten)
    }

    /// Removes what nobody needs, and says how many images that were.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn collect(
        &self,
        images: &ImageStore,
        deployer_heard: Option<Timestamp>,
    ) -> Result<usize, Error> {
        // Read first: whoever comes to need one of these later has written its document again, and whoever came before is
        // seen below.
        let stored: Vec<Read<StoredImage>> = self.documents.all(IMAGE_KIND, "").await?;
        let (held, servers) = self.documents.holders().await?;
        let ages: Vec<_> = stored.iter().map(|read| (read.value.digest, read.value.created)).collect();
        let doomed = garbage(&ages, &held, &servers, deployer_heard, self.now());
        let mut removed = 0;
        for read in stored.iter().filter(|read| doomed.contains(&read.value.digest)) {
            let digest = read.value.digest;
            match self.forget_image(read).await {
                Ok(()) => {
                    self.remove(images, digest).await;
                    removed += 1;
                }
                Err(error) if error.is_conflict() => {
                    tracing::debug!(%digest, %error, "is needed again, and stays");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Says that a build has come to an image again that was made before: it runs in the build's tests, and is as new as one
    /// that is made just now.
    ///
    /// # Errors
    /// The store refuses, or others go on writing it.
    pub async fn came_to_again(&self, digest: &Digest) -> Result<(), Error> {
        let mut tries = TRIES;
        loop {
            let Some(Read { version, mut value }) = self.documents.image(digest).await? else {
                return Ok(());
            };
            value.created = self.now();
            let mut edit = Edit::new(value.created);
            edit.put_image(version, &value)?;
            tries -= 1;
            match self.documents.store().commit(edit.finish()).await {
                Err(kiln_store::Error::Conflict { .. }) if tries > 0 => {}
                done => return Ok(done.map(drop)?),
            }
        }
    }

    /// Removes an image's document as it was read.
    ///
    /// # Errors
    /// A conflict where somebody came to need it since then.
    pub(crate) async fn forget_image(&self, read: &Read<StoredImage>) -> Result<(), Error> {
        let mut edit = Edit::new(self.now());
        edit.delete(IMAGE_KIND, &read.value.digest.hex(), read.version);
        // The lock has no image any more: the next plan for it is built.
        if let Some(slot) = self.documents.slot_holder(&read.value.lock_key).await?
            && let Some(build) = self.documents.build(&slot.value.build).await?
            && matches!(build.value.state, State::Succeeded { image } if image == read.value.digest)
        {
            edit.free_slot(slot.version, &build.value);
        }
        self.documents.store().commit(edit.finish()).await?;
        Ok(())
    }

    async fn remove(&self, images: &ImageStore, digest: Digest) {
        let images = images.clone();
        let removed = aside(move || images.delete(&digest)).await;
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%digest, %error, "an image's files could not be removed"),
            Err(error) => tracing::error!(%digest, %error, "an image's removal ended badly"),
        }
    }
}
