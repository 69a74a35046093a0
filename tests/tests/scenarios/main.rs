//! What Kiln promises, shown on the real thing: the real binaries, a real nats-server, runc, CNI and nftables, and Debian
//! packages from the archive. One driver, so that it is linked once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod audit;
mod backup;
mod cli;
mod cluster;
mod contained;
mod containers;
mod definitions;
mod deploy;
mod doctor;
mod down;
mod events;
mod images;
mod immutable;
mod killed;
mod mmdebstrap;
mod nodes;
mod packages;
mod ports;
mod protocol;
mod remote;
mod replicas;
mod rollback;
mod rollout;
mod secrets;
mod signing;
mod units;
mod upgrade;
