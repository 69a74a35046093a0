//! `kiln doctor` says whether `kiln up` will do.

use std::net::TcpListener;
use std::process::Command;

use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::command::{binary, both};
use kiln_tests::site::Site;
use serde_json::Value;

#[test]
fn a_machine_that_has_all_is_good_and_one_without_a_broker_is_not() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let doctor = || -> Result<Command> {
        let mut command = Command::new(binary("kiln")?);
        command.arg("--home").arg(folder.path().join("none")).args(["doctor", "-o", "json"]);
        Ok(command)
    };
    let output = doctor()?.output()?;
    assert!(output.status.success(), "{}", both(&output));
    let document: Value = serde_json::from_slice(&output.stdout)?;
    assert_eq!(document["good"], true, "{document}");
    let findings = document["findings"].as_array().ok_or("no findings")?;
    for name in [
        "runc",
        "nftables",
        "bridge",
        "cgroups",
        "build-rights",
        "build-mounts",
        "apt-sources",
        "git",
        "nats-server",
    ] {
        let found = findings.iter().find(|it| it["name"] == name);
        assert!(found.is_some_and(|it| it["ok"] == true && it["fix"] == ""), "{name}: {found:?}");
    }

    let output = doctor()?.env("KILN_NATS_SERVER", "/bin/true").output()?;
    assert_eq!(output.status.code(), Some(4), "{}", both(&output));
    let document: Value = serde_json::from_slice(&output.stdout)?;
    let bad: Vec<_> =
        document["findings"].as_array().ok_or("no findings")?.iter().filter(|it| it["ok"] == false).collect();
    assert!(
        bad.iter()
            .any(|it| it["name"] == "nats-server" && it["fix"].as_str().is_some_and(|fix| !fix.is_empty())),
        "{bad:?}"
    );
    Ok(())
}

#[test]
fn a_port_that_another_program_holds_is_told_before_anything_starts() -> Result<()> {
    let site = Site::up("ports")?;
    assert_eq!(site.json(&["doctor"])?["good"], true, "its own services hold its ports");
    site.kiln(&["down"])?;

    let metrics = kiln_service::config::Site::load(site.home())?.metrics;
    let address = metrics.get(&Service::Node).ok_or("no metrics of the node")?;
    let held = TcpListener::bind(address)?;
    let output = site.try_kiln(&["doctor", "-o", "json"])?;
    assert_eq!(output.status.code(), Some(4), "{}", both(&output));
    let document: Value = serde_json::from_slice(&output.stdout)?;
    let name = format!("port {} (metrics.node)", address.port());
    let found = document["findings"].as_array().and_then(|all| all.iter().find(|it| it["name"] == *name));
    let found = found.ok_or_else(|| format!("no {name} in {document}"))?;
    let holder = format!("process {}", std::process::id());
    assert!(
        found["ok"] == false && found["detail"].as_str().is_some_and(|it| it.contains(&holder)),
        "{found}"
    );
    assert!(
        found["fix"].as_str().is_some_and(|it| it.contains("--config metrics.node=127.0.0.1:PORT")),
        "{found}"
    );
    let output = site.try_kiln(&["up"])?;
    assert_eq!(output.status.code(), Some(4), "{}", both(&output));

    drop(held);
    assert_eq!(site.json(&["doctor"])?["good"], true);
    site.down()
}
