//! The edge: the ports that users connect to, as one nftables map from port and slot to an instance's address. The
//! kernel carries the traffic; with every Kiln process dead it goes on.

mod conntrack;
mod ports;
mod slots;
mod table;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

use tokio::sync::Mutex;

use crate::failure::Failure;
use crate::helper::Helpers;
use crate::metrics;
use crate::names::Names;
use crate::node::blocking;

use conntrack::Of;
pub(crate) use ports::holder;
pub(crate) use slots::SLOTS;
pub(crate) use table::{exists, remove, try_out};

/// For each port that users connect to, who answers there.
pub(crate) type Wanted = BTreeMap<u16, Vec<SocketAddrV4>>;

/// Slot to backend, for each port.
type Slots = BTreeMap<u16, Vec<SocketAddrV4>>;

/// Looks at the table that a flip may overtake, before the flips themselves are taken as a sign that it is well.
const LOOKS: u32 = 3;

/// The only writer of the site's table.
#[derive(Debug)]
pub(crate) struct Edge {
    names: Names,
    helpers: Helpers,
    /// Held while one transaction runs, and for nothing that takes longer: an instance that has just ended waits for it.
    now: Mutex<Now>,
}

/// The table as it was last written or read.
#[derive(Debug)]
struct Now {
    slots: Slots,
    /// Flips so far, those that failed included: what was read beside one may be of before or after it.
    flips: u64,
}

impl Edge {
    /// Takes over the table as it is, or makes an empty one where there is none of the right shape.
    pub(crate) async fn open(names: &Names, helpers: &Helpers) -> Result<Self, Failure> {
        let slots = take_over(names, helpers).await?;
        let now = Mutex::new(Now { slots, flips: 0 });
        Ok(Self { names: names.clone(), helpers: helpers.clone(), now })
    }

    /// Looks at the table anew: somebody may have flushed the machine's rules.
    pub(crate) async fn look(&self) -> Result<(), Failure> {
        for _ in 0..LOOKS {
            let flips = self.now.lock().await.flips;
            let read = table::read(&self.names, &self.helpers).await?;
            let mut now = self.now.lock().await;
            if now.flips != flips {
                continue;
            }
            now.slots = match read {
                Some(slots) => slots,
                None => take_over(&self.names, &self.helpers).await?,
            };
            return Ok(());
        }
        Ok(())
    }

    /// Brings the edge to what is wanted, in one transaction. False where it was so already. What is wanted is asked for
    /// when nobody else changes the edge any more: what was evicted until then is not wanted.
    pub(crate) async fn apply(&self, wanted: impl FnOnce() -> Wanted) -> Result<bool, Failure> {
        let mut now = self.now.lock().await;
        let wanted = wanted().into_iter().filter(|(_, backends)| !backends.is_empty());
        let next = wanted.map(|(listen, backends)| {
            let before = now.slots.get(&listen).map_or(&[][..], Vec::as_slice);
            (listen, slots::spread(before, &backends))
        });
        let next: Slots = next.collect();
        // What comes to a port that is not on the edge is sent nowhere, so what is tracked there is of an edge before: of a
        // site that was taken down whole, or lost its table, under load. For two minutes it would lead the next user of its
        // port to an instance that is long gone. Once the port is on the edge, connections there are those of users.
        for listen in next.keys().filter(|listen| !now.slots.contains_key(listen)) {
            forget(Of::Listener(*listen)).await;
        }
        self.flip(&mut now, next).await
    }

    /// Takes an instance off every port.
    pub(crate) async fn evict(&self, address: Ipv4Addr) -> Result<(), Failure> {
        let mut now = self.now.lock().await;
        let next = now.slots.iter().filter_map(|(listen, before)| {
            let left: Vec<_> = before.iter().filter(|backend| *backend.ip() != address).copied().collect();
            let slots = if left.len() == before.len() { left } else { slots::spread(before, &left) };
            (!slots.is_empty()).then_some((*listen, slots))
        });
        let next = next.collect();
        self.flip(&mut now, next).await.map(drop)
    }

    async fn flip(&self, now: &mut Now, next: Slots) -> Result<bool, Failure> {
        let script = table::difference(&self.names, &now.slots, &next);
        if script.is_empty() {
            return Ok(false);
        }
        now.flips += 1;
        if let Err(error) = table::run(&self.helpers, &script).await {
            // Somebody flushed the table, perhaps: then no element that is to go can be deleted, now or ever.
            tracing::warn!(%error, "the edge is not as it was left; it is looked at, and flipped again");
            now.slots = take_over(&self.names, &self.helpers).await?;
            let script = table::difference(&self.names, &now.slots, &next);
            if !script.is_empty() {
                table::run(&self.helpers, &script).await?;
            }
        }
        now.slots = next;
        metrics::flipped();
        Ok(true)
    }

    /// Why users could not be given this port: something else on the machine answers there.
    pub(crate) async fn held_by_other(&self, listen: u16) -> Result<Option<String>, Failure> {
        if self.now.lock().await.slots.contains_key(&listen) {
            return Ok(None);
        }
        match ports::holder(listen)? {
            Some(holder) => Ok(Some(holder)),
            None => table::other_site_with(&self.names, &self.helpers, listen).await,
        }
    }

    /// Forgets the connections to an instance that is gone. Else a client that sends its SYN again would be sent there
    /// again, however the map is now.
    pub(crate) async fn forget(&self, address: Ipv4Addr) {
        forget(Of::Instance(address)).await;
    }
}

async fn forget(of: Of) {
    let forgotten = blocking(move || conntrack::forget(of)).await;
    let why = match forgotten {
        Ok(Ok(())) => return,
        Ok(Err(failure)) => failure.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::warn!(why, "connections that wait in vain end by their own timeouts");
}

/// The elements of the table, which is made where it is missing or of another shape.
async fn take_over(names: &Names, helpers: &Helpers) -> Result<Slots, Failure> {
    match table::read(names, helpers).await? {
        Some(slots) => Ok(slots),
        None => {
            table::make(names, helpers).await?;
            Ok(Slots::new())
        }
    }
}
