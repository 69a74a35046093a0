//! The builder: turns definitions into images and revisions.

pub mod bake;
pub mod bakery;
pub mod builder;
pub mod context;
pub mod git;
pub mod image_tests;
pub mod logs;
pub mod reconcile;
pub mod sources;
pub mod store;
pub mod tree;
pub mod wire;
pub mod workers;
