//! Three instances replaced one by one, start-first, with the same health settings: a commit of a changed environment
//! against `docker service update`. The observer is the kernel: it is over when no process of an old instance lives.

use std::time::{Duration, Instant};

use kiln_tests::Result;
use kiln_tests::docker::Docker;
use kiln_tests::process::alive;
use kiln_tests::server::Web;
use kiln_tests::site::Site;

use crate::Pairs;

const ROUNDS: u64 = 5;
const BOUND: Duration = Duration::from_secs(120);

pub(crate) async fn run() -> Result<Pairs> {
    // Every second, healthy at the first pass, no soak: what `docker service update` does with --health-interval 1s.
    let web = Web::start_with(Site::up_with("bench-replace", &["poll.git=1h"])?, |repo| {
        repo.replace(
            "web/server.yaml",
            "interval: 200ms, timeout: 200ms, healthy: 2",
            "interval: 1s, timeout: 1s, healthy: 1",
        )?;
        repo.replace("web/server.yaml", "soak: 300ms", "soak: 0s")
    })
    .await?;
    let docker = Docker::start(&web.folder().join("docker"))?;
    docker.load(&web.export()?, "web:kiln")?;
    docker.run(&["swarm", "init", "--advertise-addr", "127.0.0.1"])?;
    docker.run(&[
        "service",
        "create",
        "--quiet",
        "--detach=false",
        "--name",
        "web",
        "--replicas",
        "3",
        "--no-resolve-image",
        "--endpoint-mode",
        "dnsrr",
        "--sysctl",
        "net.ipv4.ip_unprivileged_port_start=0",
        "--health-cmd",
        "bash -c 'exec 3<>/dev/tcp/127.0.0.1/80'",
        "--health-interval",
        "1s",
        "--health-timeout",
        "1s",
        "--update-order",
        "start-first",
        "--update-parallelism",
        "1",
        "--update-delay",
        "0s",
        "--update-monitor",
        "0s",
        "web:kiln",
    ])?;

    let mut pairs = Pairs::new("docker service update");
    for round in 1..=ROUNDS {
        let old = web.pids().await?;
        let definition = web.repo.path().join("web/server.yaml");
        let text = std::fs::read_to_string(&definition)?;
        let stage = text.lines().find(|line| line.contains("STAGE:")).ok_or("a STAGE in the definition")?;
        web.repo.replace("web/server.yaml", stage, &format!("  env: {{ STAGE: round{round} }}"))?;
        web.repo.commit("Change the environment")?;
        let began = Instant::now();
        web.site.kiln(&["apply", &web.repo.url(), "--branch", "main"])?;
        let kiln = gone(&old, began).await?;
        web.settled(round + 1).await?;

        let format = "{{.State.Pid}}";
        let ids = docker.run(&["ps", "--quiet", "--filter", "label=com.docker.swarm.service.name=web"])?;
        let mut arguments = vec!["inspect", "--format", format];
        arguments.extend(ids.split_whitespace());
        let old: Vec<u32> = docker
            .run(&arguments)?
            .split_whitespace()
            .map(str::parse)
            .collect::<std::result::Result<_, _>>()?;
        let began = Instant::now();
        let stage = format!("STAGE=round{round}");
        let mut update = docker
            .command()
            .args(["service", "update", "--quiet", "--env-add", &stage, "web"])
            .stdout(std::process::Stdio::null())
            .spawn()?;
        let theirs = gone(&old, began).await?;
        update.wait()?;
        pairs.add(kiln, theirs);
    }
    docker.run(&["service", "rm", "web"])?;
    docker.run(&["swarm", "leave", "--force"])?;
    drop(docker);
    web.site.down()?;
    Ok(pairs)
}

/// How long it took until none of these processes lived.
async fn gone(old: &[u32], began: Instant) -> Result<Duration> {
    if old.len() != 3 {
        return Err(format!("three instances are to be replaced, found {old:?}").into());
    }
    while old.iter().any(|pid| alive(*pid)) {
        if began.elapsed() > BOUND {
            return Err(format!("{old:?} still live after {BOUND:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(began.elapsed())
}
