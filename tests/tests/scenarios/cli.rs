//! Every command, as people and as programs see it: a table with a telling word, a document that parses, an exit code.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use kiln_api::engine::ListInstancesRequest;
use kiln_tests::Result;
use kiln_tests::archive::Archive;
use kiln_tests::command::{binary, both, run};
use kiln_tests::load::fetch;
use kiln_tests::repo::Repo;
use kiln_tests::wait::until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::packages::with_archive;
use kiln_tests::server::{SETTLES, Web};
use kiln_tests::site::Site;

/// As [`SETTLES`], in seconds: the first bake of a fresh machine is waited for here as well. Far shorter than what the
/// commands wait by themselves.
const PATIENCE: &str = "120";

/// Runs a command that succeeds in both of its forms, and gives the document; the table holds `word`.
fn shown(site: &Site, arguments: &[&str], word: &str) -> Result<Value> {
    let table = site.kiln(arguments)?;
    assert!(table.contains(word), "kiln {}: no {word:?} in\n{table}", arguments.join(" "));
    site.json(arguments)
}

/// Runs a command that fails in both of its forms with this exit code, and gives the document on standard error.
fn refused(site: &Site, arguments: &[&str], code: i32, reason: &str) -> Result<Value> {
    let name = arguments.join(" ");
    let output = site.try_kiln(arguments)?;
    assert_eq!(output.status.code(), Some(code), "kiln {name}: {}", both(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains("error: "), "kiln {name}: {}", both(&output));
    let output = site.try_kiln(&[&["-o", "json"], arguments].concat())?;
    assert_eq!(output.status.code(), Some(code), "kiln -o json {name}: {}", both(&output));
    error(&output, reason)
}

/// The document of an error.
fn error(output: &Output, reason: &str) -> Result<Value> {
    let text = String::from_utf8_lossy(&output.stderr);
    let document: Value =
        serde_json::from_str(text.trim()).map_err(|error| format!("{error} in:\n{text}"))?;
    assert_eq!(document["error"]["reason"], reason, "{document}");
    Ok(document["error"].clone())
}

fn items<'a>(document: &'a Value, list: &str) -> &'a [Value] {
    document[list].as_array().map(Vec::as_slice).unwrap_or_default()
}

async fn until_json(
    site: &Site,
    arguments: &[&str],
    what: &str,
    is_so: impl Fn(&Value) -> bool,
) -> Result<Value> {
    until(what, SETTLES, async || {
        let document = site.json(arguments)?;
        if is_so(&document) { Ok(document) } else { Err(document.to_string().into()) }
    })
    .await
}

/// A commit waits for approval, and new packages come in only where somebody reports that they are needed.
fn by_hand(repo: &Repo) -> Result<()> {
    let update = "update:\n  on: { definition: approve, packages: never }\n  debounce";
    repo.replace("web/server.yaml", "update:\n  debounce", update)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_server_in_every_command() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut archive = Archive::serve(folder.path())?;
    archive.add("greeting", "1.0", "/var/www/html/greeting.html", "Hello 1.0\n")?;
    let site = Site::up("cli")?;
    let report = shown(&site, &["doctor"], "This machine can run instances.")?;
    assert!(!items(&report, "findings").is_empty(), "{report}");
    assert_eq!(shown(&site, &["status"], "No servers yet.")?["servers"], serde_json::json!([]));

    let with_archive = with_archive(&archive);
    let web = Web::apply(site, |repo| {
        with_archive(repo)?;
        by_hand(repo)
    })?;
    let (site, url) = (&web.site, web.repo.url());
    let apply = ["apply", &url, "--branch", "main", "--wait", "--timeout", PATIENCE];
    let applied = site.json(&apply)?;
    assert_eq!(applied["servers"][0]["outcome"], "unchanged", "{applied}");
    assert_eq!((&applied["fleets"][0]["release"], &applied["fleets"][0]["healthy"]), (&1.into(), &3.into()));
    // A comment is another definition, and nothing that would be released.
    web.repo.replace("web/server.yaml", "name: web", "# The web.\nname: web")?;
    web.repo.commit("Say what it is")?;
    let applied = shown(site, &apply, "web r1 runs: 3 instances healthy")?;
    assert_eq!(applied["fleets"][0]["release"], 1, "{applied}");

    assert_eq!(shown(site, &["status", "web"], "web: stable")?["fleet"]["release"], 1);
    assert_eq!(shown(site, &["status"], "stable")?["servers"][0]["name"], "web");
    let listed = shown(site, &["instances", "web"], "healthy")?;
    let replaced = items(&listed, "instances")[0]["id"].as_str().ok_or("an id")?.to_owned();
    assert_eq!(items(&listed, "instances").len(), 3, "{listed}");
    assert_eq!(shown(site, &["plan", "web"], "web is up to date")?["needs_build"], false);
    assert_eq!(shown(site, &["build", "web", "--wait"], "web is up to date")?["unchanged"], true);
    let image = shown(site, &["image", "inspect", "web"], "nginx-light")?;
    assert_eq!(image["verified"], true, "{image}");
    what_nobody_needs_goes(site)?;
    let tar = folder.path().join("web.tar").display().to_string();
    let exported = shown(site, &["image", "export", "web", "--file", &tar], "is an OCI layout")?;
    assert_eq!(exported["bytes"].as_u64(), Some(std::fs::metadata(&tar)?.len()));

    // Reported: what nobody else would have noticed is built and deployed.
    archive.add("greeting", "1.1", "/var/www/html/greeting.html", "Hello 1.1\n")?;
    let plan = shown(site, &["plan", "web"], "greeting")?;
    assert_eq!((&plan["needs_build"], &plan["packages"][0]["to"]), (&true.into(), &"1.1".into()), "{plan}");
    let report = ["signal", "web", "greeting is too old", "--reporter", "scanner", "--id", "17"];
    let signal = shown(site, &report, "for web is ")?["id"].as_str().ok_or("an id")?.to_owned();
    web.settled(2).await?;
    assert!(fetch(web.address(), "/greeting.html").await?.contains("Hello 1.1"));
    let listed = shown(site, &["signal", "list", "web"], "reported")?;
    let reported = items(&listed, "signals").iter().filter(|it| it["cause"] == "reported").count();
    assert_eq!(reported, 1, "the same report is one signal: {listed}");
    let digits = signal.trim_start_matches("sha256:").get(..12).ok_or("digits")?.to_owned();
    let why = shown(site, &["why", &digits], "reported: greeting is too old")?;
    assert!(items(&why, "chain").iter().any(|link| link["id"] == "web-b2"), "{why}");

    // A commit waits for a person here.
    web.repo.replace(
        "web/server.yaml",
        "http: { port: 80, path: / }, interval",
        "tcp: { port: 80 }, interval",
    )?;
    web.say("three")?;
    let asks = |document: &Value| items(document, "signals").iter().any(|it| it["state"] == "waiting");
    let listed = until_json(site, &["signal", "list", "web"], "a signal that waits", asks).await?;
    let waits = items(&listed, "signals").iter().find(|it| it["state"] == "waiting").ok_or("a signal")?;
    let id = waits["id"].as_str().ok_or("an id")?;
    assert_eq!(site.json(&["signal", "approve", id])?["state"], "open");
    refused(site, &["signal", "approve", id], 4, "precondition")?;
    // Probed by tcp.
    web.settled(3).await?;
    let seen = shown(site, &["status", "web"], "r3")?;
    assert_eq!(seen["instances"][0]["health_policy"]["check"]["tcp"]["port"], 80, "{seen}");

    // By hand back to the last good one, then to one that is named.
    let back = site.json(&["rollback", "web", "--wait", "--timeout", PATIENCE])?;
    assert_eq!((&back["state"], &back["back_to"]), (&"rolled_back".into(), &2.into()), "{back}");
    assert_eq!(shown(site, &["why", "web-r2-back1"], "r3 -> r2")?["failures"], serde_json::json!([]));
    let to = ["rollback", "web", "--to", "r1", "--wait", "--timeout", PATIENCE];
    let told = site.kiln(&to)?;
    assert!(told.contains("web goes back from r2 to r1; r2 is quarantined"), "{told}");
    assert!(told.contains("web runs r1"), "{told}");
    refused(site, &to, 4, "precondition")?;
    assert_eq!(shown(site, &["why", "web-r1"], "r2 -> r1: rolled back")?["failures"], serde_json::json!([]));
    let why = shown(site, &["why", "web-r3"], "r3 is quarantined")?;
    assert!(!items(&why, "failures").is_empty(), "{why}");
    let told = site.kiln(&["plan", "web"])?;
    assert!(told.contains("applied last was rolled back"), "{told}");
    // What was convicted is not waited for.
    refused(site, &apply, 1, "quarantined")?;

    let why = shown(site, &["why", &replaced], "is retired")?;
    assert_eq!(why["failures"], serde_json::json!([]), "it was replaced, and has not failed: {why}");
    let why = shown(site, &["why", "web-b1"], "web-b1 succeeded")?;
    assert!(!items(&why, "chain").is_empty(), "{why}");
    let history = shown(site, &["history", "web", "-n", "0"], "rollout web-r2-back1")?;
    assert!(items(&history, "rollouts").len() >= 5, "{history}");
    let told = site.kiln(&["events", "--server", "web"])?;
    assert!(told.contains("rollout.rolled_back") && told.contains("web r3 -> r2"), "{told}");
    let events = site.lines(&["events", "--since", "1h"])?;
    assert!(events.iter().any(|event| event["type"] == "kiln.builder.build.succeeded.v1"));
    assert_eq!(site.lines(&["logs", "web-b1", "--tail", "2"])?.len(), 2);
    assert_eq!(site.kiln(&["logs", "web-b1", "--tail", "1"])?.lines().count(), 1);
    // nginx says nothing here.
    assert!(site.lines(&["logs", "web"])?.is_empty());

    let removed = shown(site, &["remove", "web", "--wait", "--timeout", PATIENCE], "nothing of it runs")?;
    assert_eq!(removed["retired"], true);
    assert_eq!(site.json(&["instances", "web"])?["instances"], serde_json::json!([]));
    web.site.down()
}

/// A file that no build has used for longer than the site says, and nothing else.
fn what_nobody_needs_goes(site: &Site) -> Result<()> {
    let stale = site.home().join("builder/files/stale");
    std::fs::write(&stale, "four")?;
    let long_ago = SystemTime::now() - Duration::from_secs(8 * 24 * 3600);
    std::fs::File::options().write(true).open(&stale)?.set_modified(long_ago)?;
    let of_files = |found: &Value| {
        let is_of_files = |it: &&Value| it["what"].as_str().is_some_and(|what| what.starts_with("files of"));
        let of_files = items(found, "collected").iter().find(is_of_files).cloned().unwrap_or_default();
        (of_files["count"].clone(), of_files["bytes"].clone())
    };
    let one = (Value::from(1), Value::from(4));
    assert_eq!(of_files(&shown(site, &["gc", "--dry-run"], "would be freed")?), one);
    assert!(stale.exists());
    assert_eq!(of_files(&site.json(&["gc"])?), one);
    assert!(!stale.exists());
    let nothing = (Value::from(0), Value::from(0));
    assert_eq!(of_files(&site.json(&["gc"])?), nothing);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unhealthy_instance_is_replaced_and_why_shows_what_was_seen_of_it() -> Result<()> {
    let web = Web::start(Site::up("sick")?).await?;
    let listed = web.site.engine().list_instances(ListInstancesRequest::default()).await?.into_inner();
    let sick = listed.instances.into_iter().find(|i| i.pid != 0).ok_or("one runs")?;
    let id = sick.spec.ok_or("a specification")?.id;
    // nginx's master does nothing in the end: its worker is who answers.
    let workers = run(Command::new("pgrep").args(["--parent", &sick.pid.to_string()]))?;
    for pid in workers.lines() {
        let pid = Pid::from_raw(pid.parse()?).ok_or("a process id")?;
        kill_process(pid, Signal::STOP)?;
    }
    let is_replaced = |document: &Value| {
        let left = items(document, "instances").iter().find(|it| it["id"] == id.as_str());
        left.is_some_and(|it| it["state"] == "retired")
    };
    until_json(&web.site, &["instances", "web", "--all"], "the replacement", is_replaced).await?;
    web.settled(1).await?;
    let why = shown(&web.site, &["why", &id], "probe failed")?;
    let failure = &items(&why, "failures")[0];
    assert!(items(failure, "last_checks").iter().any(|check| check["passed"] == false), "{why}");
    let listed = shown(&web.site, &["signal", "list", "web"], "unhealthy")?;
    let about = |it: &Value| it["cause"] == "unhealthy" && it["instance"] == id.as_str();
    assert!(items(&listed, "signals").iter().any(about), "{listed}");
    web.site.down()
}

/// A definition whose build does `step`, as a folder.
fn definition(folder: &Path, name: &str, step: &str) -> Result<String> {
    let path = folder.join(name);
    std::fs::create_dir_all(&path)?;
    let text = format!(
        "apiVersion: kiln/v1\nname: {name}\nimage:\n  from: {{ debian: bookworm }}\n  steps: [{{ run: {step} }}]\n  \
         command: [sleep, infinity]\nrun: {{ replicas: 1 }}\n"
    );
    std::fs::write(path.join("server.yaml"), text)?;
    Ok(path.display().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_work_says_so_with_its_exit_code() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let site = Site::up("refusals")?;
    let app = folder.path().join("app").display().to_string();
    assert!(site.kiln(&["init", &app])?.contains("wrote"));
    assert_eq!(shown(&site, &["lint", &app], "good (app)")?["problems"], 0);
    refused(&site, &["init", &app], 4, "exists")?;
    let other = folder.path().join("other").display().to_string();
    assert_eq!(items(&site.json(&["init", &other, "--name", "b7"])?, "files").len(), 3);
    for shell in ["bash", "zsh", "fish"] {
        let script = site.kiln(&["completions", shell])?;
        assert!(script.contains("rollback"), "{shell}");
        if shell == "bash" {
            run(Command::new("bash").args(["-n", "-c", &script]))?;
        }
    }

    let bad = definition(folder.path(), "bad", "\"true\", form: x")?;
    let output = site.try_kiln(&["-o", "json", "lint", &bad])?;
    assert_eq!(output.status.code(), Some(64), "{}", both(&output));
    let document: Value = serde_json::from_slice(&output.stdout)?;
    assert!(document["definitions"][0]["problems"][0]["line"].as_u64() > Some(0), "{document}");
    let fault = refused(&site, &["apply", &bad], 64, "definition")?;
    let place = &fault["violations"][0];
    assert!(place["line"].as_u64() > Some(0) && place["column"].as_u64() > Some(0), "{fault}");
    assert!(place["file"].as_str().is_some_and(|file| file.ends_with("server.yaml")), "{fault}");
    for arguments in [
        &["status", "nobody"][..],
        &["instances", "nobody"],
        &["logs", "nobody"],
        &["logs", "nobody-b1"],
        &["plan", "nobody"],
        &["build", "nobody"],
        &["build", "--cancel", "nobody-b1"],
        &["rollback", "nobody"],
        &["remove", "nobody"],
        &["history", "nobody"],
        &["why", "nobody"],
        &["why", "nobody-r1-0-a1"],
        &["image", "inspect", "nobody"],
        &["image", "tests", "nobody"],
        &["image", "tests", "nobody-b1"],
        &["signal", "nobody", "it is old"],
        &["signal", "approve", "00ff"],
        &["apply", "/nowhere"],
    ] {
        refused(&site, arguments, 3, "not_found")?;
    }

    // A build that fails, of a server that has no release.
    let broken = definition(folder.path(), "broken", "exit 7")?;
    let failed = refused(&site, &["apply", &broken, "--wait", "--timeout", PATIENCE], 1, "build_failed")?;
    assert!(failed["what_to_do"].as_str().is_some_and(|todo| todo.contains("kiln why broken-b")), "{failed}");
    assert_eq!(shown(&site, &["status", "broken"], "broken: failed")?["state"], "failed");
    assert_eq!(
        shown(&site, &["instances", "broken"], "No instances of broken.")?["instances"],
        Value::Array(vec![])
    );
    let why = shown(&site, &["why", "broken-b1"], "broken-b1 failed")?;
    assert!(!items(&why, "failures").is_empty(), "{why}");
    let output = site.try_kiln(&["build", "broken", "--wait"])?;
    assert_eq!(output.status.code(), Some(1), "{}", both(&output));

    // An image that does not pass its tests: what was wanted, what was found, and what the instance wrote.
    let text = std::fs::read_to_string(Path::new(&broken).join("server.yaml"))?
        .replace("run: exit 7", "run: \"true\"")
        .replace("command: [sleep, infinity]", "command: [sh, -c, \"echo awake; exec sleep infinity\"]\n  tests:\n    \
             - package: { name: bash }\n    - user: { name: root, shell: /bin/zsh }\n    - log: { contains: awake }");
    std::fs::write(Path::new(&broken).join("server.yaml"), text)?;
    let failed = refused(&site, &["apply", &broken, "--wait", "--timeout", PATIENCE], 1, "build_failed")?;
    let wanted = "test user root: the user root has shell /bin/bash, wanted /bin/zsh";
    assert!(failed["why"].as_str().is_some_and(|why| why.contains(wanted)), "{failed}");
    let junit = folder.path().join("tests.xml");
    let arguments = ["image", "tests", "broken", "--junit", &junit.display().to_string()];
    refused(&site, &arguments, 1, "failed")?;
    let output = site.try_kiln(&arguments)?;
    let table = String::from_utf8_lossy(&output.stdout);
    for part in ["package bash", "passed", "user root", "FAILED", "/bin/bash, wanted /bin/zsh", "log awake"] {
        assert!(table.contains(part), "no {part:?} in\n{table}");
    }
    let report = std::fs::read_to_string(&junit)?;
    for part in [r#"tests="3""#, r#"failures="1""#, r#"name="user root""#, "wanted /bin/zsh", "stdout: awake"]
    {
        assert!(report.contains(part), "no {part:?} in\n{report}");
    }

    // Superseded while it is waited for, cancelled, and given up. Its name is that of a build of nobody's.
    let slow = definition(folder.path(), "x-b7", "sleep 300")?;
    let mut waits = Command::new(binary("kiln")?);
    waits.arg("--home").arg(site.home()).args(["--site", "refusals", "-o", "json"]);
    let waits = waits.args(["apply", &slow, "--wait"]).stderr(std::process::Stdio::piped()).spawn()?;
    let runs = |document: &Value| document["last_build"]["state"] == "running";
    until_json(&site, &["status", "x-b7"], "the build", runs).await?;
    // Ctrl-C ends a wait, and nothing else.
    let mut interrupted = Command::new(binary("kiln")?);
    interrupted.arg("--home").arg(site.home()).args(["--site", "refusals", "apply", &slow, "--wait"]);
    let mut interrupted = interrupted.stderr(std::process::Stdio::piped()).spawn()?;
    let mut told = BufReader::new(interrupted.stderr.take().ok_or("stderr")?).lines();
    let waiting = told.by_ref().map_while(|line| line.ok()).any(|line| line.contains("building x-b7-b1"));
    assert!(waiting, "it says what it waits for");
    kill_process(Pid::from_child(&interrupted), Signal::INT)?;
    let rest: Vec<_> = told.map_while(|line| line.ok()).collect();
    assert_eq!(interrupted.wait()?.code(), Some(130), "{rest:?}");
    assert!(rest.join("\n").contains("it goes on without this command: kiln status x-b7"), "{rest:?}");

    let output = site.try_kiln(&["logs", "x-b7-b1"])?;
    assert!(output.status.success() && both(&output).contains("goes on"), "{}", both(&output));
    definition(folder.path(), "x-b7", "sleep 301")?;
    assert!(site.kiln(&["apply", &slow])?.contains("changed"));
    let superseded = waits.wait_with_output()?;
    assert_eq!(superseded.status.code(), Some(1), "{}", both(&superseded));
    error(&superseded, "superseded")?;
    assert_eq!(site.json(&["build", "--cancel", "x-b7-b1"])?["state"], "cancelled");
    refused(&site, &["logs", "x-b7"], 4, "no_release")?;
    shown(&site, &["remove", "x-b7", "--wait", "--timeout", PATIENCE], "is removed")?;

    // A service that stands still, then none at all.
    site.signal("builder", Signal::STOP)?;
    let output = site.try_kiln(&["-o", "json", "status", "nobody"])?;
    assert_eq!(output.status.code(), Some(5), "{}", both(&output));
    site.signal("builder", Signal::CONT)?;
    site.kiln(&["down", "--keep-instances"])?;
    for arguments in [&["status"][..], &["instances"], &["plan", "broken"], &["signal", "list"]] {
        refused(&site, arguments, 5, "unavailable")?;
    }
    refused(&site, &["events"], 5, "broker")?;
    site.down()
}
