//! Users on the edge: while instances are replaced, when one is killed, and with the node dead.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_api::engine::{InstanceState, LaunchRequest, Listener, RouteRequest};
use kiln_service::client::Channel;
use kiln_service::requests::new_id;
use tonic::Code;

use crate::site::{TestSite, free_port, get, id, local, request, spec, wait_for};

/// Users that connect anew for each request, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    good: Arc<AtomicU64>,
    threads: Vec<std::thread::JoinHandle<Vec<(Instant, String)>>>,
}

impl Load {
    fn start(port: u16) -> Self {
        let (stop, good) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let user = || {
            let (stop, good) = (Arc::clone(&stop), Arc::clone(&good));
            move || {
                let mut failed = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    match get(local(port), "/") {
                        Ok(_) => {
                            good.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => failed.push((began, error.to_string())),
                    }
                }
                failed
            }
        };
        let threads = (0..4).map(|_| std::thread::spawn(user())).collect();
        Self { stop, good, threads }
    }

    /// How many requests went well, and when and why the others failed.
    fn end(self) -> (u64, Vec<(Instant, String)>) {
        self.stop.store(true, Ordering::Relaxed);
        let failed = self.threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        (self.good.load(Ordering::Relaxed), failed)
    }
}

#[tokio::test]
async fn no_request_fails_while_instances_are_replaced_and_the_node_dies() {
    let mut site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    site.serving(&image, 1).await;
    assert!(!site.route(port, &[&id(1)]).await.unwrap());
    assert!(site.route(port, &[&id(1)]).await.unwrap(), "it was so already");
    assert_eq!(
        site.retire(&id(1), Duration::from_secs(5)).await.unwrap_err().code(),
        Code::FailedPrecondition,
        "it is on the edge"
    );
    let load = Load::start(port);
    for attempt in 2..8 {
        site.serving(&image, attempt).await;
        site.route(port, &[&id(attempt)]).await.unwrap();
        site.retire(&id(attempt - 1), Duration::from_secs(5)).await.unwrap();
        if attempt % 3 == 0 {
            let before = load.good.load(Ordering::Relaxed);
            site.kill_node();
            let served = || load.good.load(Ordering::Relaxed) > before + 100;
            wait_for("users served without a node", served).await;
            site.start_node();
            site.ready().await;
            assert_eq!(site.state(&id(attempt)).await, InstanceState::Running);
        }
    }
    let (good, failed) = load.end();
    assert!(failed.is_empty(), "{} of {good}: {failed:?}", failed.len());
    assert!(good > 500, "{good}");
    site.purge();
}

#[tokio::test]
async fn a_connection_ends_where_it_began() {
    let site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    site.serving(&image, 1).await;
    site.route(port, &[&id(1)]).await.unwrap();
    let slow = std::thread::spawn(move || get(local(port), "/slow"));
    let own = site.list().await.0.remove(0).pid;
    wait_for("the slow request", || {
        let table = std::fs::read_to_string(format!("/proc/{own}/net/tcp")).unwrap();
        table.contains(":0050 ") && table.lines().any(|line| line.split_whitespace().nth(3) == Some("01"))
    })
    .await;
    site.serving(&image, 2).await;
    site.route(port, &[&id(2)]).await.unwrap();
    assert_eq!(get(local(port), "/").unwrap(), format!("Hello from {}\n", id(2)));
    site.retire(&id(1), Duration::from_secs(5)).await.unwrap();
    assert_eq!(slow.join().unwrap().unwrap(), format!("Hello from {}\n", id(1)));
}

/// After an instance was killed, new connections to it may fail for so long. At worst: a machine that is busy with other
/// tests gives the node its turn late.
const MOSTLY: Duration = Duration::from_millis(100);
const AT_WORST: Duration = Duration::from_millis(250);

#[tokio::test]
async fn a_killed_instance_leaves_the_edge_at_once() {
    let site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    let mut lasts = Vec::new();
    site.serving(&image, 1).await;
    let rolling = Arc::new(AtomicBool::new(true));
    let others = tokio::spawn(others_roll(site.client(), Arc::clone(&rolling)));
    for attempt in 2..20 {
        let victim = site.serving(&image, attempt).await;
        site.route(port, &[&id(1), &id(attempt)]).await.unwrap();
        let load = Load::start(port);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let pid = rustix::process::Pid::from_raw(victim.pid.try_into().unwrap()).unwrap();
        let killed = Instant::now();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        site.wait_state(&id(attempt), InstanceState::Exited).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (good, failed) = load.end();
        assert!(good > 50);
        let last =
            failed.iter().map(|(when, _)| when.saturating_duration_since(killed)).max().unwrap_or_default();
        println!("killed: {} failed, the last one began {last:?} after: {:?}", failed.len(), failed.last());
        lasts.push(last);
    }
    rolling.store(false, Ordering::Relaxed);
    assert!(others.await.unwrap() > 50, "the others rolled");
    lasts.sort();
    println!("the last failures began {lasts:?} after their instances were killed");
    assert!(lasts[lasts.len() / 2] < MOSTLY && lasts[lasts.len() - 1] < AT_WORST, "{lasts:?}");
    let (_, routes) = site.list().await;
    let own = routes.iter().find(|route| route.server == "web").unwrap();
    assert_eq!(own.listeners[0].backends.len(), 1, "the intent forgot it too");
}

/// Plans of other servers, one after the other, each for a port that has to be looked for on the whole machine; gives how
/// many.
async fn others_roll(mut client: EngineServiceClient<Channel>, rolling: Arc<AtomicBool>) -> u64 {
    let mut done = 0;
    while rolling.load(Ordering::Relaxed) {
        let listeners = vec![Listener { listen: free_port().into(), backends: vec![] }];
        let request = RouteRequest {
            request_id: new_id(),
            server: "db".to_owned(),
            generation: 1,
            listeners,
            traceparent: String::new(),
        };
        // The port may be somebody's by chance.
        done += u64::from(client.route(request).await.is_ok());
    }
    done
}

#[tokio::test]
async fn users_come_from_everywhere_and_are_shared_out() {
    let site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    for attempt in 1..4 {
        site.serving(&image, attempt).await;
    }
    site.route(port, &[&id(1), &id(2), &id(3)]).await.unwrap();
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..150 {
        *seen.entry(get(local(port), "/").unwrap()).or_insert(0) += 1;
    }
    assert_eq!(seen.len(), 3, "{seen:?}");
    assert!(seen.values().all(|count| *count > 20), "{seen:?}");

    // From a namespace beside, to the machine's address there; and from an instance, through the edge to a fellow.
    let own = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let own = own.local_addr().map(|address| (address.port(), own)).unwrap();
    let beside = Beside::make(&site.site.id.to_string());
    // A new link takes a moment to carry anything at all.
    wait_for("the link", || beside.connects(own.0)).await;
    let answer = beside.get(port);
    assert!(answer.contains("Hello from web-r1-0-a"), "{answer}");
    let gateway = site.site.subnet.host(1);
    // As often as it takes to be sent to itself too.
    for _ in 0..12 {
        let through = site.command(&id(1), &format!("connect {gateway} {port}"), "connect: done").await;
        assert!(through.passed, "{}", through.detail);
    }
    // Not the machine's own services, nor the instances themselves from outside.
    let refused = site.command(&id(1), &format!("connect {gateway} {}", own.0), "connect: done").await;
    assert!(!refused.passed);
    let (instances, _) = site.list().await;
    assert!(!beside.reaches(&instances[0].address, 80), "instances are reached through the edge only");

    // Nor by the machine's IPv6, which the table knows nothing of: it has none there.
    let ipv6 = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", site.site.bridge);
    assert!(std::fs::read_to_string(ipv6).is_ok_and(|off| off.trim() == "1"));

    site.route(port, &[]).await.unwrap();
    assert!(get(local(port), "/").is_err());
}

#[tokio::test]
async fn a_port_that_others_hold_is_refused() {
    let (one, two) = (TestSite::start().await, TestSite::start().await);
    let port = free_port();
    for site in [&one, &two] {
        let image = site.server_image();
        site.serving(&image, 1).await;
    }
    let held = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = one.route(held.local_addr().unwrap().port(), &[&id(1)]).await.unwrap_err();
    assert!(refused.message().contains(&format!("process {}", std::process::id())), "{refused}");
    one.route(port, &[&id(1)]).await.unwrap();
    let refused = two.route(port, &[&id(1)]).await.unwrap_err();
    assert!(refused.message().contains("another site"), "{refused}");

    // Two sites side by side: one goes, the other stays.
    let (mut one, mut two) = (one, two);
    two.purge();
    assert!(get(local(port), "/").is_ok());
    one.purge();
}

#[tokio::test]
async fn a_flushed_table_comes_back() {
    let site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    site.serving(&image, 1).await;
    site.route(port, &[&id(1)]).await.unwrap();
    let table = format!("kiln_{}", site.site.id);
    assert!(Command::new("nft").args(["delete", "table", "ip", &table]).status().unwrap().success());
    assert!(get(local(port), "/").is_err());
    wait_for("the edge again", || get(local(port), "/").is_ok()).await;
}

#[tokio::test]
async fn a_change_finds_that_the_table_was_flushed() {
    let site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    for attempt in 1..4 {
        site.serving(&image, attempt).await;
    }
    site.route(port, &[&id(1), &id(2), &id(3)]).await.unwrap();
    let table = format!("kiln_{}", site.site.id);
    let nft = |words: &[&str]| assert!(Command::new("nft").args(words).status().unwrap().success());
    nft(&["flush", "map", "ip", &table, "be"]);
    site.route(port, &[&id(1), &id(2)]).await.unwrap();
    assert!(get(local(port), "/").is_ok());
    nft(&["delete", "table", "ip", &table]);
    let two = site.list().await.0.remove(1).pid;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(two.try_into().unwrap()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    site.wait_state(&id(2), InstanceState::Exited).await;
    assert_eq!(get(local(port), "/").unwrap(), format!("Hello from {}\n", id(1)));
}

#[tokio::test]
async fn an_instance_that_has_just_ended_is_not_put_back() {
    let site = TestSite::start().await;
    let image = site.server_image();
    let port = free_port();
    site.serving(&image, 1).await;
    for attempt in 2..6 {
        let victim = site.serving(&image, attempt).await;
        site.route(port, &[&id(1), &id(attempt)]).await.unwrap();
        let pid = rustix::process::Pid::from_raw(victim.pid.try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        // A plan that knows nothing of it, again and again.
        let until = Instant::now() + Duration::from_secs(20);
        let refused = loop {
            match site.route(port, &[&id(1), &id(attempt)]).await {
                Ok(_) => assert!(Instant::now() < until, "{} is routed to for ever", id(attempt)),
                Err(refused) => break refused,
            }
        };
        // It passes by itself until the end is on record, and does not after that.
        assert!([Code::Aborted, Code::FailedPrecondition].contains(&refused.code()), "{refused}");
        site.wait_state(&id(attempt), InstanceState::Exited).await;
        let refused = site.route(port, &[&id(1), &id(attempt)]).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        for _ in 0..20 {
            assert_eq!(get(local(port), "/").unwrap(), format!("Hello from {}\n", id(1)));
        }
    }
}

/// A network namespace beside the machine, as another computer would be.
struct Beside {
    name: String,
    gateway: String,
}

impl Beside {
    fn make(id: &str) -> Self {
        // The link's own network, by the site's id: 169.254.x.y.
        let bytes = u16::from_str_radix(&id[4..8], 16).unwrap().to_be_bytes();
        let base = format!("169.254.{}.{}", bytes[0].clamp(1, 254), bytes[1] & 0xFC);
        let [gateway, own] = [1, 2].map(|n| {
            let (start, last) = base.rsplit_once('.').unwrap();
            format!("{start}.{}", last.parse::<u8>().unwrap() + n)
        });
        let name = format!("beside-{id}");
        let host = format!("b{id}");
        for words in [
            format!("netns add {name}"),
            format!("link add {host} type veth peer name eth0 netns {name}"),
            format!("addr add {gateway}/30 dev {host}"),
            format!("link set {host} up"),
            format!("-n {name} addr add {own}/30 dev eth0"),
            format!("-n {name} link set eth0 up"),
            format!("-n {name} route add default via {gateway}"),
        ] {
            assert!(Command::new("ip").args(words.split(' ')).status().unwrap().success(), "ip {words}");
        }
        Self { name, gateway }
    }

    fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let path = format!("/run/netns/{}", self.name);
        let inside = move || {
            let namespace = std::fs::File::open(path).unwrap();
            let kind = rustix::thread::LinkNameSpaceType::Network;
            rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&namespace), Some(kind))
                .unwrap();
            work()
        };
        std::thread::spawn(inside).join().unwrap()
    }

    fn get(&self, port: u16) -> String {
        let address = SocketAddr::new(self.gateway.parse().unwrap(), port);
        self.inside(move || get(address, "/")).unwrap()
    }

    fn connects(&self, port: u16) -> bool {
        let address = SocketAddr::new(self.gateway.parse().unwrap(), port);
        self.inside(move || TcpStream::connect_timeout(&address, Duration::from_secs(1))).is_ok()
    }

    fn reaches(&self, address: &str, port: u16) -> bool {
        let address = SocketAddr::new(address.parse().unwrap(), port);
        self.inside(move || get(address, "/")).is_ok()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

#[tokio::test]
async fn an_instance_that_does_not_run_can_t_be_routed_to() {
    let site = TestSite::start().await;
    let image = site.image("root", &["/bin/server", "fail"]);
    let refused = site.route(free_port(), &[&id(1)]).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    site.launch(request(spec(&image, 1))).await.unwrap();
    site.wait_state(&id(1), InstanceState::Exited).await;
    let refused = site.route(free_port(), &[&id(1)]).await.unwrap_err();
    assert!(refused.message().contains("exited"), "{refused}");
}

#[tokio::test]
async fn a_route_that_is_asked_for_again_answers_as_the_first_time() {
    let site = TestSite::start().await;
    let request = |request_id: &str, generation| RouteRequest {
        request_id: request_id.to_owned(),
        server: "web".to_owned(),
        generation,
        listeners: vec![Listener { listen: 29_999, backends: vec![] }],
        traceparent: String::new(),
    };
    for (call, unchanged) in [
        (request("first", 1), false),
        (request("first", 1), false),
        (request("second", 1), true),
        (request("second", 1), true),
        (request("third", 2), true),
        (request("third", 2), true),
    ] {
        let answer = site.client().route(call.clone()).await.unwrap().into_inner();
        assert_eq!(answer.unchanged, unchanged, "{call:?}");
    }
    for bad in ["", "a b"] {
        let refused = site.client().route(request(bad, 3)).await.unwrap_err();
        assert!(
            refused.code() == Code::InvalidArgument && refused.message().contains("request_id"),
            "{refused}"
        );
        let launch = crate::site::request(spec("sha256:00", 1));
        let launch = LaunchRequest { request_id: bad.to_owned(), ..launch };
        let refused = site.launch(launch).await.unwrap_err();
        assert!(
            refused.code() == Code::InvalidArgument && refused.message().contains("request_id"),
            "{refused}"
        );
    }
}

/// A site under load was taken down whole: nobody answered its users, and the kernel goes on to send them there.
#[tokio::test]
async fn what_an_edge_before_left_leads_nobody_astray() {
    let site = TestSite::start().await;
    let image = site.server_image();
    let (port, astray) = (free_port(), free_port());
    let conntrack = |arguments: &str, port: u16| {
        let words = arguments.replace("PORT", &port.to_string());
        Command::new("conntrack").args(words.split(' ')).output().unwrap()
    };
    let left = |port| {
        let made = conntrack(
            "-I -p tcp --state SYN_SENT -t 120 -s 127.0.0.1 -d 127.0.0.1 --sport 4000 --dport PORT --dst-nat 10.95.255.9:80",
            port,
        );
        assert!(made.status.success(), "{made:?}");
    };
    let is_there =
        |port| !conntrack("-L -p tcp --orig-port-dst PORT --state SYN_SENT", port).stdout.is_empty();
    left(port);
    left(astray);
    site.serving(&image, 1).await;
    assert!(is_there(port));
    site.route(port, &[&id(1)]).await.unwrap();
    assert!(!is_there(port), "a user with that port would be sent to 10.95.255.9");
    assert!(is_there(astray), "it is not the edge's");
    conntrack("-D -p tcp --orig-port-dst PORT", astray);
}
