//! Namespaces made ahead: plugging one in takes 30 ms, which a launch should not wait for.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Mutex, Notify};

use super::{Cni, leases, namespace};
use crate::failure::{During, Failure};
use crate::names::Names;

/// A rollout takes one at a time, a cold start a few at once.
const AHEAD: usize = 4;

/// Left to the launch that took one: making the next costs as much of a core as the launch itself.
const LAUNCH: Duration = Duration::from_millis(120);

/// A namespace with an address on the site's bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plug {
    pub(crate) namespace: String,
    pub(crate) address: Ipv4Addr,
}

#[derive(Debug)]
pub(crate) struct Pool {
    cni: Cni,
    names: Names,
    ready: Mutex<Vec<Plug>>,
    taken: Notify,
}

impl Pool {
    pub(crate) fn new(cni: Cni, names: Names) -> Arc<Self> {
        Arc::new(Self { cni, names, ready: Mutex::default(), taken: Notify::new() })
    }

    /// A namespace that nobody else has: one made ahead, or else a new one.
    pub(crate) async fn take(&self) -> Result<Plug, Failure> {
        let ahead = self.ready.lock().await.pop();
        self.taken.notify_one();
        match ahead {
            Some(plug) => Ok(plug),
            None => self.make().await,
        }
    }

    /// Unplugs and removes a namespace; fine if it was done before.
    pub(crate) async fn give_back(&self, name: &str) -> Result<(), Failure> {
        self.cni.del(name).await?;
        let name = name.to_owned();
        tokio::task::spawn_blocking(move || namespace::remove(&name))
            .await
            .during(|| "removing a network namespace".to_owned())?
    }

    /// Every namespace of the site that is there or holds an address.
    pub(crate) fn known(&self) -> Result<Vec<String>, Failure> {
        let mut all = namespace::list(&self.names.netns_prefix())?;
        all.extend(leases(&self.names));
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// Keeps the pool full until `stop`.
    pub(crate) async fn keep_full(&self, mut stop: tokio::sync::watch::Receiver<bool>) {
        let mut pause = Duration::from_millis(100);
        loop {
            let full = self.ready.lock().await.len() >= AHEAD;
            let wait = async {
                if full {
                    self.taken.notified().await;
                    tokio::time::sleep(LAUNCH).await;
                    return;
                }
                match self.make().await {
                    Ok(plug) => {
                        self.ready.lock().await.push(plug);
                        pause = Duration::from_millis(100);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "no network namespace could be made ahead; trying again");
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(Duration::from_secs(30));
                    }
                }
            };
            tokio::select! {
                () = wait => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
        }
    }

    async fn make(&self) -> Result<Plug, Failure> {
        // Random names: one that was given back is not used again while something still knows it.
        let id = ulid::Ulid::generate().to_string().to_ascii_lowercase();
        let name = format!("{}{}", self.names.netns_prefix(), id.get(16..).unwrap_or_default());
        let made = name.clone();
        tokio::task::spawn_blocking(move || namespace::make(&made))
            .await
            .during(|| "making a network namespace".to_owned())??;
        match self.cni.add(&name).await {
            Ok(address) => Ok(Plug { namespace: name, address }),
            Err(failure) => {
                if let Err(error) = self.give_back(&name).await {
                    tracing::warn!(%error, namespace = name, "left over until the next start of the node");
                }
                Err(failure)
            }
        }
    }
}
