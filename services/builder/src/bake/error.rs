//! Why a bake did not come to an image, in words for the one who has to mend it.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum BakeError {
    /// The definition asks for what can't be had: an unknown package, a file that is not there.
    #[error("{what}: {why}; {remedy}")]
    Definition { what: String, why: String, remedy: String },

    /// An archive is not reachable, or its signature is not good.
    #[error("archive {archive}: {why}; {remedy}")]
    Archive { archive: String, why: String, remedy: String },

    /// Something that is elsewhere can't be brought here.
    #[error("fetching {what}: {why}; {remedy}")]
    Fetch { what: String, why: String, remedy: String },

    /// What runs inside the sandbox failed.
    #[error("step {step}: {why}; its last lines: {}", last_lines.join(" | "))]
    Step { step: String, why: String, last_lines: Vec<String> },

    /// A `.deb` is not a well-formed package.
    #[error("package {package}: {why}")]
    Package { package: String, why: String },

    #[error("the build was cancelled")]
    Cancelled,

    #[error("image store: {0}")]
    Image(#[from] kiln_image::Error),

    #[error(transparent)]
    Registry(#[from] kiln_registry::Error),

    #[error("{doing} {}: {source}", path.display())]
    Io { doing: &'static str, path: PathBuf, source: io::Error },

    /// The machine lacks something that a bake needs.
    #[error("{what}: {why}; {remedy}")]
    Machine { what: String, why: String, remedy: String },
}

impl BakeError {
    /// Trying again, with nothing changed, may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Archive { .. }
                | Self::Fetch { .. }
                | Self::Io { .. }
                | Self::Machine { .. }
                | Self::Image(_)
                | Self::Registry(_)
        )
    }

    pub(crate) fn io(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::Io { doing, path, source }
    }
}
