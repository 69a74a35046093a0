//! SIGKILL of the node at whatever moment: the next one finishes or takes apart what was begun, and nothing is left over.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_api::engine::InstanceState;

use crate::site::{TestSite, free_port, get, id, local, request, spec};

/// Rounds of launch or retire with a kill at a moment that moves from its beginning to past its end.
const ROUNDS: u64 = 24;

#[tokio::test]
async fn a_launch_that_was_cut_off_is_taken_apart() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    site.serving(&image, 1000).await;
    let mut outcomes = BTreeSet::new();
    for round in 0..ROUNDS {
        let attempt = round + 1;
        let mut client = site.client();
        let launch = request(spec(&image, attempt));
        let call = tokio::spawn(async move { client.launch(launch).await });
        tokio::time::sleep(Duration::from_millis(round * 8)).await;
        site.kill_node();
        let answered = call.await.unwrap().ok();
        site.start_node();
        site.ready().await;
        let state = site.state(&id(attempt)).await;
        outcomes.insert(state.as_str_name());
        match state {
            // Killed before anything was recorded: as if it had never been asked for.
            InstanceState::Unspecified => assert!(answered.is_none()),
            InstanceState::Failed => assert!(answered.is_none()),
            InstanceState::Running => {}
            other => panic!("{other:?}"),
        }
        if state != InstanceState::Running {
            let left: Vec<_> = site
                .leftovers()
                .into_iter()
                .filter(|line| line.contains(&format!("{}.", id(attempt))) || line.ends_with(&id(attempt)))
                .collect();
            assert_eq!(left, Vec::<String>::new(), "round {round}");
        }
        site.retire(&id(attempt), Duration::ZERO).await.unwrap();
    }
    println!("launches ended as {outcomes:?}");
    assert!(outcomes.len() > 1, "every kill fell at the same point: {outcomes:?}");
    assert_eq!(site.state(&id(1000)).await, InstanceState::Running, "it was there all the time");
    assert_only(&site, &[&id(1000)]);
    site.purge();
}

#[tokio::test]
async fn a_retirement_that_was_cut_off_is_finished() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    site.serving(&image, 1000).await;
    site.route(port, &[&id(1000)]).await.unwrap();
    for round in 0..ROUNDS / 2 {
        let attempt = round + 1;
        site.serving(&image, attempt).await;
        site.route(port, &[&id(1000), &id(attempt)]).await.unwrap();
        site.route(port, &[&id(1000)]).await.unwrap();
        let retire = tokio::spawn(site.retire_by(site.client(), &id(attempt), Duration::from_secs(1)));
        tokio::time::sleep(Duration::from_millis(round * 25)).await;
        site.kill_node();
        let _ = retire.await.unwrap();
        assert!(get(local(port), "/").is_ok(), "users are served without a node");
        site.start_node();
        site.ready().await;
        if site.state(&id(attempt)).await == InstanceState::Running {
            // The kill came before it was recorded: whoever wanted it asks again.
            site.retire(&id(attempt), Duration::ZERO).await.unwrap();
        }
        site.wait_state(&id(attempt), InstanceState::Retired).await;
    }
    assert_only(&site, &[&id(1000)]);
    site.purge();
}

#[tokio::test]
async fn an_end_that_nobody_saw_is_found_at_boot() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    let one = site.serving(&image, 1).await;
    site.serving(&image, 2).await;
    site.route(port, &[&id(1), &id(2)]).await.unwrap();
    site.kill_node();
    let pid = rustix::process::Pid::from_raw(one.pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    site.start_node();
    site.ready().await;
    assert_eq!(site.state(&id(1)).await, InstanceState::Exited);
    let (instances, routes) = site.list().await;
    assert_eq!(instances[0].exit_code, Some(137), "conmon saw it");
    assert_eq!(routes[0].listeners[0].backends.len(), 1);
    for _ in 0..20 {
        assert_eq!(get(local(port), "/").unwrap(), format!("Hello from {}\n", id(2)));
    }
    assert_only(&site, &[&id(2)]);
    site.purge();
}

/// Groups and folders of these instances and no others; namespaces for them and the pool.
fn assert_only(site: &TestSite, ids: &[&str]) {
    let group = format!("kiln-{}/", site.site.id);
    let known = |line: &str| ids.iter().any(|id| line.contains(id));
    let tracked = std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten();
    for hierarchy in tracked.filter(|entry| entry.file_type().unwrap().is_dir()) {
        let Ok(groups) = std::fs::read_dir(hierarchy.path().join(&group)) else { continue };
        for group in groups.flatten().filter(|group| group.file_type().unwrap().is_dir()) {
            let name = group.file_name().to_string_lossy().into_owned();
            assert!(known(&name) || name == "helpers", "cgroup {name} is left over");
        }
    }
    for dir in ["instances", "runc"] {
        for entry in std::fs::read_dir(site.home.path().join("node").join(dir)).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            assert!(known(&name), "{dir}/{name} is left over");
        }
    }
    let left = site.leftovers();
    let count = |what: &str| left.iter().filter(|line| line.starts_with(what)).count();
    assert!(count("netns") <= ids.len() + 5, "{left:?}");
    assert_eq!(count("mount"), 0, "{left:?}");
}
