//! The deployer's decisions, played out against a world that launches, fails, forgets and falls silent.

#![allow(clippy::unwrap_used)]

mod props;
mod stories;
mod world;
