//! The real loops of builder, deployer and monitor on one thread, with a clock that runs ahead, and everything around
//! them made of chance: what a seed does, it does again.
//!
//! `KILN_SEED=17 cargo nextest run -p kiln-simulation a_seed_of_ones_own` tells the story of one seed, and with
//! `KILN_ALOUD=1` while it goes on.
#![cfg(test)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "all of it is tests")]

mod acknowledged;
mod bakery;
mod bus;
mod calls;
mod heard;
mod invariants;
mod life;
mod nature;
mod node;
mod outside;
mod purpose;
mod settled;
mod site;
mod store;
mod story;
mod takeover;
mod tests;
mod world;
