//! A small file system for a site's home, that can be full.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use kiln_tests::Result;
use kiln_tests::command::run;

/// In memory. Much more than a site needs; only what is used takes memory.
const SIZE: &str = "6g";

/// Unmounted with this value.
pub(crate) struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    /// # Errors
    /// Where nothing can be mounted; most often for want of root.
    pub(crate) fn new() -> Result<Self> {
        let disk = Self { folder: tempfile::Builder::new().prefix("kiln-disk-").tempdir()? };
        let mount = ["-t", "tmpfs", "-o", &format!("size={SIZE},mode=0755"), "tmpfs"];
        run(Command::new("mount").args(mount).arg(disk.folder()))?;
        Ok(disk)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// No byte is left on it from now on.
    ///
    /// # Errors
    /// Where its size can't be changed.
    pub(crate) fn fill(&self) -> Result<()> {
        let stat = rustix::fs::statvfs(self.folder())?;
        let used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
        // Somebody writes meanwhile, and a size below what is used is refused.
        const ROOM: u64 = 16 << 20;
        self.resize(&(used + ROOM).to_string())?;
        let mut filler = std::fs::File::create(self.filler())?;
        let piece = [0; 4096];
        // Ends where the disk does.
        while filler.write_all(&piece).is_ok() {}
        Ok(())
    }

    /// # Errors
    /// Where its size can't be changed.
    pub(crate) fn free(&self) -> Result<()> {
        std::fs::remove_file(self.filler())?;
        self.resize(SIZE)
    }

    fn filler(&self) -> std::path::PathBuf {
        self.folder().join("filler")
    }

    fn resize(&self, size: &str) -> Result<()> {
        let options = format!("remount,size={size}");
        run(Command::new("mount").args(["-o", &options]).arg(self.folder())).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: what a failed test left open ends with its process.
        let _ = Command::new("umount").arg("--lazy").arg(self.folder()).status();
    }
}
