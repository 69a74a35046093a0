//! Where definitions are looked at, so that a simulation can put its own repositories in the place.

use std::fmt::Debug;
use std::path::PathBuf;

use async_trait::async_trait;
use kiln_builder_core::source::SourceId;

use crate::git::{Address, Error, Mirror};
use crate::tree::Tree;

#[async_trait]
pub trait Repositories: Debug + Send + Sync + 'static {
    /// The newest commit of a source's branch, and everything below the folders in it that hold a `server.yaml`. Asked for
    /// one source once at a time.
    ///
    /// # Errors
    /// The repository is away, or what it holds can't be taken.
    async fn head(&self, source: &SourceId, address: Address) -> Result<(String, Tree), Error>;
}

/// Real ones, each with a mirror of its own in a folder.
#[derive(Debug)]
pub struct Mirrors {
    folder: PathBuf,
    credentials: Option<PathBuf>,
}

impl Mirrors {
    /// `credentials` as git-credential-store(1) has them, for repositories that ask who is there.
    pub fn new(folder: PathBuf, credentials: Option<PathBuf>) -> Self {
        Self { folder, credentials }
    }
}

#[async_trait]
impl Repositories for Mirrors {
    async fn head(&self, source: &SourceId, address: Address) -> Result<(String, Tree), Error> {
        let mirror = Mirror::new(self.folder.join(source.as_str()), address, self.credentials.clone());
        let commit = mirror.fetch().await?;
        let tree = mirror.read(&commit).await?;
        Ok((commit, tree))
    }
}
