//! A bake with no layer there yet, the packages' files at hand: `kiln apply` against mmdebstrap with a warm cache. Both
//! refresh the archive's lists, resolve, unpack and configure minbase and nginx-light, with their trees in memory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::repo::Repo;
use kiln_tests::site::Site;

use crate::{Pairs, median, round};

const ROUNDS: u64 = 5;
const BOUND: Duration = Duration::from_secs(300);
const SUITE: &str = "bookworm";

const DEFINITION: &str = "\
apiVersion: kiln/v1
name: cold
image:
  from: { debian: bookworm }
  steps:
    - packages: [nginx-light]
  command: [nginx]
run:
  replicas: 1
";

pub(crate) async fn run() -> Result<Pairs> {
    let folder = tempfile::tempdir()?;
    let cache = folder.path().join("archives");
    std::fs::create_dir(&cache)?;
    let packages = folder.path().join("packages");
    let memory = Memory::mount(folder.path().join("memory"))?;
    let definition = folder.path().join("definition");
    std::fs::create_dir(&definition)?;
    std::fs::write(definition.join("server.yaml"), DEFINITION)?;
    let repo = Repo::with(&folder.path().join("servers"), "cold", &definition)?;
    let archives = folder.path().join("archives.sources");
    // What a round leaves is deleted after the last one: ext4 gives no inode away that was freed minutes ago, and looks
    // through all of them for each new file, which made the rounds after a deletion two to five seconds longer.
    let done = folder.path().join("done");
    std::fs::create_dir(&done)?;

    let mut pairs = Pairs::new("mmdebstrap");
    let mut opened = Vec::new();
    // The first round fills both caches and is not counted.
    for number in 0..=ROUNDS {
        // What Kiln keeps of the packages beside their files is put away: each side begins with `.deb` files alone.
        let opened_files = packages.join("opened");
        if number > 0 {
            std::fs::rename(&opened_files, done.join(format!("opened-{number}")))?;
        }
        let kiln = bake(&repo, &packages, &archives, &done.join(format!("{number}"))).await?;
        // With what the bake just now has kept, as the next one would find it.
        let again = bake(&repo, &packages, &archives, &done.join(format!("{number}-again"))).await?;

        let output = memory.path.join("root.tar");
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap
            .env("TMPDIR", &memory.path)
            .args(["--variant=minbase", "--include=nginx-light"])
            .args(["--skip=download/empty", "--skip=essential/unlink"])
            .arg("--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives/")
            .arg(format!("--setup-hook=sync-in {} /var/cache/apt/archives/", cache.display()));
        if number == 0 {
            let hook = format!("--customize-hook=sync-out /var/cache/apt/archives {}", cache.display());
            mmdebstrap.arg(hook);
        }
        // The archives that Kiln took the packages from.
        mmdebstrap.arg(SUITE).arg(&output).arg(&archives);
        let began = Instant::now();
        run_command(&mut mmdebstrap)?;
        let theirs = began.elapsed();
        std::fs::remove_file(&output)?;
        if number > 0 {
            pairs.add(kiln, theirs);
            eprintln!("kiln with opened packages {:.3} s", again.as_secs_f64());
            opened.push(again);
        }
    }
    pairs.note("kiln_opened_s", round(median(&opened)));
    Ok(pairs)
}

/// From nothing but a store of packages to an image; leaves the archives that were asked at `archives`, and everything
/// else below `done`.
async fn bake(repo: &Repo, packages: &Path, archives: &Path, done: &Path) -> Result<Duration> {
    std::fs::create_dir(done)?;
    let layers = done.join("layers");
    let settings =
        [format!("builder.layers={}", layers.display()), format!("builder.packages={}", packages.display())];
    let site = Site::up_with("bench-cold", &settings.each_ref().map(String::as_str))?;
    let began = Instant::now();
    site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
    site.built("cold", BOUND).await?;
    let took = began.elapsed();
    let found = run_command(Command::new("find").arg(site.home()).args(["-name", "sources.sources"]))?;
    std::fs::copy(found.lines().next().ok_or("the archives that were asked")?, archives)?;
    site.down_to(&done.join("site"))?;
    Ok(took)
}

/// A file system in memory: where Kiln bakes is one too.
struct Memory {
    path: PathBuf,
}

impl Memory {
    fn mount(path: PathBuf) -> Result<Self> {
        std::fs::create_dir(&path)?;
        run_command(Command::new("mount").args(["-t", "tmpfs", "-o", "mode=1777", "kiln-bench"]).arg(&path))?;
        Ok(Self { path })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.path).status();
    }
}
