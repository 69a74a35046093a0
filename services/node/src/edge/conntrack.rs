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

/// States in which nobody answered yet. The others go on where somebody flushed the table of an edge that serves.
const OPENING: [&str; 2] = ["SYN_SENT", "SYN_RECV"];

/// Whose tracked connections.
#[derive(Debug, Clone, Copy)]
pub(super) enum Of {
    Instance(Ipv4Addr),
    /// What was sent on from there to somewhere.
    Listener(u16),
}

/// Deletes the tracked connections that wait for somebody.
pub(super) async fn forget(helpers: &Helpers, of: Of) -> Result<(), Failure> {
    let (states, filter) = match of {
        Of::Instance(address) => (&WAITING[..], vec!["--reply-src".to_owned(), address.to_string()]),
        Of::Listener(port) => {
            (&OPENING[..], vec!["--dst-nat".to_owned(), "--orig-port-dst".to_owned(), port.to_string()])
        }
    };
    for state in states {
        let mut command = helpers.command("conntrack")?;
        command.args(["-D", "-f", "ipv4", "-p", "tcp", "--state", state]).args(&filter);
        // It fails where it found none to delete, so its status says nothing.
        outcome(&mut command, b"", LIMIT).await?;
    }
    Ok(())
}
