//! The monitor's loops on a store and a bus in memory, among peers that are made up: what it says of instances,
//! repositories and archives, and that it says so whatever was lost.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, unreachable_pub)]

mod api;
mod archives;
mod health;
mod repositories;
mod server;
mod world;
