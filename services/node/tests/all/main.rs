//! The real node on the real machine: runc, conmon, CNI and nftables, each test with a site of its own. They need root.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that can't go on has failed")]

mod crash;
mod edge;
mod inside;
mod life;
mod site;
