//! Tracked connections, in the kernel's own table. `conntrack` would copy the whole table for each state that it is asked for:
//! a tenth of a second on a busy machine, in which users are sent to an instance that is gone. And it deletes by address
//! and port what it read before, when the user may have the port for a connection to another instance.

use std::io;
use std::net::Ipv4Addr;

use rustix::net::netlink::NETFILTER;

use crate::failure::{During as _, Failure};
use crate::netlink::{Ask, Netlink, attribute, nest, value};

/// Numbers of linux/netfilter/nfnetlink_conntrack.h.
mod number {
    /// IPCTNL_MSG_CT_GET and IPCTNL_MSG_CT_DELETE of NFNL_SUBSYS_CTNETLINK
    pub(super) const GET: u16 = 1 << 8 | 1;
    pub(super) const DELETE: u16 = 1 << 8 | 2;
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const IP_V4_SRC: u16 = 1;
    pub(super) const TUPLE_PROTO: u16 = 2;
    pub(super) const PROTO_NUM: u16 = 1;
    pub(super) const PROTO_DST_PORT: u16 = 3;
    pub(super) const STATUS: u16 = 3;
    pub(super) const PROTOINFO: u16 = 4;
    pub(super) const PROTOINFO_TCP: u16 = 1;
    pub(super) const PROTOINFO_TCP_STATE: u16 = 1;
    pub(super) const ID: u16 = 12;
    pub(super) const FILTER: u16 = 25;
    pub(super) const FILTER_ORIG_FLAGS: u16 = 1;
    pub(super) const FILTER_REPLY_FLAGS: u16 = 2;
    pub(super) const FILTER_IP_SRC: u32 = 1;
    pub(super) const FILTER_PROTO_NUM: u32 = 1 << 3;
    pub(super) const FILTER_PROTO_DST_PORT: u32 = 1 << 5;
    /// IPS_DST_NAT
    pub(super) const DST_NAT: u32 = 1 << 5;
}

/// nfgenmsg, of IPv4.
const IPV4: [u8; 4] = [2, 0, 0, 0];
const TCP: u8 = 6;

/// States of linux/netfilter/nf_conntrack_tcp.h.
const SYN_SENT: u8 = 1;
const SYN_RECV: u8 = 2;
const ESTABLISHED: u8 = 3;
const CLOSE: u8 = 8;

/// In which somebody still sends to the instance, or would: with CLOSE the connections that a dying instance reset, each of
/// which keeps its user's port bound to the instance for ten seconds, and a busy user has used all its ports once within
/// half a second. Properly ended connections stay: where the user opens one anew, the kernel does.
const WAITING: [u8; 4] = [CLOSE, SYN_SENT, SYN_RECV, ESTABLISHED];
/// In which nobody answered yet. The others go on where somebody flushed the table of an edge that serves.
const OPENING: [u8; 2] = [SYN_SENT, SYN_RECV];

/// Whose tracked connections.
#[derive(Debug, Clone, Copy)]
pub(super) enum Of {
    Instance(Ipv4Addr),
    /// What was sent on from there to somewhere.
    Listener(u16),
}

impl Of {
    /// What the kernel is asked for. One before 5.8 lists the whole table.
    fn filter(self) -> Vec<u8> {
        use number::*;
        let (tuple, flags) = match self {
            Self::Instance(address) => {
                let source = nest(TUPLE_IP, &[attribute(IP_V4_SRC, &address.octets())]);
                let flags = attribute(FILTER_REPLY_FLAGS, &FILTER_IP_SRC.to_ne_bytes());
                (nest(TUPLE_REPLY, &[source]), flags)
            }
            Self::Listener(port) => {
                let port = attribute(PROTO_DST_PORT, &port.to_be_bytes());
                let to = nest(TUPLE_PROTO, &[attribute(PROTO_NUM, &[TCP]), port]);
                let flags = FILTER_PROTO_NUM | FILTER_PROTO_DST_PORT;
                (nest(TUPLE_ORIG, &[to]), attribute(FILTER_ORIG_FLAGS, &flags.to_ne_bytes()))
            }
        };
        [IPV4.to_vec(), tuple, nest(FILTER, &[flags])].concat()
    }

    /// Whether a connection of the table, as attributes, waits in vain.
    fn has(self, connection: &[u8]) -> bool {
        use number::*;
        let state = value(connection, &[PROTOINFO, PROTOINFO_TCP, PROTOINFO_TCP_STATE]);
        let is_in = |states: &[u8]| state.and_then(<[u8]>::first).is_some_and(|state| states.contains(state));
        match self {
            Self::Instance(address) => {
                let source = value(connection, &[TUPLE_REPLY, TUPLE_IP, IP_V4_SRC]);
                is_in(&WAITING) && source == Some(&address.octets())
            }
            Self::Listener(port) => {
                let to = value(connection, &[TUPLE_ORIG, TUPLE_PROTO, PROTO_DST_PORT]);
                let status = value(connection, &[STATUS]).and_then(|bytes| bytes.try_into().ok());
                let is_sent_on = status.is_some_and(|status| u32::from_be_bytes(status) & DST_NAT != 0);
                is_in(&OPENING) && is_sent_on && to == Some(&port.to_be_bytes())
            }
        }
    }
}

/// Deletes the tracked connections that wait for somebody in vain; fine if there is none. Blocks, for milliseconds.
pub(super) fn forget(of: Of) -> Result<(), Failure> {
    let what = || format!("forgetting the tracked connections of {of:?}");
    let netlink = Netlink::open(NETFILTER).during(what)?;
    let mut found = Vec::new();
    let take = |body: &[u8]| {
        let connection = body.get(IPV4.len()..).unwrap_or_default();
        if of.has(connection) {
            found.extend(named(connection));
        }
    };
    netlink.ask(Ask::List, number::GET, &of.filter(), take).during(what)?;
    for connection in found {
        match netlink.ask(Ask::Do, number::DELETE, &connection, |_| {}) {
            // It ended by itself meanwhile, or is another one by now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            done => done.during(what)?,
        }
    }
    Ok(())
}

/// What one connection is deleted by: where it comes from and goes to, and its number, which no other has.
fn named(connection: &[u8]) -> Option<Vec<u8>> {
    let tuple = value(connection, &[number::TUPLE_ORIG])?;
    let id = value(connection, &[number::ID])?;
    Some([IPV4.to_vec(), nest(number::TUPLE_ORIG, &[tuple.to_vec()]), attribute(number::ID, id)].concat())
}
