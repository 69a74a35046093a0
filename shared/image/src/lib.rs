//! The image store that builder and node share: an OCI image layout with uncompressed layers, signatures as referrers,
//! and each layer's tree extracted once, ready to be a lower of an overlay.
//!
//! Everything that is read from it is checked like hostile input: another process, or a copy from elsewhere, wrote it.

mod contents;
mod cosign;
mod dsse;
mod error;
mod export;
mod extract;
mod foreign;
mod index;
mod lock;
mod manifest;
mod pack;
mod referrers;
mod relay;
mod signature;
mod signer;
mod stack;
mod store;
pub mod tar;
mod trees;

pub use contents::{Contents, Difference, Node, NodeKind};
pub use cosign::COSIGN_SIGNATURE;
pub use error::Error;
pub use extract::{Hidden, Limits, unpack_layer, unpack_root};
pub use foreign::{
    Blob, FOREIGN_LIMIT, Foreign, ForeignConfig, ForeignManifest, parse_foreign, parse_foreign_config,
    parse_layout,
};
pub use manifest::{Image, Layer, NewImage};
pub use pack::{Packed, Packer, Whiteouts};
pub use referrers::{ARTIFACT_LIMIT, Part, Referrer};
pub use signature::{KeyId, SIGNATURE, Thoroughness, read_signing_key, read_trusted_key};
pub use signer::Signer;
pub use stack::Stack;
pub use store::{BlobWriter, ImageStore};
