//! `kiln-bench NAME`: one piece of work by Kiln and by a peer, in turn, in one run. Prints each time on standard error
//! and one JSON line with the medians on standard output.

mod ansible;
mod bench;
mod buildah;
mod cold_bake;
mod eight_builds;
mod launch;
mod rebake;
mod rebake_nothing;
mod replace;
mod replicas;

use std::process::ExitCode;
use std::time::Duration;

use crate::cold_bake::Files;

#[tokio::main]
async fn main() -> ExitCode {
    let name = std::env::args().nth(1).unwrap_or_default();
    let measured = match name.as_str() {
        "launch" => launch::run().await.map(|pairs| pairs.json(&name)),
        "replace" => replace::run().await.map(|pairs| pairs.json(&name)),
        "cold-bake" => cold_bake::run(Files::AtHand).await.map(|pairs| pairs.json(&name)),
        "cold-bake-empty-store" => cold_bake::run(Files::Elsewhere).await.map(|pairs| pairs.json(&name)),
        "rebake-file" => rebake::a_file().await.map(|pairs| pairs.json(&name)),
        "rebake-package" => rebake::a_package().await.map(|pairs| pairs.json(&name)),
        "ansible" => ansible::run().await.map(|pairs| pairs.json(&name)),
        "rebake-nothing" => rebake_nothing::run().await.map(|pairs| pairs.json(&name)),
        "eight-builds" => eight_builds::run().await.map(|pairs| pairs.json(&name)),
        "replicas" => replicas::run().await,
        _ => Err(format!("{name:?} is no benchmark; tests/bench.sh names them").into()),
    };
    match measured {
        Ok(line) => {
            println!("{line}");
            // A bound that a benchmark has is in its line.
            match (line["ratio"].as_f64(), line["least_ratio"].as_f64()) {
                (Some(ratio), Some(least)) if ratio < least => {
                    eprintln!("kiln-bench {name}: the ratio is {ratio}, and has to be {least} at least");
                    ExitCode::FAILURE
                }
                _ => ExitCode::SUCCESS,
            }
        }
        Err(error) => {
            eprintln!("kiln-bench {name}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Times of the same work, taken in turn so that both sides meet the same machine.
struct Pairs {
    peer: &'static str,
    kiln: Vec<Duration>,
    theirs: Vec<Duration>,
    notes: Vec<(&'static str, serde_json::Value)>,
}

impl Pairs {
    fn new(peer: &'static str) -> Self {
        Self { peer, kiln: Vec::new(), theirs: Vec::new(), notes: Vec::new() }
    }

    fn add(&mut self, kiln: Duration, theirs: Duration) {
        eprintln!("kiln {:.3} s, {} {:.3} s", kiln.as_secs_f64(), self.peer, theirs.as_secs_f64());
        self.kiln.push(kiln);
        self.theirs.push(theirs);
    }

    /// One more field of the line.
    fn note(&mut self, name: &'static str, value: impl Into<serde_json::Value>) {
        self.notes.push((name, value.into()));
    }

    fn json(&self, name: &str) -> serde_json::Value {
        let (kiln, theirs) = (median(&self.kiln), median(&self.theirs));
        let mut line = serde_json::json!({
            "name": name,
            "kiln_s": round(kiln),
            "peer": self.peer,
            "peer_s": round(theirs),
            "ratio": round(kiln / theirs),
            "rounds": self.kiln.len(),
        });
        for (name, value) in &self.notes {
            line[*name] = value.clone();
        }
        line
    }
}

fn median(times: &[Duration]) -> f64 {
    let mut seconds: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
    seconds.sort_by(f64::total_cmp);
    match seconds.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => seconds[n / 2],
        n => f64::midpoint(seconds[n / 2 - 1], seconds[n / 2]),
    }
}

fn round(seconds: f64) -> f64 {
    (seconds * 10_000.0).round() / 10_000.0
}
