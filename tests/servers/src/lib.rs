//! Servers of others that tests talk to, each made by the test itself: a Debian archive, a registry.

pub mod archive;
pub mod command;
mod port;
pub mod registry;
pub mod wait;

pub use port::free_port;

/// What went wrong, with where; tests show it and stop.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
pub type Result<T> = std::result::Result<T, Error>;
