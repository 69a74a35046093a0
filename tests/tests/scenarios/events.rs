//! What other systems see: events in another language, and one trace from the commit to the last instance.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_api::deployer::Fleet;
use kiln_tests::Result;
use kiln_tests::command::run;
use kiln_tests::otlp::Collector;
use kiln_tests::site::{Site, example};
use kiln_tests::wait::until;

use kiln_tests::server::{SETTLES, Web};

#[tokio::test(flavor = "multi_thread")]
async fn a_python_client_receives_the_events_with_their_headers() -> Result<()> {
    let site = Site::up("events")?;
    let venv = kiln_tests::command::binary("kiln")?.with_file_name("kiln-test-cache").join("nats-py");
    if !venv.join("bin/python").exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    }
    run(Command::new(venv.join("bin/pip")).args(["install", "--quiet", "nats-py[nkeys]==2.16.0"]))?;
    let own = site.home().join("subscriber.pem").display().to_string();
    site.kiln(&["pki", "issue", "subscriber", "--out", &own])?;
    let mut subscriber = Command::new(venv.join("bin/python"))
        .arg(example("subscriber.py"))
        .arg(site.home())
        .arg(own)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut ready = String::new();
    BufReader::new(subscriber.stderr.take().ok_or("stderr")?).read_line(&mut ready)?;
    assert_eq!(ready, "listening\n");

    let web = Web::apply(site, |_| Ok(()))?;
    web.site.settled("web", 1, SETTLES).await?;
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let lines = BufReader::new(subscriber.stdout.take().ok_or("stdout")?).lines();
    let wanted = [
        "kiln.builder.definition.applied.v1",
        "kiln.builder.build.succeeded.v1",
        "kiln.builder.revision.created.v1",
        "kiln.deployer.release.created.v1",
        "kiln.deployer.rollout.started.v1",
        "kiln.deployer.instance.launched.v1",
        "kiln.monitor.instance.healthy.v1",
        "kiln.deployer.rollout.succeeded.v1",
    ];
    for line in lines {
        let event: serde_json::Value = serde_json::from_str(&line?)?;
        let header = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        for name in ["ce-id", "ce-source", "ce-time", "ce-sequence", "traceparent"] {
            assert!(!header(name).is_empty(), "{name} is missing in {event}");
        }
        assert_eq!(header("ce-specversion"), "1.0");
        assert!(header("subject").starts_with("kiln.v1.events."), "{event}");
        seen.insert(header("ce-type"));
        if wanted.iter().all(|kind| seen.contains(*kind)) {
            break;
        }
    }
    subscriber.kill()?;
    subscriber.wait()?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_runs_from_the_commit_to_the_last_replaced_instance() -> Result<()> {
    let collector = Collector::start().await?;
    let site = Site::up_with("trace", &[&format!("otlp.endpoint={}", collector.endpoint())])?;
    let web = Web::apply(site, |_| Ok(()))?;
    let of = |fleet: &Fleet, release| -> BTreeSet<String> {
        fleet.instances.iter().filter(|i| i.release == release).map(|i| i.id.clone()).collect()
    };
    let old = of(&web.settled(1).await?, 1);
    web.say("two")?;
    let ids = of(&web.settled(2).await?, 2);
    assert_eq!((old.len(), ids.len()), (3, 3));

    until("all spans of one trace", Duration::from_secs(60), async || {
        let spans = collector.spans();
        let launches: Vec<_> =
            spans.iter().filter(|span| span.attributes.values().any(|value| ids.contains(value))).collect();
        let traces: BTreeSet<_> = launches.iter().map(|span| span.trace.clone()).collect();
        let [trace] = traces.iter().collect::<Vec<_>>()[..] else {
            return Err(format!("the instances {ids:?} are in the traces {traces:?}").into());
        };
        let services: BTreeSet<_> =
            spans.iter().filter(|span| &span.trace == trace).map(|span| span.service.clone()).collect();
        let told_of: BTreeSet<_> = spans
            .iter()
            .filter(|span| &span.trace == trace)
            .flat_map(|span| span.attributes.values())
            .collect();
        let missing: Vec<_> = ids.union(&old).filter(|id| !told_of.contains(id)).collect();
        if services.len() == 4 && missing.is_empty() {
            return Ok(());
        }
        Err(format!("the trace {trace} has {services:?}, and nothing of {missing:?}").into())
    })
    .await?;
    web.site.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_service_serves_metrics() -> Result<()> {
    let site = Site::up("metrics")?;
    let config = kiln_service::config::Site::load(site.home())?;
    let viewer = site.home().join("prometheus.pem");
    site.kiln(&["pki", "issue", "prometheus", "--out", &viewer.display().to_string()])?;
    for service in kiln_model::event::Service::ALL {
        let address = *config.metrics.get(&service).ok_or("an address for metrics")?;
        let get = |own: Option<&Path>| {
            let mut curl = Command::new("curl");
            curl.args(["--silent", "--fail", "--cacert"]).arg(config.paths().authority());
            curl.args(own.into_iter().flat_map(|path| ["--cert".as_ref(), path.as_os_str()]));
            run(curl.arg(format!("https://{address}/metrics")))
        };
        let answer = get(Some(&viewer))?;
        assert!(answer.contains("kiln_"), "{service}: {answer}");
        let refused = get(None).expect_err("whoever shows nothing is told nothing").to_string();
        // Where a site has no tokens, the handshake demands a certificate: what curl received was an alert.
        assert!(refused.contains("exit status: 56"), "{service}: {refused}");
    }
    site.down()
}
