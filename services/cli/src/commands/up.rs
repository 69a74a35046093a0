//! `kiln up`

use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use kiln_model::event::Service;
use kiln_service::client;
use kiln_service::config::Site;
use serde_json::json;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::screen::{Screen, good, plain};
use crate::site::broker;
use crate::site::create::{self, Wishes};
use crate::site::programs::Kind;
use crate::site::{doctor, logs, network, programs, require_root, supervisor};

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Use the NATS server that runs there, instead of one of the site's own
    #[arg(long, value_name = "URL")]
    nats_url: Option<String>,
    /// Keep the state of a new site in this PostgreSQL database, such as postgres://kiln@db.example/kiln, instead of in
    /// files. The password is not part of it: --config store.password_file=FILE names the file that holds it
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// Change a setting of site.toml, such as poll.git=1s, builder.workers=4 or otlp.endpoint=http://127.0.0.1:4317
    #[arg(long = "config", value_name = "KEY=VALUE", value_parser = setting)]
    config: Vec<(String, String)>,
    /// Make the site, or change its settings, and start nothing: systemd or another keeps its services running
    #[arg(long)]
    no_start: bool,
    /// How long to wait until every service serves, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    timeout: u64,
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it must have the form KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.trim().to_owned()))
}

const PERIOD: Duration = Duration::from_millis(50);

/// Lines of a log that are shown of a service that does not come up.
const LOG_LINES: usize = 10;

pub(crate) async fn run(it: Up, home: &Home, screen: Screen) -> Outcome {
    require_root("starting Kiln")?;
    let limit = Instant::now() + Duration::from_secs(it.timeout);
    // Held until the services have the ports that a new site chooses.
    let turn = if home.exists() { None } else { Some(network::turn(limit, screen).await?) };
    let is_new = !home.exists();
    let site = create::ensure(home, &Wishes { nats_url: it.nats_url, store: it.store, settings: it.config })?;
    if it.no_start {
        screen.json(&json!({
            "site": site.name.as_str(),
            "id": site.id.as_str(),
            "home": site.home.display().to_string(),
            "new": is_new,
            "nats_url": site.nats_url,
        }))?;
        return screen.line(format_args!(
            "The site {} is made in {}; nothing is started",
            site.name,
            site.home.display()
        ));
    }
    let programs = programs::found(&site)?;
    if network::is_routed_elsewhere(site.subnet.network(), &site.bridge) {
        let what = format!("the network {} of the instances", site.subnet);
        return Err(Failure::new(Code::Refused, what, "this machine has a route of its own into it")
            .reason("subnet_taken")
            .todo("name a free one: kiln up --config subnet=10.77.3.0/24"));
    }
    let already = supervisor::running(&site).is_some();
    if !already {
        let report = doctor::examine(home).await?;
        report.show(screen, true)?;
        if !report.is_good() {
            return Err(Failure::new(Code::Refused, "this machine can't run instances", "")
                .reason("doctor")
                .todo("do what is said above, then: kiln doctor"));
        }
        start_supervisor(&site)?;
    }
    let bar = screen.bar(0);
    bar.message("waiting for the broker");
    wait_for_broker(&site, limit).await?;
    for service in Service::ALL {
        bar.message(format_args!("waiting for the {service}"));
        wait_for_service(&site, service, limit).await?;
    }
    drop((bar, turn));

    let mut rows = Vec::new();
    let mut documents = Vec::new();
    for program in &programs {
        let pid = program.running().map(|process| process.pid());
        let place = match program.kind {
            Kind::Broker => site.nats_url.clone(),
            Kind::Service(service) => site.paths().socket(service).display().to_string(),
        };
        let metrics = match program.kind {
            Kind::Service(service) => site.metrics.get(&service).map(|it| format!("https://{it}/metrics")),
            Kind::Broker => None,
        };
        documents
            .push(json!({ "name": program.kind.name(), "pid": pid, "address": place, "metrics": metrics }));
        rows.push(vec![
            plain(program.kind.name()),
            good("running"),
            plain(pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string())),
            plain(place),
        ]);
    }
    screen.json(&json!({
        "site": site.name.as_str(),
        "id": site.id.as_str(),
        "home": site.home.display().to_string(),
        "new": is_new,
        "already_running": already,
        "nats_url": site.nats_url,
        "services": documents,
    }))?;
    let word = if is_new { "a new site" } else { "the site" };
    screen.line(format_args!("Kiln runs: {word} {} in {}\n", site.name, site.home.display()))?;
    screen.table(&["PROGRAM", "STATE", "PROCESS", "ADDRESS"], rows)?;
    if is_new {
        screen.next(&["kiln init web", "kiln apply web --wait"])
    } else if broker::is_own(&site) && !site.broker_has_tls() {
        screen.next(&[
            "give the broker TLS, which it was made without: kiln down --keep-instances, then kiln up",
        ])
    } else {
        screen.next(&["kiln status"])
    }
}

fn start_supervisor(site: &Site) -> Outcome {
    let own = std::env::current_exe().during("finding this program's own file")?;
    let mut command = Command::new(own);
    command.args(supervisor::arguments(site));
    supervisor::detach(&mut command, &supervisor::log(site))?;
    // It outlives this command, and is nobody's child then: there is nothing to wait for.
    command.spawn().map(drop).during("starting the supervisor")
}

async fn wait_for_broker(site: &Site, limit: Instant) -> Outcome {
    loop {
        match supervisor::ensure_streams(site).await {
            Err(failure) if failure.is_unavailable() && Instant::now() < limit => {
                tokio::time::sleep(PERIOD).await
            }
            Err(failure) => return Err(failure.todo(format!("its log: {}", log_of(site, "nats-server")))),
            Ok(()) => return Ok(()),
        }
    }
}

async fn wait_for_service(site: &Site, service: Service, limit: Instant) -> Outcome {
    let mut health = HealthClient::new(client::channel(&site.paths().socket(service)));
    loop {
        let answer = health.check(HealthCheckRequest { service: String::new() }).await;
        let why = match answer {
            Ok(answer) if answer.get_ref().status() == ServingStatus::Serving => return Ok(()),
            Ok(answer) => format!("it says {}", answer.get_ref().status().as_str_name()),
            Err(_) => "it does not answer".to_owned(),
        };
        if Instant::now() >= limit {
            let path = log_of(site, service.as_str());
            let lines = last_lines(&path);
            return Err(Failure::new(
                Code::Unavailable,
                format!("the {service} does not come up"),
                format!("{why}{lines}"),
            )
            .reason("service_down")
            .todo(format!("the whole log: {path}")));
        }
        tokio::time::sleep(PERIOD).await;
    }
}

fn log_of(site: &Site, name: &str) -> String {
    site.paths().logs().join(format!("{name}.log")).display().to_string()
}

fn last_lines(path: &str) -> String {
    // The rest is shorter than what was asked for where there is nothing to read.
    let text = logs::end(path.as_ref()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    let first = lines.len().saturating_sub(LOG_LINES);
    lines.into_iter().skip(first).map(|line| format!("\n  | {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::setting;

    #[test]
    fn a_setting_has_a_key_and_a_value() {
        assert_eq!(setting("poll.git=1s"), Ok(("poll.git".to_owned(), "1s".to_owned())));
        assert_eq!(setting("log=a=b"), Ok(("log".to_owned(), "a=b".to_owned())));
        assert!(setting("poll.git").is_err());
    }
}
