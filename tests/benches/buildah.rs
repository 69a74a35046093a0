//! buildah as a peer, with a storage of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::site::tagged;

/// What an image that was taken is called.
pub(crate) const BASE: &str = "localhost/base";
/// What an image that was built is called.
pub(crate) const MADE: &str = "localhost/made";

pub(crate) struct Buildah {
    settings: PathBuf,
}

impl Buildah {
    /// In a folder that is not there yet.
    pub(crate) fn new(storage: &Path) -> Result<Self> {
        std::fs::create_dir(storage)?;
        let settings = storage.join("storage.conf");
        let (root, run) = (storage.join("root"), storage.join("run"));
        let text = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
            root.display(),
            run.display()
        );
        std::fs::write(&settings, text)?;
        Ok(Self { settings })
    }

    /// Of a program that uses the storage: buildah, or what calls it.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("CONTAINERS_STORAGE_CONF", &self.settings).env("BUILDAH_ISOLATION", "chroot");
        command
    }

    /// Takes the image of an OCI layout as [`BASE`].
    pub(crate) fn take(&self, layout: &Path) -> Result<()> {
        let (from, to) = (format!("oci:{}", tagged(layout)?), format!("containers-storage:{BASE}"));
        run_command(self.command("skopeo").args(["--insecure-policy", "copy", "--quiet", &from, &to]))?;
        Ok(())
    }

    /// Builds the Containerfile of a folder, with layers.
    pub(crate) fn build(&self, context: &Path) -> Result<()> {
        let mut build = self.command("buildah");
        build.args(["build", "--layers", "--quiet", "--pull-never", "--tag", MADE]).arg(context);
        run_command(&mut build)?;
        Ok(())
    }
}
