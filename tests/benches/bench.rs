//! Servers whose image is made again and again.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::repo::Repo;
use kiln_tests::site::Site;

const BOUND: Duration = Duration::from_secs(300);

/// A site with an image of the server `web`, and a folder for what its peer needs.
pub(crate) struct Bench {
    pub(crate) site: Site,
    pub(crate) repo: Repo,
    pub(crate) folder: tempfile::TempDir,
    /// The newest build of `web`. The server itself has its image a moment later.
    pub(crate) newest: String,
}

impl Bench {
    pub(crate) async fn start(name: &str, definition: &str, files: &[(&str, &str)]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let place = folder.path().join("definition");
        for (path, content) in [("server.yaml", definition)].iter().chain(files) {
            let path = place.join(path);
            std::fs::create_dir_all(path.parent().ok_or("a file lies in a folder")?)?;
            std::fs::write(path, content)?;
        }
        let repo = Repo::with(&folder.path().join("servers"), "web", &place)?;
        let site = Site::up(name)?;
        site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
        let newest = site.built("web", None, BOUND).await?;
        Ok(Self { site, repo, folder, newest })
    }

    /// From a commit that is there to the image of it.
    pub(crate) async fn bake(&mut self) -> Result<Duration> {
        let began = Instant::now();
        self.site.kiln(&["apply", &self.repo.url(), "--branch", "main"])?;
        self.newest = self.site.built("web", Some(&self.newest), BOUND).await?;
        Ok(began.elapsed())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A build of a second server: the same minbase, which Kiln has by then, with these steps.
    pub(crate) async fn bake_base(&self, steps: &str) -> Result<String> {
        let definition = self.path("base");
        std::fs::create_dir(&definition)?;
        let text = format!(
            "apiVersion: kiln/v1\nname: base\nimage:\n  from: {{ debian: bookworm }}\n  steps: [{steps}]\n  \
             command: [sh]\nrun:\n  replicas: 1\n"
        );
        std::fs::write(definition.join("server.yaml"), text)?;
        let repo = Repo::with(&self.path("bases"), "base", &definition)?;
        self.site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
        self.site.built("base", None, BOUND).await
    }

    /// Puts into a folder what a peer's apt has to have to ask the archives that Kiln asks, and gives the lines of a
    /// Containerfile that take it from there.
    pub(crate) fn put_archives(&self, context: &Path) -> Result<&'static str> {
        let found =
            run_command(Command::new("find").arg(self.site.home()).args(["-name", "sources.sources"]))?;
        let sources = found.lines().next().ok_or("the archives that were asked")?;
        std::fs::copy(sources, context.join("archives.sources"))?;
        // How this machine reaches them.
        let dump = run_command(Command::new("apt-config").arg("dump"))?;
        let ways: Vec<_> = dump.lines().filter(|line| line.starts_with("Acquire::http")).collect();
        std::fs::write(context.join("ways"), ways.join("\n"))?;
        Ok("COPY archives.sources /etc/apt/sources.list.d/\nCOPY ways /etc/apt/apt.conf.d/\n\
            RUN rm -f /etc/apt/sources.list\n")
    }
}
