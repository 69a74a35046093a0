//! SIGKILL of the node at whatever moment: the next one finishes or takes apart what was begun, and nothing is left over.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_api::engine::InstanceState;

use crate::site::{TestSite, free_port, get, id, local, request, spec, wait_for};

/// Rounds of launch or retire with a kill at a moment that moves from its beginning to past its end.
const ROUNDS: u64 = 24;

/// Whether the launch was answered by a node that is killed so many milliseconds after it was asked; the next one is there.
async fn launch_and_kill(site: &mut TestSite, image: &str, attempt: u64, after: u64) -> bool {
    let mut client = site.client();
    let launch = request(spec(image, attempt));
    let call = tokio::spawn(async move { client.launch(launch).await });
    tokio::time::sleep(Duration::from_millis(after)).await;
    site.kill_node();
    let answered = call.await.unwrap().is_ok();
    site.start_node();
    site.ready().await;
    answered
}

#[tokio::test]
async fn a_launch_that_was_cut_off_is_taken_apart() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    site.serving(&image, 1000).await;
    let mut outcomes = BTreeSet::new();
    for round in 0..ROUNDS {
        let attempt = round + 1;
        let answered = launch_and_kill(&mut site, &image, attempt, round * 8).await;
        let state = site.settled(&id(attempt)).await;
        outcomes.insert(state.as_str_name());
        match state {
            // Killed before anything was recorded: as if it had never been asked for.
            InstanceState::Unspecified => assert!(!answered),
            InstanceState::Failed => assert!(!answered),
            InstanceState::Running => {}
            other => panic!("{other:?}"),
        }
        if state != InstanceState::Running {
            let of_it =
                |line: &String| line.contains(&format!("{}.", id(attempt))) || line.ends_with(&id(attempt));
            wait_for("the end of what was half-made", || !site.leftovers().iter().any(of_it)).await;
        }
        site.retire(&id(attempt), Duration::ZERO).await.unwrap();
    }
    println!("launches ended as {outcomes:?}");
    assert!(outcomes.len() > 1, "every kill fell at the same point: {outcomes:?}");
    assert_eq!(site.state(&id(1000)).await, InstanceState::Running, "it was there all the time");
    assert_only(&site, &[&id(1000)]).await;
    site.purge();
}

/// Before the next node has looked at what was begun: a builder and a deployer that came up sooner ask at once.
#[tokio::test]
async fn a_launch_that_was_cut_off_is_retired_as_soon_as_the_next_node_answers() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    site.serving(&image, 1000).await;
    let mut states = BTreeSet::new();
    for attempt in 1..=ROUNDS / 2 {
        launch_and_kill(&mut site, &image, attempt, attempt * 16).await;
        states.insert(site.state(&id(attempt)).await.as_str_name());
        site.retire(&id(attempt), Duration::ZERO).await.unwrap();
    }
    let launching = InstanceState::Launching.as_str_name();
    assert!(states.contains(launching), "no kill fell into a launch: {states:?}");
    assert_only(&site, &[&id(1000)]).await;
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
    assert_only(&site, &[&id(1000)]).await;
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
    for _ in 0..20 {
        assert_eq!(get(local(port), "/").unwrap(), format!("Hello from {}\n", id(2)), "before it serves");
    }
    site.wait_state(&id(1), InstanceState::Exited).await;
    let (instances, routes) = site.list().await;
    assert_eq!(instances[0].exit_code, Some(137), "conmon saw it");
    assert!(instances[0].cut_off, "what ended the node may have ended it");
    assert_eq!(routes[0].listeners[0].backends.len(), 1);
    let folder = site.home.path().join("node/instances").join(id(1));
    wait_for("the end of what it had", || !folder.exists()).await;
    assert_only(&site, &[&id(2)]).await;
    site.purge();
}

#[tokio::test]
async fn a_route_that_was_cut_off_is_either_old_or_new() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    for attempt in [1, 2] {
        site.serving(&image, attempt).await;
    }
    site.route(port, &[&id(1)]).await.unwrap();
    let mut outcomes = BTreeSet::new();
    for round in 0..ROUNDS {
        let (old, new) = if round % 2 == 0 { (1, 2) } else { (2, 1) };
        site.route(port, &[&id(old)]).await.unwrap();
        let route = tokio::spawn(site.route_by(site.client(), port, &[&id(new)]));
        tokio::time::sleep(Duration::from_millis(round)).await;
        site.kill_node();
        let answered = route.await.unwrap().is_ok();
        assert!(get(local(port), "/").is_ok(), "users are served without a node");
        site.start_node();
        site.ready().await;
        let (_, routes) = site.list().await;
        let [backend] = routes[0].listeners[0].backends.as_slice() else { panic!("{routes:?}") };
        assert!(backend.instance == id(new) || !answered && backend.instance == id(old), "{routes:?}");
        for _ in 0..10 {
            assert_eq!(get(local(port), "/").unwrap(), format!("Hello from {}\n", backend.instance));
        }
        outcomes.insert((answered, backend.instance == id(new)));
    }
    println!("routes ended as {outcomes:?}");
    assert!(outcomes.len() > 1, "every kill fell at the same point: {outcomes:?}");
    assert_only(&site, &[&id(1), &id(2)]).await;
    site.purge();
}

#[tokio::test]
async fn what_can_not_be_cleared_away_yet_is_cleared_away_later() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    let one = site.serving(&image, 1).await;
    site.serving(&image, 2).await;
    site.route(port, &[&id(1), &id(2)]).await.unwrap();
    let leases = site.home.path().join(format!("node/cni/kiln-{}", site.site.id));
    let lease = leases.join(&one.address);
    let holder = std::fs::read_to_string(&lease).unwrap().lines().next().unwrap().to_owned();
    // No address can be given out or back.
    let lock = leases.join("lock");
    let break_leases = || {
        std::fs::remove_file(&lock).unwrap();
        std::fs::create_dir(&lock).unwrap();
    };
    break_leases();
    let pid = rustix::process::Pid::from_raw(one.pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    site.wait_state(&id(1), InstanceState::Exited).await;
    wait_for("a clean-up that failed", || site.log().contains("its end could not be seen to")).await;
    assert!(lease.exists());
    // Its record is all that the next node has of it, and it serves before it has mended anything.
    site.kill_node();
    site.start_node();
    site.ready().await;
    assert_eq!(get(local(port), "/").unwrap(), format!("Hello from {}\n", id(2)));
    assert!(lease.exists());
    std::fs::remove_dir(&lock).unwrap();
    let left = || lease.exists() || site.leftovers().iter().any(|line| line.contains(&holder));
    wait_for("the end of its namespace and address", || !left()).await;
    assert_only(&site, &[&id(2)]).await;
    site.retire(&id(1), Duration::ZERO).await.unwrap();
    site.purge();
}

/// Groups and folders of these instances and no others; namespaces for them and the pool.
async fn assert_only(site: &TestSite, ids: &[&str]) {
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
    let count = |what: &str| site.leftovers().iter().filter(|line| line.starts_with(what)).count();
    // An earlier node's pool goes while the next one serves.
    wait_for("the end of earlier pools", || count("netns") <= ids.len() + 5).await;
    assert_eq!(count("mount"), 0, "{:?}", site.leftovers());
}
