//! A bake with no layer there yet: `kiln apply` against mmdebstrap, with the packages' files at hand for both, or for
//! neither. Both refresh the archive's lists, resolve, unpack and configure minbase and nginx-light, with their trees in
//! memory.

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

/// Where the packages' files are when a bake begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Files {
    AtHand,
    Elsewhere,
}

pub(crate) async fn run(files: Files) -> Result<Pairs> {
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
    // The first round is not counted; where the files are to be at hand it fills both caches.
    for number in 0..=ROUNDS {
        if number > 0 {
            match files {
                // What Kiln keeps of the packages beside their files is put away: each side begins with `.deb` files alone.
                Files::AtHand => {
                    std::fs::rename(packages.join("opened"), done.join(format!("opened-{number}")))?;
                }
                Files::Elsewhere => std::fs::rename(&packages, done.join(format!("packages-{number}")))?,
            }
        }
        let kiln = bake(&repo, &packages, &archives, &done.join(format!("{number}"))).await?;
        let theirs = mmdebstrap(files, number == 0, &memory.path, &cache, &archives)?;
        if number > 0 {
            pairs.add(kiln, theirs);
        }
        if files == Files::AtHand {
            // With what the bake just now has kept, as the next one would find it.
            let again = bake(&repo, &packages, &archives, &done.join(format!("{number}-again"))).await?;
            if number > 0 {
                eprintln!("kiln with opened packages {:.3} s", again.as_secs_f64());
                opened.push(again);
            }
        }
    }
    if files == Files::AtHand {
        pairs.note("kiln_opened_s", round(median(&opened)));
    }
    Ok(pairs)
}

/// Takes the packages from the archives that Kiln took them from.
fn mmdebstrap(
    files: Files,
    fills_the_cache: bool,
    memory: &Path,
    cache: &Path,
    archives: &Path,
) -> Result<Duration> {
    let output = memory.join("root.tar");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.env("TMPDIR", memory).args(["--variant=minbase", "--include=nginx-light"]);
    if files == Files::AtHand {
        mmdebstrap
            .args(["--skip=download/empty", "--skip=essential/unlink"])
            .arg("--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives/")
            .arg(format!("--setup-hook=sync-in {} /var/cache/apt/archives/", cache.display()));
        if fills_the_cache {
            mmdebstrap.arg(format!("--customize-hook=sync-out /var/cache/apt/archives {}", cache.display()));
        }
    }
    mmdebstrap.arg(SUITE).arg(&output).arg(archives);
    let began = Instant::now();
    run_command(&mut mmdebstrap)?;
    let took = began.elapsed();
    std::fs::remove_file(&output)?;
    Ok(took)
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
    site.built("cold", None, BOUND).await?;
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
