//! The API as an independent client meets it: sockets for the owner alone, reflection, health, errors with details, pages.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use kiln_api::builder::ListServersRequest;
use kiln_api::types::ListOptions;
use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::command::both;
use kiln_tests::server::SETTLES;
use kiln_tests::site::Site;
use kiln_tests::wait::until;

/// Asks a service by its socket with what its reflection tells.
fn call(site: &Site, service: Service, arguments: &[&str]) -> Result<Output> {
    let socket = site.home().join(format!("run/{service}.sock"));
    let mut buf = Command::new("buf");
    buf.args(["curl", "--protocol", "grpc", "--http2-prior-knowledge", "--unix-socket"]).arg(socket);
    Ok(buf.args(arguments).output()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_service_answers_an_independent_client() -> Result<()> {
    let site = Site::up("protocol")?;
    let mode = std::fs::metadata(site.home().join("run"))?.permissions().mode() & 0o7777;
    assert_eq!(mode, 0o700, "the sockets' folder is for the owner alone");
    for (service, name) in [
        (Service::Builder, "kiln.builder.v1.BuilderService"),
        (Service::Deployer, "kiln.deployer.v1.DeployerService"),
        (Service::Monitor, "kiln.monitor.v1.MonitorService"),
        (Service::Node, "kiln.engine.v1.EngineService"),
    ] {
        let listed = call(&site, service, &["--list-services", "http://kiln"])?;
        let text = both(&listed);
        assert!(text.contains(name) && text.contains("grpc.health.v1.Health"), "{service}: {text}");
        let body = format!(r#"{{"service": "{name}"}}"#);
        let health = call(&site, service, &["--data", &body, "http://kiln/grpc.health.v1.Health/Check"])?;
        assert!(both(&health).contains("SERVING"), "{service}: {}", both(&health));
    }

    // An error is for programs and for people: which field, why, what to do.
    let method = "http://kiln/kiln.builder.v1.BuilderService/GetServer";
    let refused = call(&site, Service::Builder, &["--data", r#"{"server": "../etc"}"#, method])?;
    let text = both(&refused);
    assert!(!refused.status.success());
    for part in ["invalid_argument", "server: ", "rpc.BadRequest", "rpc.ErrorInfo", "rpc.LocalizedMessage"] {
        assert!(text.contains(part), "no {part} in {text}");
    }
    let missing = call(&site, Service::Builder, &["--data", r#"{"server": "nobody"}"#, method])?;
    assert!(both(&missing).contains("not_found"), "{}", both(&missing));
    site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_come_in_pages() -> Result<()> {
    let site = Site::up("pages")?;
    let folder = tempfile::tempdir()?;
    let names: BTreeSet<String> = (0..5).map(|number| format!("page{number}")).collect();
    for name in &names {
        let definition = folder.path().join(name);
        std::fs::create_dir(&definition)?;
        let text =
            format!("apiVersion: kiln/v1\nname: {name}\nimage:\n  from: scratch\n  command: [/nothing]\n");
        std::fs::write(definition.join("server.yaml"), text)?;
    }
    site.kiln(&["apply", folder.path().to_str().ok_or("a text")?])?;
    // One that changes while it is listed comes again, on a page of its own: these are planned meanwhile.
    until("a list of what does not change", SETTLES, async || {
        let (seen, pages) = listed_by_twos(&site).await?;
        assert_eq!(seen, names);
        if pages == 3 { Ok(()) } else { Err(format!("{pages} pages").into()) }
    })
    .await?;
    let made_up = ListOptions { page_token: "made up".to_owned(), ..ListOptions::default() };
    let refused = site.builder().list_servers(ListServersRequest { options: Some(made_up) }).await;
    assert_eq!(refused.err().map(|status| status.code()), Some(tonic::Code::InvalidArgument));
    site.down()
}

/// All servers, and on how many pages they came.
async fn listed_by_twos(site: &Site) -> Result<(BTreeSet<String>, usize)> {
    let (mut seen, mut token, mut pages) = (BTreeSet::new(), String::new(), 0);
    loop {
        let options = ListOptions { page_size: 2, page_token: token, ..ListOptions::default() };
        let request = ListServersRequest { options: Some(options) };
        let answer = site.builder().list_servers(request).await?.into_inner();
        assert!(answer.servers.len() <= 2);
        pages += 1;
        seen.extend(answer.servers.into_iter().map(|server| server.name));
        token = answer.info.ok_or("a page is closed")?.next_page_token;
        if token.is_empty() {
            return Ok((seen, pages));
        }
    }
}
