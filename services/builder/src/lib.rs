//! The builder: turns definitions into images and revisions.

pub mod bake;
pub mod context;
pub mod git;
pub mod logs;
pub mod sources;
pub mod store;
pub mod tree;
pub mod wire;
