//! A site over TCP: its services with each other, and people from elsewhere.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use kiln_api::engine::RetireRequest;
use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_model::event::Service;
use kiln_service::client;
use kiln_service::tls::TlsFiles;
use kiln_tests::Result;
use kiln_tests::command::both;
use kiln_tests::elsewhere::{Elsewhere, Ports};
use kiln_tests::server::Web;
use kiln_tests::site::Site;
use kiln_tests::wait::until;

/// Connections that stand to a port of this machine.
fn connections(port: u16) -> Result<usize> {
    let (place, established) = (format!("0100007F:{port:04X}"), "01");
    let table = std::fs::read_to_string("/proc/net/tcp")?;
    let fields = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    Ok(fields.filter(|it| it.get(1) == Some(&place.as_str()) && it.get(3) == Some(&established)).count())
}

/// With certificates of twenty seconds, which `kiln up` renews under the running services.
#[tokio::test(flavor = "multi_thread")]
async fn the_whole_loop_runs_over_tcp_and_through_renewals() -> Result<()> {
    let ports = Ports::free()?;
    let mut settings = vec!["pki.life=20s".to_owned()];
    settings.extend(ports.settings());
    for (service, port) in ports.each() {
        settings.push(format!("peers.{service}=https://127.0.0.1:{port}"));
    }
    let site = Site::up_with("tcp", &settings.iter().map(String::as_str).collect::<Vec<_>>())?;
    let web = Web::start(site).await?;
    for (service, port) in ports.each() {
        let calls = connections(port)?;
        println!("{service}: {calls} connections");
        assert!(calls > 0, "nobody calls the {service} by TCP");
    }
    let load = web.load();
    let serials = || -> Result<String> {
        let path = web.site.home().join("keys/pki/node.pem");
        let text = std::fs::read_to_string(path)?;
        Ok(kiln_service::certificate::Certificate::of_pem(&text)?.serial)
    };
    let mut seen = BTreeSet::from([serials()?]);
    for release in 2..4 {
        until("the certificates to be renewed", Duration::from_secs(60), async || {
            if seen.contains(&serials()?) { Err("they are the same".into()) } else { Ok(()) }
        })
        .await?;
        seen.insert(serials()?);
        web.say(&format!("release {release}"))?;
        web.settled(release).await?;
    }
    assert!(seen.len() >= 3, "{seen:?}");
    load.stop().await.unfailing(1000)?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn people_log_in_from_elsewhere_with_a_certificate_or_a_token() -> Result<()> {
    let ports = Ports::free()?;
    let site = Site::up_with("far", &ports.settings().iter().map(String::as_str).collect::<Vec<_>>())?;
    let folder = tempfile::tempdir()?;
    let person = Elsewhere::new(folder.path(), "far");
    let text = |path: &Path| path.to_str().map(str::to_owned).ok_or("a text");
    let log_in = |proof: &[&str], input: &str| person.log_in(&site, &ports, proof, input);

    // A definition that an operator brings from there, and may not take away again.
    let definition = folder.path().join("small");
    std::fs::create_dir(&definition)?;
    let yaml = "apiVersion: kiln/v1\nname: small\nimage:\n  from: scratch\n  command: [/nothing]\n";
    std::fs::write(definition.join("server.yaml"), yaml)?;
    let certificate = text(&folder.path().join("ada.pem"))?;
    site.kiln(&["pki", "issue", "ada", "--role", "operator", "--out", &certificate])?;
    log_in(&["--certificate", &certificate], "")?;
    person.does(&["apply", &text(&definition)?], "")?;
    assert!(person.does(&["status"], "")?.contains("small"));
    person.is_refused(&["remove", "small"], &["ada (operator, by certificate)", "the role admin"])?;
    person.is_refused(&["events"], &["another machine"])?;
    let history = site.kiln(&["why", "small"])?;
    assert!(history.contains("ada applied"), "{history}");

    // What only services may ask of a node is refused to a person, and recorded there.
    let node = ports.each().find(|(service, _)| *service == Service::Node).ok_or("a port")?.1;
    let files = TlsFiles {
        site: "far".parse()?,
        authority: site.home().join("keys/pki/authority.pem"),
        identity: Some(certificate.clone().into()),
    };
    let place = format!("https://127.0.0.1:{node}").parse()?;
    let mut engine = EngineServiceClient::new(client::remote(place, &files, Service::Node, None)?);
    let refused = engine.retire(RetireRequest::default()).await.err().ok_or("a person retires instances")?;
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused}");
    until("the record of it", Duration::from_secs(10), async || {
        let records = site.json(&["audit", "--actor", "ada"])?;
        let of_node = |it: &&serde_json::Value| it["service"] == "node" && it["action"] == "call.refused";
        let found = records["records"].as_array().into_iter().flatten().find(of_node);
        let found = found.ok_or_else(|| records.to_string())?;
        assert_eq!(found["subject"], "kiln.engine.v1.EngineService/Retire", "{found}");
        Ok(())
    })
    .await?;
    until("its seal", Duration::from_secs(10), async || {
        let verified = both(&site.try_kiln(&["audit", "verify"])?);
        let alone = "The records of the node and the site were compared with nothing";
        if verified.contains(alone) { Ok(()) } else { Err(verified.into()) }
    })
    .await?;

    // One who may look, by a token, until it is taken back.
    let made = site.json(&["token", "create", "bot", "--role", "viewer", "--expires", "1h"])?;
    let (token, id) = (made["token"].as_str().ok_or("a token")?, made["id"].as_str().ok_or("an id")?);
    let last = site.json(&["token", "create", "eve", "--role", "viewer", "--expires", "1h"])?;
    log_in(&["--token"], token)?;
    assert!(person.does(&["status"], "")?.contains("small"));
    person.is_refused(&["signal", "small", "old"], &["bot (viewer, by token)", "operator and up"])?;
    let kept = std::fs::read_to_string(site.home().join("keys/tokens.toml"))?;
    assert!(!kept.contains(&token["kiln_".len()..]), "the secret is kept");
    site.kiln(&["token", "revoke", id])?;
    until("the token to be refused", Duration::from_secs(2), async || {
        let output = person.kiln(&["status"], "")?;
        if output.status.code() == Some(4) { Ok(()) } else { Err(both(&output).into()) }
    })
    .await?;
    person.is_refused(&["status"], &["unknown or was revoked", "kiln login"])?;
    site.kiln(&["token", "revoke", last["id"].as_str().ok_or("an id")?])?;
    person.is_refused(&["status"], &["the site has no tokens", "kiln login"])?;

    // A certificate that is refused is told from a service that is away.
    log_in(&["--certificate", &certificate], "")?;
    let strange = kiln_service::pki::Authority::new("far".parse()?)?;
    let ada = kiln_service::access::Identity::person("ada".parse()?, kiln_service::access::Role::Admin)?;
    let issued = strange.issue(&ada, &[], Duration::from_secs(3600), std::time::SystemTime::now())?;
    std::fs::write(folder.path().join("kiln/far/identity.pem"), issued.reveal())?;
    person.is_refused(&["status"], &["certificate", "kiln login"])?;
    site.down()
}
