//! What the scenario tests stand on: a real site made by `kiln up`, Git repositories, a small Debian archive of their
//! own, load from this machine, and waits with a bound.

pub mod cluster;
pub mod command;
pub mod docker;
pub mod elsewhere;
pub mod kept;
pub mod load;
pub mod machine;
pub mod netns;
pub mod otlp;
pub mod process;
pub mod random;
pub mod replicas;
pub mod repo;
pub mod server;
pub mod signing;
pub mod site;
pub mod stores;
pub mod tree;
pub mod unit;

pub use kiln_test_servers::{Error, Result, archive, free_port, registry, wait};
