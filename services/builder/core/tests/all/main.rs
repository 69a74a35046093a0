//! The decisions on a small world of servers, definitions and builds: stories that read as such, and properties.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod collecting;
mod properties;
mod stories;
mod world;
