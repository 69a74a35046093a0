//! What every service's main needs: configuration, telemetry, the gRPC server and client, shutdown, and the loops that
//! all of them run (relay, resync, events).

pub mod access;
pub mod aside;
pub mod audit;
pub mod certificate;
pub mod changes;
pub mod client;
pub mod clock;
pub mod config;
pub mod emulation;
pub mod error;
pub mod follow;
pub mod guard;
pub mod list;
pub mod machine;
pub mod members;
pub mod metrics;
mod observe;
pub mod pki;
pub mod relay;
pub mod reloaded;
pub mod requests;
pub mod resync;
pub mod run;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod trace;
