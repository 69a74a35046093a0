//! Ports for servers of tests that run beside each other.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Result;

/// A port of this machine that nobody has now, and that the kernel gives to no outgoing connection meanwhile.
///
/// # Errors
/// Where there is none.
pub fn free_port() -> Result<u16> {
    // Tests that run beside each other begin at places of their own, and so do one's own calls.
    static CALLS: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(97).wrapping_add(CALLS.fetch_add(1, Ordering::Relaxed) * 13);
    let ports = (0..PORTS).filter_map(|step| u16::try_from(12_000 + (start.wrapping_add(step)) % PORTS).ok());
    let free = |port: &u16| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_ok();
    ports.into_iter().find(free).ok_or_else(|| format!("none of {PORTS} ports is free").into())
}

/// Below those that `kiln up` chooses from, and those of outgoing connections.
const PORTS: u32 = 8_000;
