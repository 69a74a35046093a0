//! A Git repository with definitions, as a user has one.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::command::run;

pub struct Repo {
    folder: PathBuf,
}

impl Repo {
    /// Makes a repository with the branch `main`, holding a copy of `definition` as the folder `name`.
    ///
    /// # Errors
    /// Where git or the copy fails.
    pub fn with(folder: &Path, name: &str, definition: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let repo = Self { folder: folder.to_path_buf() };
        run(repo.git().args(["init", "--quiet", "--initial-branch=main"]))?;
        run(Command::new("cp").arg("-rT").arg(definition).arg(folder.join(name)))?;
        repo.commit("Describe the server")?;
        Ok(repo)
    }

    fn git(&self) -> Command {
        let mut git = Command::new("git");
        git.arg("-C").arg(&self.folder).args(["-c", "user.name=Tester", "-c", "user.email=tester@localhost"]);
        git
    }

    pub fn path(&self) -> &Path {
        &self.folder
    }

    pub fn url(&self) -> String {
        self.folder.display().to_string()
    }

    /// # Errors
    /// Where the file can't be written.
    pub fn write(&self, path: &str, content: &str) -> Result<()> {
        let path = self.folder.join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        Ok(std::fs::write(path, content)?)
    }

    /// Replaces a text that must occur in a file.
    ///
    /// # Errors
    /// Where the file can't be read or written, or does not hold `from`.
    pub fn replace(&self, path: &str, from: &str, to: &str) -> Result<()> {
        let old = std::fs::read_to_string(self.folder.join(path))?;
        if !old.contains(from) {
            return Err(format!("{path} does not hold {from:?}:\n{old}").into());
        }
        self.write(path, &old.replace(from, to))
    }

    /// Commits everything as it is, and gives the commit's id.
    ///
    /// # Errors
    /// Where git fails, also where there is nothing to commit.
    pub fn commit(&self, message: &str) -> Result<String> {
        run(self.git().args(["add", "--all"]))?;
        run(self.git().args(["commit", "--quiet", "--message", message]))?;
        Ok(run(self.git().args(["rev-parse", "HEAD"]))?.trim().to_owned())
    }
}
