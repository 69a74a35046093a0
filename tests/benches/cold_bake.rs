//! A bake with no layer there yet, the packages' files at hand: `kiln build` against mmdebstrap with a warm cache. Both
//! refresh the archive's lists, resolve, unpack and configure minbase and nginx-light.

use std::process::Command;
use std::time::{Duration, Instant};

use kiln_api::builder::{BuildState, ListBuildsRequest};
use kiln_tests::Result;
use kiln_tests::command::run as run_command;
use kiln_tests::repo::Repo;
use kiln_tests::site::Site;
use kiln_tests::wait::until;

use crate::Pairs;

const ROUNDS: u64 = 5;
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
    let definition = folder.path().join("definition");
    std::fs::create_dir(&definition)?;
    std::fs::write(definition.join("server.yaml"), DEFINITION)?;
    let repo = Repo::with(&folder.path().join("servers"), "cold", &definition)?;

    let mut pairs = Pairs::new("mmdebstrap");
    // The first round fills both caches and is not counted.
    for round in 0..=ROUNDS {
        let layers = folder.path().join(format!("layers{round}"));
        let site = Site::up_with("bench-cold", &[&format!("builder.layers={}", layers.display())])?;
        let began = Instant::now();
        site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
        built(&site).await?;
        let kiln = began.elapsed();
        site.down()?;
        std::fs::remove_dir_all(&layers)?;

        let archives = cache.display();
        let output = folder.path().join("root.tar");
        let began = Instant::now();
        run_command(
            Command::new("mmdebstrap")
                .args([
                    "--variant=minbase",
                    "--include=nginx-light",
                    "--skip=download/empty",
                    "--skip=essential/unlink",
                ])
                .arg("--setup-hook=mkdir -p \"$1\"/var/cache/apt/archives/")
                .arg(format!("--setup-hook=sync-in {archives} /var/cache/apt/archives/"))
                .arg(format!("--customize-hook=sync-out /var/cache/apt/archives {archives}"))
                .arg(SUITE)
                .arg(&output),
        )?;
        let theirs = began.elapsed();
        std::fs::remove_file(&output)?;
        if round > 0 {
            pairs.add(kiln, theirs);
        }
    }
    Ok(pairs)
}

async fn built(site: &Site) -> Result<()> {
    until("the build", Duration::from_secs(300), async || {
        let builds = site.builder().list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
        match builds.first() {
            Some(build) if build.state() == BuildState::Succeeded => Ok(()),
            other => Err(format!("{other:?}").into()),
        }
    })
    .await
}
