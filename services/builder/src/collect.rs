//! Removing images that nobody needs.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::Timestamp;
use kiln_builder_core::collect::garbage;
use kiln_builder_core::server::{self, Server};
use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_service::clock::Clock;
use kiln_service::shutdown;
use kiln_store::Store;
use tokio::sync::watch;

use crate::bakery::Bakery;
use crate::builder::{Builder, Error};
use crate::store::{Edit, HOLD_KIND, IMAGE_KIND, Read, StoredHold, StoredImage};

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
            () = shutdown::requested(&mut stop) => return,
            () = builder.clock.sleep(PERIOD) => {}
        }
        let deployer_heard = *heard.borrow();
        match builder.collect(&images, deployer_heard).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "images that nobody needs were removed"),
            Err(error) => tracing::warn!(%error, "images could not be collected"),
        }
    }
}

impl<S: Store, K: Bakery, C: Clock> Builder<S, K, C> {
    /// Removes what nobody needs, and says how many images that were.
    ///
    /// # Errors
    /// The store refuses.
    pub async fn collect(
        &self,
        images: &ImageStore,
        deployer_heard: Option<Timestamp>,
    ) -> Result<usize, Error> {
        let holds = self.documents.store().list(HOLD_KIND, "", None, 500).await?;
        let mut held = BTreeSet::new();
        for document in &holds {
            held.extend(crate::store::typed::<StoredHold>(document)?.value.images);
        }
        let stored: Vec<Read<StoredImage>> = self.documents.all(IMAGE_KIND, "").await?;
        let servers: Vec<Server> = self
            .documents
            .all(server::KIND, "")
            .await?
            .into_iter()
            .map(|read: Read<Server>| read.value)
            .collect();
        let ages: Vec<_> = stored.iter().map(|read| (read.value.digest, read.value.created)).collect();
        let doomed = garbage(&ages, &held, &servers, deployer_heard, self.now());
        for digest in &doomed {
            let Some(read) = stored.iter().find(|read| read.value.digest == *digest) else { continue };
            let mut edit = Edit::new(self.now());
            // A hold that came meanwhile refuses the removal.
            for document in &holds {
                edit.expect(HOLD_KIND, &document.id, document.version);
            }
            edit.delete(IMAGE_KIND, &digest.hex(), read.version);
            // The lock has no image any more: the next plan for it is built.
            if let Some(slot) = self.documents.slot_holder(&read.value.lock_key).await?
                && let Some(build) = self.documents.build(&slot.value.build).await?
            {
                edit.free_slot(slot.version, &build.value);
            }
            self.documents.store().commit(edit.finish()).await?;
            self.remove(images, *digest).await;
        }
        Ok(doomed.len())
    }

    async fn remove(&self, images: &ImageStore, digest: Digest) {
        let images = images.clone();
        let removed = tokio::task::spawn_blocking(move || images.delete(&digest)).await;
        match removed {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%digest, %error, "an image's files could not be removed"),
            Err(error) => tracing::error!(%digest, %error, "an image's removal ended badly"),
        }
    }
}
