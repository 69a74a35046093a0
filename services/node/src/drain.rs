//! Connections that an instance still has, asked of the kernel's own tables. /proc/net/tcp would do, were it not for the
//! thousands of ended connections that it lists: reading it takes long, and what moves meanwhile is missed.

use std::fs::File;

use rustix::net::netlink::SOCK_DIAG;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::failure::{During, Failure};
use crate::netlink::{Ask, Netlink};
use crate::network::namespace;

/// States in which a user waits for something: established, being opened, and closed with bytes that are still on their
/// way (FIN_WAIT1, CLOSE_WAIT, LAST_ACK, CLOSING). FIN_WAIT2 and TIME_WAIT have nothing left to send.
const OPEN: u32 = 1 << 1 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 9 | 1 << 11;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const TCP: u8 = 6;
const FAMILIES: [u8; 2] = [2, 10];

/// Looks into one network namespace.
#[derive(Debug)]
pub(crate) struct Connections {
    socket: Netlink,
}

impl Connections {
    /// A socket belongs for ever to the namespace that it was made in, so one thread goes there to make it. Blocks.
    pub(crate) fn of(name: &str) -> Result<Self, Failure> {
        let path = namespace::path(name);
        let make = || {
            let there = File::open(&path)?;
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&there), Some(LinkNameSpaceType::Network))?;
            Netlink::open(SOCK_DIAG)
        };
        let made = std::thread::scope(|scope| scope.spawn(make).join());
        let made = made.unwrap_or_else(|_| Err(std::io::Error::other("its thread died")));
        Ok(Self { socket: made.during(|| format!("looking into the network of {name}"))? })
    }

    /// How many connections to these ports are open. Blocks for a few milliseconds.
    pub(crate) fn open(&self, ports: &[u16]) -> Result<usize, Failure> {
        let mut open = 0;
        for family in FAMILIES {
            open +=
                self.count(family, ports).during(|| "asking the kernel for open connections".to_owned())?;
        }
        Ok(open)
    }

    fn count(&self, family: u8, ports: &[u16]) -> std::io::Result<usize> {
        let mut open = 0;
        self.socket.ask(Ask::List, SOCK_DIAG_BY_FAMILY, &request(family), |body| {
            open += usize::from(local_port(body).is_some_and(|port| ports.contains(&port)));
        })?;
        Ok(open)
    }
}

/// inet_diag_req_v2
fn request(family: u8) -> [u8; 56] {
    let mut bytes = [0; 56];
    bytes[0] = family;
    bytes[1] = TCP;
    bytes[4..8].copy_from_slice(&OPEN.to_ne_bytes());
    bytes
}

/// Of an inet_diag_msg: after family, state, timer and retransmissions, in network order.
fn local_port(body: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(body.get(4..6)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn only_what_users_wait_for_counts() {
        let here = Connections { socket: Netlink::open(SOCK_DIAG).unwrap() };
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let address = listener.local_addr().unwrap();
            let ports = [address.port()];
            assert_eq!(here.open(&ports).unwrap(), 0);
            // In the accept queue: the user already waits.
            let client = TcpStream::connect(address).unwrap();
            assert_eq!(here.open(&ports).unwrap(), 1);
            assert_eq!(here.open(&[ports[0].wrapping_add(1)]).unwrap(), 0);
            let (server, _) = listener.accept().unwrap();
            // The server ends first, so TIME_WAIT stays on its side.
            drop(server);
            drop(client);
            assert_eq!(here.open(&ports).unwrap(), 0);
        }
    }
}
