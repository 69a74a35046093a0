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

pub(crate) use ports::holder;
pub(crate) use slots::SLOTS;
pub(crate) use table::{exists, remove, try_out};

/// For each port that users connect to, who answers there.
pub(crate) type Wanted = BTreeMap<u16, Vec<SocketAddrV4>>;

/// Slot to backend, for each port.
type Slots = BTreeMap<u16, Vec<SocketAddrV4>>;

/// The only writer of the site's table.
#[derive(Debug)]
pub(crate) struct Edge {
    names: Names,
    helpers: Helpers,
    now: Mutex<Slots>,
}

impl Edge {
    /// Takes over the table as it is, or makes an empty one where there is none of the right shape.
    pub(crate) async fn open(names: &Names, helpers: &Helpers) -> Result<Self, Failure> {
        let now = take_over(names, helpers).await?;
        Ok(Self { names: names.clone(), helpers: helpers.clone(), now: Mutex::new(now) })
    }

    /// Looks at the table anew: somebody may have flushed the machine's rules.
    pub(crate) async fn look(&self) -> Result<(), Failure> {
        let mut now = self.now.lock().await;
        *now = take_over(&self.names, &self.helpers).await?;
        Ok(())
    }

    /// Brings the edge to what is wanted, in one transaction. False where it was so already.
    pub(crate) async fn apply(&self, wanted: &Wanted) -> Result<bool, Failure> {
        let mut now = self.now.lock().await;
        let next: Slots = wanted
            .iter()
            .filter(|(_, backends)| !backends.is_empty())
            .map(|(listen, backends)| {
                let before = now.get(listen).map_or(&[][..], Vec::as_slice);
                (*listen, slots::spread(before, backends))
            })
            .collect();
        let script = table::difference(&self.names, &now, &next);
        if script.is_empty() {
            return Ok(false);
        }
        table::run(&self.helpers, &script).await?;
        *now = next;
        metrics::flipped();
        Ok(true)
    }

    /// Why users could not be given this port: something else on the machine answers there.
    pub(crate) async fn held_by_other(&self, listen: u16) -> Result<Option<String>, Failure> {
        if self.now.lock().await.contains_key(&listen) {
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
        if let Err(error) = conntrack::forget(&self.helpers, address).await {
            tracing::warn!(%error, %address, "connections to a gone instance end by their own timeouts");
        }
    }
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
