//! Eight servers on one base, of which no layer is there yet: all at once against one after another.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use kiln_api::builder::ListBuildsRequest;
use kiln_tests::Result;
use kiln_tests::repo::Repo;
use kiln_tests::site::Site;
use prost_types::Timestamp;

use crate::{Pairs, median, round};

const ROUNDS: usize = 5;
const BUILDS: usize = 8;
const BOUND: Duration = Duration::from_secs(600);

pub(crate) async fn run() -> Result<Pairs> {
    let folder = tempfile::tempdir()?;
    let definitions = folder.path().join("definitions");
    for number in 1..=BUILDS {
        let place = definitions.join(format!("s{number}"));
        std::fs::create_dir_all(&place)?;
        std::fs::write(place.join("server.yaml"), definition(number)?)?;
    }
    let repo = Repo::with(&folder.path().join("servers"), "all", &definitions)?;
    let packages = folder.path().join("packages");
    // As with a cold bake: what a round leaves is deleted after the last one.
    let done = folder.path().join("done");
    std::fs::create_dir(&done)?;

    let mut pairs = Pairs::new("one after another");
    let mut spread = Vec::new();
    // The first round fills the store of packages.
    for number in 0..=ROUNDS {
        let (at_once, last_to_first) =
            build(&repo, &packages, &done.join(format!("{number}-at-once")), BUILDS).await?;
        if number > 0 {
            let (in_turn, _) = build(&repo, &packages, &done.join(format!("{number}-in-turn")), 1).await?;
            pairs.add(at_once, in_turn);
            spread.push(Duration::from_secs_f64(last_to_first));
        }
    }
    pairs.note("last_to_first", round(median(&spread)));
    Ok(pairs)
}

/// The same base and packages for all, and some work of its own for each.
fn definition(number: usize) -> Result<String> {
    let mut text = String::new();
    write!(
        text,
        "apiVersion: kiln/v1\nname: s{number}\nimage:\n  from: {{ debian: bookworm }}\n  steps:\n    - packages: \
         [nginx-light]\n    - run: for i in $(seq 3000); do echo {number} $i | sha256sum; done > /etc/work\n  command: \
         [nginx]\nrun:\n  replicas: 1\n"
    )?;
    Ok(text)
}

/// How long all of them take, and how many times as long the last waits for its end as the first.
async fn build(repo: &Repo, packages: &Path, done: &Path, workers: usize) -> Result<(Duration, f64)> {
    std::fs::create_dir(done)?;
    let settings = [
        format!("builder.layers={}", done.join("layers").display()),
        format!("builder.packages={}", packages.display()),
        format!("builder.workers={workers}"),
    ];
    let site = Site::up_with("bench-eight", &settings.each_ref().map(String::as_str))?;
    let began = Instant::now();
    site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
    for number in 1..=BUILDS {
        site.built(&format!("s{number}"), None, BOUND).await?;
    }
    let took = began.elapsed();
    let builds = site.builder().list_builds(ListBuildsRequest::default()).await?.into_inner().builds;
    let seconds = |time: Option<Timestamp>| time.map(|at| at.seconds as f64 + f64::from(at.nanos) / 1e9);
    let first = builds.iter().filter_map(|build| seconds(build.created)).fold(f64::INFINITY, f64::min);
    let ends: Vec<f64> = builds.iter().filter_map(|build| Some(seconds(build.ended)? - first)).collect();
    let earliest = ends.iter().copied().fold(f64::INFINITY, f64::min);
    let last = ends.iter().copied().fold(0.0, f64::max);
    site.down_to(&done.join("site"))?;
    Ok((took, last / earliest))
}
