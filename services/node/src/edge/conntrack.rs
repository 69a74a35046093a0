//! Tracked connections to instances.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::failure::Failure;
use crate::helper::{Helpers, outcome};

const LIMIT: Duration = Duration::from_secs(10);

/// States in which somebody still sends to the instance, or would. First the connections that a dying instance reset: each
/// keeps its user's port bound to the instance for ten seconds, and a busy user has used all its ports once within half
/// a second, while one look at a large table takes a busy machine a tenth. Entries of properly ended connections stay:
/// `conntrack` deletes by address and port what it read before, and the client may by then use the port for a
/// connection to another instance, which would lose its way.
const WAITING: [&str; 4] = ["CLOSE", "SYN_SENT", "SYN_RECV", "ESTABLISHED"];

/// Deletes the tracked connections that wait for an instance.
pub(super) async fn forget(helpers: &Helpers, address: Ipv4Addr) -> Result<(), Failure> {
    let address = address.to_string();
    for state in WAITING {
        let mut command = helpers.command("conntrack")?;
        command.args(["-D", "-f", "ipv4", "-p", "tcp", "--state", state, "--reply-src", &address]);
        // It fails where it found none to delete, so its status says nothing.
        outcome(&mut command, b"", LIMIT).await?;
    }
    Ok(())
}
