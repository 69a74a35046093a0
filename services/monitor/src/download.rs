//! An archive's release file, by the means that apt itself fetches it: the same transports, proxies and credentials.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use kiln_model::release_file::ReleaseFile;
use kiln_service::config::apt_credentials;
use tokio::process::Command;

use crate::child;
use crate::ports::{Archive, Problem};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Debian's are 200 KB. The kernel stops a download that goes past it.
const MAX_SIZE: u64 = 16 * 1024 * 1024;

/// The `apt-helper` of this machine.
#[derive(Debug)]
pub struct AptHelper {
    folder: PathBuf,
    credentials: Option<PathBuf>,
}

impl AptHelper {
    /// Downloads into folders of their own under `folder`. `credentials` as apt_auth.conf(5) has them.
    pub fn new(folder: &Path, credentials: Option<&Path>) -> Self {
        Self { folder: folder.to_owned(), credentials: credentials.map(Path::to_owned) }
    }
}

#[async_trait]
impl Archive for AptHelper {
    async fn release_file(&self, url: &str) -> Result<ReleaseFile, Problem> {
        let known = ["http://", "https://", "file:/"].iter().any(|scheme| url.starts_with(scheme));
        if !known || url.len() > 2048 || url.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(Problem("the release file is at no http, https or file address".to_owned()));
        }
        let failed = |error: std::io::Error| {
            Problem(format!("no room for a release file in {}: {error}", self.folder.display()))
        };
        let folder = tempfile::tempdir_in(&self.folder).map_err(failed)?;
        let target = folder.path().join("release");
        let mut command = Command::new("prlimit");
        command
            .arg(format!("--fsize={MAX_SIZE}"))
            .arg("/usr/lib/apt/apt-helper")
            // The folder is closed to other users, and apt's own one with it.
            .args(["-o", "APT::Sandbox::User=root"])
            .args(["-o", "Acquire::Retries=0"])
            .args(["-o", "Acquire::http::Timeout=20"])
            .args(["-o", "Acquire::https::Timeout=20"])
            .args(["-o", "Acquire::AllowRedirect=true"])
            .args(apt_credentials(self.credentials.as_deref()).iter().flat_map(|option| ["-o", option]))
            .args(["download-file", url])
            .arg(&target)
            .env("LC_ALL", "C.UTF-8");
        let output = child::run(command, TIMEOUT, 16 * 1024).await.map_err(Problem)?;
        if !output.status.success() {
            return Err(Problem(format!(
                "apt-helper can't fetch it ({}): {}",
                output.status, output.complaint
            )));
        }
        let content = tokio::fs::read(&target).await.map_err(failed)?;
        Ok(ReleaseFile::of(&content))
    }
}
