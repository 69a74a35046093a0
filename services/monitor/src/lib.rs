//! The monitor: watches instances and what they are made from, and says when a server needs an update.

mod child;
pub mod definitions;
pub mod documents;
pub mod download;
pub mod engine;
pub mod events;
pub mod eyes;
pub mod grpc;
mod metrics;
pub mod packages;
pub mod peers;
pub mod ports;
pub mod remote;
pub mod replicas;
pub mod reports;
pub mod resync;
mod run;
pub mod servers;
pub mod signals;
pub mod watcher;

pub use run::{Monitor, Ports, run};
