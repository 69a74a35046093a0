//! What one server bears.

use std::time::Duration;

use crate::access::Rate;

/// For a builder's server, which is sent packed folders; the others keep tonic's 4 MiB.
pub const APPLY_LIMIT: usize = 68 << 20;

/// Bounds on what callers may take of a server. Counts of connections are those of each way in: the Unix socket and
/// each TCP port have their own, so that a flood from outside leaves the site's own services theirs.
#[derive(Debug, Clone)]
pub struct Limits {
    pub connections: usize,
    /// Of one address, or of one /64 of IPv6, also while they shake hands.
    pub connections_per_address: usize,
    /// From the connection to the end of its TLS handshake, and again to the first bytes of HTTP/2, or to the end of the
    /// headers at the metrics page; without a client certificate to the first call with a good token.
    pub handshake: Duration,
    /// Calls under way on one connection.
    pub streams: u32,
    /// Bytes of a call's headers.
    pub headers: u32,
    /// Calls that a client may have taken back while the server still holds them: more end the connection.
    pub resets: usize,
    /// A silent connection is asked for a sign of life after this, and closed after as long again. One whose reader
    /// takes nothing can't give it.
    pub alive: Duration,
    /// An older connection takes no new calls: its client connects anew, which looks at its certificate again.
    pub age: Duration,
    /// Bound on one call, its first answer for a stream: an apply can wait for a slow repository.
    pub call: Duration,
    /// Messages of more than 4 MiB that are in memory at once, from there on to the answer to their call: each takes twice
    /// its size while it is decoded.
    pub large: usize,
    /// How long a further one waits for the place of one of them. What it has sent fills its connection's window, so other
    /// calls on that connection wait with it.
    pub large_wait: Duration,
    /// Connections to the metrics page that are served at once; the others wait.
    pub scrapes: usize,
    /// Bound on a connection to the metrics page. A scrape is over long before; one that stands still gives its place up.
    pub scrape: Duration,
    pub people: Rate,
    /// Of a service, or of one process at the Unix socket.
    pub others: Rate,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 256,
            connections_per_address: 32,
            handshake: Duration::from_secs(5),
            // tonic lifts hyper's own bound where none is set.
            streams: 256,
            headers: 16 << 10,
            resets: 20,
            alive: Duration::from_secs(30),
            age: Duration::from_secs(1800),
            call: Duration::from_secs(600),
            large: 4,
            large_wait: Duration::from_secs(5),
            scrapes: 16,
            scrape: Duration::from_secs(60),
            people: Rate { calls_per_second: 200.0, burst: 400.0, under_way: 128 },
            // One connection's streams, and those of the one that takes its place.
            others: Rate { calls_per_second: 5000.0, burst: 10_000.0, under_way: 512 },
        }
    }
}
