//! The `host` engine: runs instances on this machine with runc under conmon, connects them through CNI, and serves their
//! users by nftables. It is told what to do and decides nothing but one thing: what has ended leaves the edge.

mod book;
mod boot;
mod bundle;
mod cgroup;
mod checks;
pub mod doctor;
mod drain;
mod edge;
mod exits;
mod failure;
mod grpc;
mod helper;
mod launch;
mod logs;
mod metrics;
mod names;
mod netlink;
mod network;
mod node;
mod patience;
mod process;
mod purge;
mod record;
mod retire;
mod rootfs;
mod routes;
mod run;
mod runtime;
mod verify;

pub use failure::Failure;
pub use grpc::Engine;
pub use names::Names;
pub use node::Node;
pub use purge::{leftovers, purge};
pub use run::run;
