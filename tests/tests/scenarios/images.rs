//! Other tools take the image as what it is: an OCI image.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kiln_tests::Result;
use kiln_tests::command::run;
use kiln_tests::docker::Docker;
use kiln_tests::load::fetch;
use kiln_tests::wait::until;

use kiln_tests::server::Web;
use kiln_tests::site::{Site, tagged};

#[tokio::test(flavor = "multi_thread")]
async fn skopeo_umoci_and_docker_accept_the_image_and_docker_runs_it() -> Result<()> {
    let web = Web::start(Site::up("images")?).await?;
    let layout = web.export()?;

    let inspected = run(Command::new("skopeo").args(["inspect", "--raw"]).arg(oci(&layout)))?;
    assert!(inspected.contains("application/vnd.oci.image.layer.v1.tar"), "{inspected}");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(tagged(&layout)?)
        .arg(web.folder().join("bundle")))?;
    let page = std::fs::read_to_string(web.folder().join("bundle/rootfs/var/www/html/index.html"))?;
    assert!(page.contains("Hello one"), "{page}");

    let docker = Docker::start_aside(&web.folder().join("docker"))?;
    docker.load(&layout, "web:kiln")?;
    let container =
        docker.run(&["run", "--detach", "--sysctl", "net.ipv4.ip_unprivileged_port_start=0", "web:kiln"])?;
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = docker.run(&["inspect", "--format", format, container.trim()])?;
    let target = format!("{}:80", address.trim()).parse()?;
    until("nginx under docker", Duration::from_secs(20), async || {
        let answer = fetch(target, "/").await?;
        if answer.contains("Hello one") { Ok(()) } else { Err(answer.into()) }
    })
    .await?;
    docker.run(&["rm", "--force", container.trim()])?;
    drop(docker);

    let inspected = web.site.kiln(&["image", "inspect", "web"])?;
    assert!(inspected.contains("nginx-light") && inspected.contains("sha256:"), "{inspected}");
    let verified = web.site.kiln(&["build", "web", "--verify", "--timings"])?;
    assert!(verified.contains("same"), "baked again on an empty layer cache, bit for bit:\n{verified}");
    for phase in ["unpack", "configure", "hash", "write"] {
        assert!(verified.contains(phase), "where its time went:\n{verified}");
    }
    web.site.down()
}

fn oci(layout: &Path) -> String {
    format!("oci:{}", layout.display())
}
