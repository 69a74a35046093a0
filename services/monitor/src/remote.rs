//! Asking a Git remote where a branch stands: `git ls-remote`, with nothing that its address or answer could abuse.

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use kiln_monitor_core::remote::{branch_ref, check_url, head};
use kiln_service::config::git_credentials;
use tokio::process::Command;

use crate::child;
use crate::ports::{Git, Problem};

const TIMEOUT: Duration = Duration::from_secs(30);

/// One ref is a line of less than 400 bytes; names that end in the same path may come with it.
const MAX_OUTPUT: usize = 64 * 1024;

/// The `git` of this machine.
#[derive(Debug)]
pub struct LocalGit {
    /// Its whole configuration: neither the system's nor a user's counts.
    config: PathBuf,
}

impl LocalGit {
    /// Keeps git's configuration in `folder`. `credentials` as git-credential-store(1) has them.
    ///
    /// # Errors
    /// Where it can't be written.
    pub fn new(folder: &Path, credentials: Option<&Path>) -> std::io::Result<Self> {
        let config = folder.join("gitconfig");
        // A repository on this machine may belong to another user than the one this service runs as. Only its
        // upload-pack runs, which takes neither hooks nor configuration from it that name programs.
        let safe = "[safe]\n\tdirectory = *\n[protocol \"ext\"]\n\tallow = never\n";
        std::fs::write(&config, format!("{safe}{}", git_credentials(credentials)))?;
        Ok(Self { config })
    }

    fn command(&self, url: &str, reference: &str) -> Command {
        let mut command = Command::new("git");
        command
            .args(["ls-remote", "--heads", "--", url, reference])
            .current_dir("/")
            .env_clear()
            .env("GIT_CONFIG_GLOBAL", &self.config)
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_ALLOW_PROTOCOL", "https:http:ssh:git:file")
            // Nobody is there to be asked.
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_ASKPASS", "true")
            .env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=10")
            .env("GIT_HTTP_LOW_SPEED_LIMIT", "1")
            .env("GIT_HTTP_LOW_SPEED_TIME", "20")
            .env("LC_ALL", "C.UTF-8");
        // The way to the outside, and where keys lie, is the machine's matter.
        const KEPT: [&str; 10] = [
            "PATH",
            "HOME",
            "SSH_AUTH_SOCK",
            "http_proxy",
            "https_proxy",
            "no_proxy",
            "HTTPS_PROXY",
            "NO_PROXY",
            "ALL_PROXY",
            "SSL_CERT_FILE",
        ];
        command.envs(KEPT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command
    }
}

#[async_trait]
impl Git for LocalGit {
    async fn head(&self, url: &str, branch: &str) -> Result<String, Problem> {
        let refused = |why| Problem(format!("the repository is not asked: {why}"));
        check_url(url).map_err(refused)?;
        let reference = branch_ref(branch).map_err(refused)?;
        let output = child::run(self.command(url, &reference), TIMEOUT, MAX_OUTPUT).await.map_err(Problem)?;
        if !output.status.success() {
            return Err(Problem(format!("git ls-remote failed ({}): {}", output.status, output.complaint)));
        }
        head(&String::from_utf8_lossy(&output.stdout), &reference)
            .ok_or_else(|| Problem(format!("the repository has no branch `{branch}`")))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::process::Command as StdCommand;

    use super::*;

    fn git(folder: &Path, arguments: &[&str]) -> String {
        let output = StdCommand::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"])
            .args(arguments)
            .current_dir(folder)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    fn repository() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        git(folder.path(), &["init", "-q", "-b", "main"]);
        git(folder.path(), &["commit", "-q", "--allow-empty", "-m", "one"]);
        folder
    }

    #[tokio::test]
    async fn the_head_moves_with_a_commit() {
        let home = tempfile::tempdir().unwrap();
        let remote = LocalGit::new(home.path(), None).unwrap();
        let repository = repository();
        let path = repository.path().to_str().unwrap();
        for url in [path.to_owned(), format!("file://{path}")] {
            assert_eq!(remote.head(&url, "main").await, Ok(git(repository.path(), &["rev-parse", "HEAD"])));
        }
        git(repository.path(), &["commit", "-q", "--allow-empty", "-m", "two"]);
        // A branch whose name ends in the other's.
        git(repository.path(), &["branch", "x/refs/heads/main", "HEAD~1"]);
        assert_eq!(remote.head(path, "main").await, Ok(git(repository.path(), &["rev-parse", "HEAD"])));
    }

    #[tokio::test]
    async fn a_repository_of_another_user_is_read() {
        let home = tempfile::tempdir().unwrap();
        let remote = LocalGit::new(home.path(), None).unwrap();
        let repository = repository();
        let head = git(repository.path(), &["rev-parse", "HEAD"]);
        let chowned = StdCommand::new("chown").args(["-R", "65534:65534"]).arg(repository.path()).status();
        assert!(chowned.unwrap().success());
        assert_eq!(remote.head(repository.path().to_str().unwrap(), "main").await, Ok(head));
    }

    #[tokio::test]
    async fn what_can_not_be_read_says_why() {
        let home = tempfile::tempdir().unwrap();
        let remote = LocalGit::new(home.path(), None).unwrap();
        let repository = repository();
        let path = repository.path().to_str().unwrap();
        for (url, branch, said) in [
            (path, "gone", "no branch `gone`"),
            (path, "ma*", "not the name of a branch"),
            ("/nonexistent/repository", "main", "git ls-remote failed"),
            ("--upload-pack=/bin/true", "main", "taken for an option"),
        ] {
            let problem = remote.head(url, branch).await.unwrap_err();
            assert!(problem.0.contains(said), "{url} {branch}: {problem}");
        }
    }

    #[tokio::test]
    async fn no_address_runs_a_program() {
        let home = tempfile::tempdir().unwrap();
        let remote = LocalGit::new(home.path(), None).unwrap();
        let trace = home.path().join("ran");
        let url = format!("ext::sh -c touch% {}", trace.display());
        assert!(remote.head(&url, "main").await.is_err());
        // Nor would git itself run it, should the address come past the check.
        let output = child::run(remote.command(&url, "refs/heads/main"), TIMEOUT, MAX_OUTPUT).await.unwrap();
        assert!(!output.status.success());
        assert!(!trace.exists());
    }
}
