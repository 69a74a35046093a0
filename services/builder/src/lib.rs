//! The builder: turns definitions into images and revisions.

pub mod bake;
