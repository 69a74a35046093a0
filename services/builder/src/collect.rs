//! Removing what nobody needs: images, what was left of unfinished ones, logs of old builds, and what bakes keep for later
//! ones.

use std::collections::BTreeSet;
use std::sync::Arc;
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
use tokio::sync::{Mutex, watch};

use crate::bakery::Bakery;
use crate::builder::{Builder, Error, TRIES};
use crate::store::{Documents, Edit, HOLD_KIND, IMAGE_KIND, Read, StoredHold, StoredImage};

const PERIOD: Duration = Duration::from_secs(3600);

/// Whether what nobody needs is removed, or only looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Remove,
    Look,
}

/// What of one kind was removed, or would be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collected {
    /// For people, in the plural.
    pub what: &'static str,
    pub count: u64,
    pub bytes: u64,
}

impl Collected {
    pub fn new(what: &'static str) -> Self {
        Self { what, count: 0, bytes: 0 }
    }

    pub fn add(&mut self, count: u64, bytes: u64) {
        self.count += count;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

/// Removes what nobody needs, by itself and when it is asked to.
#[derive(Clone)]
pub struct Collector<S, K, C> {
    builder: Builder<S, K, C>,
    images: ImageStore,
    /// When the deployer was heard of last.
    heard: watch::Receiver<Option<Timestamp>>,
    /// How long what no build uses is kept.
    unused: Duration,
    /// Two at once would count the same things.
    turn: Arc<Mutex<()>>,
}

impl<S: Store, K: Bakery, C: Clock> Collector<S, K, C> {
    pub fn new(
        builder: Builder<S, K, C>,
        images: ImageStore,
        heard: watch::Receiver<Option<Timestamp>>,
        unused: Duration,
    ) -> Self {
        Self { builder, images, heard, unused, turn: Arc::default() }
    }

    /// Collects once an hour until told to stop.
    pub async fn run(&self, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                biased;
                () = shutdown::requested(&mut stop) => return,
                () = self.builder.clock.sleep(PERIOD) => {}
            }
            // What went wrong has been told.
            let all = self.collect(How::Remove).await.unwrap_or_default();
            for Collected { what, count, bytes } in all.iter().filter(|it| it.count > 0) {
                tracing::info!(count, bytes, "{what} that nobody needs were removed");
            }
        }
    }

    /// What nobody needs, kind by kind. One kind that can't be removed keeps none of the others.
    ///
    /// # Errors
    /// The first of what went wrong; each is in the log.
    pub async fn collect(&self, how: How) -> Result<Vec<Collected>, Error> {
        let _turn = self.turn.lock().await;
        let heard = *self.heard.borrow();
        let images = self.builder.collect(&self.images, heard, how).await;
        let kinds = [
            images.map(|images| vec![images]),
            self.forget_unused(how).await,
            self.forget_unfinished(how).await.map(|unfinished| vec![unfinished]),
            self.builder.logs.prune(how).map(|logs| vec![logs]).map_err(disk),
        ];
        let mut all = Vec::new();
        let mut first = None;
        for kind in kinds {
            match kind {
                Ok(collected) => all.extend(collected),
                Err(error) => {
                    tracing::warn!(%error, "what nobody needs could not be removed");
                    first.get_or_insert(error);
                }
            }
        }
        first.map_or(Ok(all), Err)
    }

    async fn forget_unfinished(&self, how: How) -> Result<Collected, Error> {
        let store = self.images.clone();
        let forgotten = aside(move || store.forget_unfinished(how == How::Remove)).await;
        let (count, bytes) = forgotten.map_err(disk)?.map_err(disk)?;
        Ok(Collected { what: "layers that were never finished", count, bytes })
    }

    async fn forget_unused(&self, how: How) -> Result<Vec<Collected>, Error> {
        let (_, servers) = self.builder.documents.holders().await?;
        let in_force = servers.iter().filter_map(|server| server.in_force.as_ref().map(|it| it.lock_key));
        let building = servers.iter().filter_map(|server| server.building.as_ref().map(|it| it.lock_key));
        let keys: BTreeSet<Digest> = in_force.chain(building).collect();
        let mut locks = Vec::new();
        for key in &keys {
            locks.extend(self.builder.documents.lock(key).await?);
        }
        Ok(self.builder.bakery.forget_unused(self.unused, locks, how).await?)
    }
}

fn disk(error: impl std::fmt::Display) -> Error {
    Error::Disk(error.to_string())
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

    /// Removes images that nobody needs.
    ///
    /// # Errors
    /// The store refuses, or an image can't be looked at.
    pub async fn collect(
        &self,
        images: &ImageStore,
        deployer_heard: Option<Timestamp>,
        how: How,
    ) -> Result<Collected, Error> {
        // Read first: whoever comes to need one of these later has written its document again, and whoever came before is
        // seen below.
        let stored: Vec<Read<StoredImage>> = self.documents.all(IMAGE_KIND, "").await?;
        let (held, servers) = self.documents.holders().await?;
        let ages: Vec<_> = stored.iter().map(|read| (read.value.digest, read.value.created)).collect();
        let doomed = garbage(&ages, &held, &servers, deployer_heard, self.now());
        let mut collected = Collected::new("images");
        if doomed.is_empty() {
            return Ok(collected);
        }
        let (store, all) = (images.clone(), doomed.clone());
        let bytes = aside(move || store.bytes_of_only(&all)).await;
        collected.add(0, bytes.map_err(disk)?.map_err(disk)?);
        for read in stored.iter().filter(|read| doomed.contains(&read.value.digest)) {
            let digest = read.value.digest;
            if how == How::Look {
                collected.add(1, 0);
                continue;
            }
            match self.forget_image(read).await {
                Ok(()) => {
                    self.remove(images, digest).await;
                    collected.add(1, 0);
                }
                Err(error) if error.is_conflict() => {
                    tracing::debug!(%digest, %error, "is needed again, and stays");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(collected)
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
