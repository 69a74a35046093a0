//! Launch to the first answer: the engine's Launch against `docker run`, the same image, both asked at the instance's
//! own address.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use kiln_api::engine::{InstanceSpec, LaunchRequest, RetireRequest};
use kiln_api::types::Role;
use kiln_tests::Result;
use kiln_tests::docker::Docker;
use kiln_tests::load::get;
use kiln_tests::server::Web;
use kiln_tests::site::Site;

use crate::Pairs;

const ROUNDS: u64 = 15;
const NETWORK: &str = "kiln-bench";
const ADDRESS: &str = "10.232.0.10";

pub(crate) async fn run() -> Result<Pairs> {
    let web = Web::start(Site::up("bench-launch")?).await?;
    let docker = Docker::start(&web.folder().join("docker"))?;
    docker.load(&web.export()?, "web:kiln")?;
    docker.run(&["network", "create", "--subnet", "10.232.0.0/24", NETWORK])?;
    let image =
        web.site.fleet("web").await?.instances.first().ok_or("an instance runs")?.image_digest.clone();
    let run = web.revision().await?.run;

    let mut pairs = Pairs::new("docker run");
    for round in 1..=ROUNDS {
        let spec = InstanceSpec {
            id: format!("web-r0-0-a{}", 1_000_000 + round),
            server: "web".to_owned(),
            ordinal: 0,
            release: 0,
            attempt: 1_000_000 + round,
            role: Role::Test.into(),
            image_digest: image.clone(),
            run: run.clone(),
        };
        rest().await;
        let began = Instant::now();
        let request = LaunchRequest {
            request_id: ulid::Ulid::generate().to_string(),
            spec: Some(spec.clone()),
            ..Default::default()
        };
        let launched = web.site.engine().launch(request).await?.into_inner().instance.ok_or("no instance")?;
        answers(SocketAddr::new(launched.address.parse()?, 80)).await?;
        let kiln = began.elapsed();
        let request = RetireRequest {
            request_id: ulid::Ulid::generate().to_string(),
            id: spec.id,
            server: spec.server,
            ..Default::default()
        };
        web.site.engine().retire(request).await?;

        rest().await;
        let began = Instant::now();
        let started = tokio::task::block_in_place(|| {
            docker.run(&[
                "run",
                "--detach",
                "--network",
                NETWORK,
                "--ip",
                ADDRESS,
                "--sysctl",
                "net.ipv4.ip_unprivileged_port_start=0",
                "web:kiln",
            ])
        })?;
        answers(format!("{ADDRESS}:80").parse()?).await?;
        let theirs = began.elapsed();
        docker.run(&["rm", "--force", started.trim()])?;
        pairs.add(kiln, theirs);
    }
    // A network that outlives its daemon would take the addresses of the next one's.
    docker.run(&["network", "rm", NETWORK])?;
    drop(docker);
    web.site.down()?;
    Ok(pairs)
}

/// Both sides begin on an idle machine, with what they prepare when idle.
async fn rest() {
    tokio::time::sleep(Duration::from_millis(300)).await;
}

async fn answers(target: SocketAddr) -> Result<()> {
    let began = Instant::now();
    loop {
        match get(target, "Hello").await {
            Ok(()) => return Ok(()),
            Err(error) if began.elapsed() > Duration::from_secs(30) => {
                return Err(format!("{target}: {error}").into());
            }
            // Finer than what is measured by two orders of magnitude.
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}
