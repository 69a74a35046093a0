//! The service crate from outside: a real server on a real socket.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests stop where they can't go on"
)]

mod large;
mod limits;
mod monitor;
mod patience;
mod refused;
mod remote;
mod renewal;
mod roles;
mod server;
mod site;
mod start;
mod strangers;
mod trace;
mod wire;
