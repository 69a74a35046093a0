//! Every TCP port that a site's processes listen on, looked for where the kernel says that they are, and the broker's
//! certificate through renewals and a rotation.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::command::both;
use kiln_tests::free_port;
use kiln_tests::server::Web;
use kiln_tests::site::Site;
use kiln_tests::wait::until;

/// Processes of the site in the machine's own network: all that have its folder in their command line. What runs in an
/// instance is not Kiln's.
fn processes(site: &Site) -> Result<BTreeMap<u32, String>> {
    let home = site.home().display().to_string();
    let own = std::fs::read_link("/proc/self/ns/net")?;
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // One that ended meanwhile listens to nobody.
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.contains(&home) && std::fs::read_link(format!("/proc/{pid}/ns/net")).is_ok_and(|it| it == own)
        {
            found.insert(pid, line);
        }
    }
    Ok(found)
}

/// The kernel's number of a socket, from `socket:[4026]`.
fn inode(path: &Path) -> Option<u64> {
    path.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Ports on which TCP is listened, of all addresses and both families, by the number of the socket.
fn listening() -> Result<BTreeMap<u64, u16>> {
    let mut found = BTreeMap::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in std::fs::read_to_string(table)?.lines().skip(1) {
            let fields: Vec<_> = line.split_whitespace().collect();
            let (Some(local), Some(state), Some(inode)) = (fields.get(1), fields.get(3), fields.get(9))
            else {
                continue;
            };
            if *state == "0A" {
                let port = local.rsplit(':').next().ok_or("a port")?;
                found.insert(inode.parse()?, u16::from_str_radix(port, 16)?);
            }
        }
    }
    Ok(found)
}

/// What listens, by its port.
fn ports(site: &Site) -> Result<BTreeMap<u16, String>> {
    let listening = listening()?;
    let mut found = BTreeMap::new();
    for (pid, line) in processes(site)? {
        let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        let sockets = files.flatten().filter_map(|file| inode(&std::fs::read_link(file.path()).ok()?));
        found.extend(sockets.filter_map(|socket| Some((*listening.get(&socket)?, line.clone()))));
    }
    Ok(found)
}

fn curl(port: u16, more: &[&str]) -> Result<Output> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--include", "--insecure", "--max-time", "10"]).args(more);
    Ok(curl.arg(format!("https://127.0.0.1:{port}/metrics")).output()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_port_of_a_site_has_mutual_tls() -> Result<()> {
    let listens = Service::ALL
        .into_iter()
        .map(|service| Ok(format!("listen.{service}=127.0.0.1:{}", free_port()?)))
        .collect::<Result<Vec<_>>>()?;
    let site = Site::up_with("ports", &listens.iter().map(String::as_str).collect::<Vec<_>>())?;
    // With everything at work that could listen.
    let web = Web::start(site).await?;
    let config = kiln_service::config::Site::load(web.site.home())?;
    let broker: u16 = config.nats_url.rsplit(':').next().ok_or("a port")?.parse()?;
    let set = config.listen.values().chain(config.metrics.values()).map(SocketAddr::port).chain([broker]);
    let set: BTreeSet<_> = set.collect();
    let ports = ports(&web.site)?;
    println!("{ports:#?}");
    assert_eq!(ports.keys().copied().collect::<BTreeSet<_>>(), set, "{ports:?}");
    assert_eq!(ports.len(), 9, "{ports:?}");

    let viewer = web.site.home().join("ada.pem").display().to_string();
    web.site.kiln(&["pki", "issue", "ada", "--out", &viewer])?;
    for (port, program) in &ports {
        for bytes in [&b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"CONNECT {}\r\nPING\r\n", &[0; 4096]]
        {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, *port))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(bytes)?;
            let mut answer = Vec::new();
            // Closed, with nothing but an alert.
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.len() < 16 && !answer.starts_with(b"HTTP"), "{program}: {answer:?}");
        }
        let old = curl(*port, &["--tls-max", "1.2"])?;
        assert_eq!(old.status.code(), Some(35), "{program} with TLS 1.2: {}", both(&old));
        let unnamed = curl(*port, &[])?;
        let told = both(&unnamed);
        let is_refused = !unnamed.status.success() && told.contains("certificate required");
        assert!(is_refused, "{program} without a certificate: {told}");
        let shown = both(&curl(*port, &["--cert", &viewer])?);
        assert!(!shown.contains("certificate required"), "{program}: {shown}");
        if config.metrics.values().any(|it| it.port() == *port) {
            assert!(shown.contains("kiln_grpc_calls_total") && !told.contains("kiln_"), "{program}: {told}");
        }
    }
    // Once there is a token a service might be shown it yet, and without one says that it knows nobody.
    web.site.kiln(&["token", "create", "bot", "--role", "viewer"])?;
    for (port, program) in &ports {
        let unnamed = curl(*port, &[])?;
        let told = both(&unnamed);
        let is_told = told.starts_with("HTTP/1.1 401") || told.contains("grpc-status: 16");
        assert_eq!(is_told, *port != broker, "{program}: {told}");
        assert_eq!(unnamed.status.success(), *port != broker, "{program}: {told}");
    }
    web.site.down()
}

/// Whether the broker tells somebody with this certificate what it is.
fn greets(site: &Site, identity: &str) -> Result<()> {
    let url = kiln_service::config::Site::load(site.home())?.nats_url;
    let port = url.rsplit(':').next().ok_or("a port")?.parse()?;
    let authority = site.home().join("keys/pki/authority.pem").display().to_string();
    let mut curl = Command::new("curl");
    // It takes the greeting for an answer of the oldest kind.
    curl.args([
        "--silent",
        "--show-error",
        "--http0.9",
        "--max-time",
        "1",
        "--cacert",
        &authority,
        "--cert",
        identity,
    ]);
    let output = curl
        .arg(format!("https://{}/", SocketAddr::from((IpAddr::from(Ipv4Addr::LOCALHOST), port))))
        .output()?;
    let text = both(&output);
    if text.starts_with("INFO {") { Ok(()) } else { Err(text.into()) }
}

/// Certificates of six seconds, and nothing asked anew of the others meanwhile: what happens, happens by events.
#[tokio::test(flavor = "multi_thread")]
async fn events_go_on_while_the_brokers_certificate_and_authority_change() -> Result<()> {
    let site = Site::up_with("renewed", &["pki.life=6s", "poll.resync=10m"])?;
    let strange = site.home().join("old.pem").display().to_string();
    site.kiln(&["pki", "issue", "ada", "--out", &strange])?;
    let web = Web::start(site).await?;
    let broker = web.site.pid("nats")?;
    let serial = || -> Result<String> {
        let text = std::fs::read_to_string(web.site.home().join("keys/pki/broker.pem"))?;
        Ok(kiln_service::certificate::Certificate::of_pem(&text)?.serial)
    };
    let steps: [&[&str]; 5] =
        [&[], &[], &["pki", "rotate"], &["pki", "rotate", "--switch"], &["pki", "rotate", "--finish"]];
    for (release, step) in (2..).zip(steps) {
        let before = serial()?;
        if !step.is_empty() {
            greets(&web.site, &strange)?;
            web.site.kiln(step)?;
        }
        until("the broker's certificate to be renewed", Duration::from_secs(30), async || {
            if serial()? == before { Err("it is the same".into()) } else { Ok(()) }
        })
        .await?;
        web.say(&format!("release {release}"))?;
        web.settled(release).await?;
        until("the event of the rollout", Duration::from_secs(10), async || web.site.heard(release)).await?;
    }
    until("the old authority to be forgotten", Duration::from_secs(10), async || {
        match greets(&web.site, &strange) {
            Err(why) if why.to_string().contains("unknown ca") => Ok(()),
            other => Err(format!("{other:?}").into()),
        }
    })
    .await?;
    assert_eq!(web.site.pid("nats")?, broker, "the broker was started anew");
    web.site.down()
}
