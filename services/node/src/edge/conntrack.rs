//! Tracked connections to instances.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::failure::Failure;
use crate::helper::{Helpers, outcome};

const LIMIT: Duration = Duration::from_secs(10);

/// Deletes every tracked connection that an instance answers.
pub(super) async fn forget(helpers: &Helpers, address: Ipv4Addr) -> Result<(), Failure> {
    let mut command = helpers.command("conntrack")?;
    command.args(["-D", "-f", "ipv4", "--reply-src", &address.to_string()]);
    // It fails where it found none to delete, so its status says nothing.
    outcome(&mut command, b"", LIMIT).await.map(drop)
}
