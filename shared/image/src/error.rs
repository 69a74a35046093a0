use std::io;
use std::path::{Path, PathBuf};

use kiln_model::digest::Digest;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },

    #[error("blob {0} is not in the image store")]
    NoBlob(Digest),

    #[error("image {0} is not in the image store")]
    NoImage(Digest),

    /// The content under a digest's name has another digest.
    #[error(
        "blob {wanted} holds something else, with digest {found}: remove it and bake or copy the image again"
    )]
    Corrupt { wanted: Digest, found: Digest },

    /// A manifest, configuration, index or envelope that is not what it has to be.
    #[error("{what}: {why}")]
    Malformed { what: String, why: String },

    /// A layer's tar that can't be extracted as it is.
    #[error("layer {layer}: entry `{entry}`: {why}")]
    Layer { layer: Digest, entry: String, why: String },

    #[error("image {0} has no signature")]
    Unsigned(Digest),

    #[error("image {image} has no signature by a trusted key: {why}")]
    Untrusted { image: Digest, why: String },

    #[error("key {}: {why}", path.display())]
    Key { path: PathBuf, why: String },
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn malformed(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Malformed { what: what.into(), why: why.into() }
    }
}
