//! Every user of the broker tries what it may not do, and does what it may, at a real nats-server with the configuration
//! that `kiln up` writes.

mod tls;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kiln_bus::{Bus as _, Handled, Handler, NatsBus, Report, ReportHandler, User, interests};
use kiln_model::digest::Digest;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use tokio::sync::{mpsc, watch};
use wire::Broker;

const STREAMS: [&str; 3] = ["KILN_HOME", "KILN_IN_HOME", "KILN_DEAD_HOME"];
const SERVICES: [&str; 4] = ["builder", "deployer", "monitor", "node"];
const LONG: Duration = Duration::from_secs(30);

/// What there is to be tried, by each of the users.
fn subjects() -> Vec<String> {
    let mut all: Vec<String> = [
        "kiln.in.v1.home.report",
        "kiln.v1.home.console.page.seen._",
        "kiln.v1.home.x",
        "$SYS.REQ.SERVER.PING",
        "$SYS.REQ.ACCOUNT.PING.CONNZ",
        "$SYS.REQ.USER.INFO",
        "$JS.API.INFO",
        "$JS.API.STREAM.LIST",
        "$JS.API.STREAM.NAMES",
        "$JS.API.META.LEADER.STEPDOWN",
        "$JS.API.SERVER.REMOVE",
        "$JS.API.ACCOUNT.PURGE.KILN_HOME",
        "_R_.x.y",
        "free.for.all",
    ]
    .map(str::to_owned)
    .into();
    for user in User::ALL {
        all.push(format!("_INBOX.{user}.x"));
        all.push(format!("kiln.v1.home.{user}.build.succeeded.web"));
        all.push(format!("kiln.v1.other.{user}.build.succeeded.web"));
        all.push(format!("kiln.dead.v1.home.{user}.builder.build.failed.web"));
    }
    for api in ["$JS.API", "kiln.api"] {
        for stream in STREAMS {
            let calls = [
                "STREAM.CREATE",
                "STREAM.UPDATE",
                "STREAM.INFO",
                "STREAM.DELETE",
                "STREAM.PURGE",
                "STREAM.SNAPSHOT",
                "STREAM.RESTORE",
                "STREAM.MSG.GET",
                "STREAM.MSG.DELETE",
                "STREAM.LEADER.STEPDOWN",
                "STREAM.PEER.REMOVE",
                "DIRECT.GET",
                "CONSUMER.CREATE",
                "CONSUMER.LIST",
                "CONSUMER.NAMES",
            ];
            all.extend(calls.map(|call| format!("{api}.{call}.{stream}")));
            for consumer in SERVICES.iter().chain(&["mine"]) {
                let calls = ["CREATE", "DURABLE.CREATE", "DELETE", "INFO", "MSG.NEXT", "PAUSE", "UNPIN"];
                all.extend(calls.map(|call| format!("{api}.CONSUMER.{call}.{stream}.{consumer}")));
                all.push(format!("{api}.CONSUMER.CREATE.{stream}.{consumer}.kiln.v1.home.x"));
                all.push(format!("$JS.ACK.{stream}.{consumer}.1.1.1.1.0"));
            }
        }
    }
    all.sort();
    all.dedup();
    all
}

/// Whether a user may publish there, said a second time and in other words than where the rules are made.
fn may_publish(user: User, subject: &str) -> bool {
    let own = |prefix: &str| subject.starts_with(&format!("{prefix}.{user}."));
    let reads = |stream: &str| {
        let calls = [
            format!("kiln.api.STREAM.INFO.{stream}"),
            format!("kiln.api.CONSUMER.INFO.{stream}.{user}"),
            format!("kiln.api.CONSUMER.MSG.NEXT.{stream}.{user}"),
            format!("$JS.ACK.{stream}.{user}.1.1.1.1.0"),
        ];
        calls.iter().any(|call| call == subject)
    };
    match user {
        User::Node => own("kiln.v1.home"),
        User::Builder | User::Deployer => {
            own("kiln.v1.home") || own("kiln.dead.v1.home") || reads("KILN_HOME")
        }
        User::Monitor => {
            own("kiln.v1.home") || own("kiln.dead.v1.home") || reads("KILN_HOME") || reads("KILN_IN_HOME")
        }
        User::Cli => [
            "_INBOX.cli.x",
            "kiln.in.v1.home.report",
            "$JS.API.STREAM.INFO.KILN_HOME",
            "$JS.API.STREAM.MSG.GET.KILN_HOME",
        ]
        .contains(&subject),
        User::Reader => subject == "_INBOX.reader.x",
        User::Admin => {
            let stream = ["CREATE", "UPDATE", "INFO"].iter().any(|verb| {
                STREAMS.iter().any(|stream| subject == format!("$JS.API.STREAM.{verb}.{stream}"))
            });
            let consumers =
                ["KILN_HOME.builder", "KILN_HOME.deployer", "KILN_HOME.monitor", "KILN_IN_HOME.monitor"];
            stream
                || consumers.iter().any(|consumer| {
                    let create = format!("$JS.API.CONSUMER.CREATE.{consumer}");
                    subject == create || subject == format!("{create}.kiln.v1.home.x")
                })
        }
    }
}

#[test]
fn no_user_may_publish_anything_but_its_own() {
    let broker = Broker::start();
    for user in User::ALL {
        let mut wire = broker.wire(user);
        for subject in subjects() {
            let told = wire.publish(&subject, "", "");
            let refused = told.iter().any(|it| it.contains("Permissions Violation") && it.contains(&subject));
            assert_eq!(!refused, may_publish(user, &subject), "{user} to {subject}: {told:?}");
        }
    }
}

#[test]
fn no_user_may_listen_where_another_is_answered() {
    let broker = Broker::start();
    let own = User::ALL.map(|user| format!("_INBOX.{user}.>"));
    let others = [
        ">",
        "*",
        "*.>",
        "_INBOX.>",
        "_INBOX.*.>",
        "_R_.>",
        "$SYS.>",
        "$JS.>",
        "$JS.ACK.>",
        "$JS.API.>",
        "$JS.EVENT.>",
        "kiln.>",
        "kiln.api.>",
        "kiln.v1.>",
        "kiln.v1.*.builder.>",
        "kiln.v1.other.>",
        "kiln.v1.home.>",
        "kiln.v1.home.builder.>",
        "kiln.in.v1.home.>",
        "kiln.dead.v1.home.>",
    ];
    for user in User::ALL {
        let mut wire = broker.wire(user);
        for subject in own.iter().map(String::as_str).chain(others) {
            let may = subject == format!("_INBOX.{user}.>")
                || (matches!(user, User::Cli | User::Reader) && subject.starts_with("kiln.v1.home."))
                || (user == User::Cli && subject == "kiln.dead.v1.home.>");
            for words in [format!("SUB {subject} 1\r\n"), format!("SUB {subject} queue 1\r\n")] {
                let told = wire.say(&format!("{words}UNSUB 1\r\n"));
                let refused = told.iter().any(|it| it.contains("Permissions Violation"));
                assert_eq!(!refused, may, "{user}: {words}{told:?}");
            }
        }
    }
}

#[test]
fn nobody_gets_in_without_a_key_of_the_site() {
    let broker = Broker::start();
    for key in [None, Some(nkeys::KeyPair::new_user())] {
        let (mut wire, told) = broker.open(key.as_ref());
        assert!(told.iter().any(|it| it.contains("Authorization Violation")), "{told:?}");
        wire.publish("kiln.v1.home.builder.build.succeeded.web", "", "x");
        assert_eq!(wire.heard, [""; 0]);
    }
}

/// As much as the broker's own default would keep for one listener.
#[test]
fn a_listener_that_takes_nothing_is_cut_off_before_it_fills_the_memory() {
    const SENT: usize = 48;
    let broker = Broker::start();
    let (mut listener, mut attentive) = (broker.wire(User::Reader), broker.wire(User::Reader));
    for wire in [&mut listener, &mut attentive] {
        assert_eq!(wire.say("SUB kiln.v1.home.> 1\r\n"), [""; 0]);
    }
    let mut builder = broker.wire(User::Builder);
    let payload = "x".repeat(1 << 20);
    for sent in 1..=SENT {
        assert_eq!(builder.publish("kiln.v1.home.builder.build.succeeded.web", "", &payload), [""; 0]);
        while attentive.heard.len() < sent {
            attentive.say("");
        }
    }
    // What the kernel holds for it arrives yet.
    listener.rest();
    assert!(listener.heard.len() < SENT, "all {SENT} MiB were kept for it");
}

/// A question names the subject of its answer, and a broker asks nobody whether that may be published to.
#[tokio::test]
async fn no_answer_can_be_had_stored_as_anothers_event() {
    let broker = Broker::start();
    NatsBus::ensure_streams(broker.site.nats(User::Admin).unwrap()).await.unwrap();
    let mut reader = broker.wire(User::Reader);
    assert_eq!(reader.say("SUB kiln.v1.home.> 1\r\n"), [""; 0]);
    let mut victims = [User::Monitor, User::Cli, User::Admin].map(|user| broker.wire(user));
    for (victim, user) in victims.iter_mut().zip(["monitor", "cli", "admin"]) {
        assert_eq!(victim.say(&format!("SUB _INBOX.{user}.x 1\r\n")), [""; 0]);
    }
    // What the builder is to be given, so that there is something to be sent astray.
    let monitor = NatsBus::connect(broker.site.nats(User::Monitor).unwrap()).await.unwrap();
    let forged = [
        "kiln.v1.home.deployer.rollout.succeeded.web",
        "kiln.in.v1.home.report",
        "kiln.dead.v1.home.deployer.x",
        "_INBOX.monitor.x",
        "_INBOX.cli.x",
        "_INBOX.admin.x",
        "$JS.API.STREAM.DELETE.KILN_DEAD_HOME",
        "$JS.API.STREAM.UPDATE.KILN_DEAD_HOME",
    ];
    let mut builder = broker.wire(User::Builder);
    for (sequence, reply) in (1..).zip(forged) {
        monitor.publish(&event(Service::Monitor, "server", sequence)).await.unwrap();
        let next = "kiln.api.CONSUMER.MSG.NEXT.KILN_HOME.builder";
        let asked = r#"{"batch":1,"no_wait":true}"#;
        assert_eq!(builder.publish(next, reply, asked), [""; 0]);
        assert_eq!(builder.publish("kiln.api.STREAM.INFO.KILN_HOME", reply, ""), [""; 0]);
        assert_eq!(builder.publish("kiln.v1.home.builder.build.started.web", reply, "x"), [""; 0]);
    }
    // Answers come by and by. The last of what was asked is answered, and so is all before it.
    builder.say("SUB _INBOX.builder.> 1\r\n");
    builder.publish("kiln.api.STREAM.INFO.KILN_HOME", "_INBOX.builder.end", "");
    let begin = Instant::now();
    while builder.heard.is_empty() {
        assert!(begin.elapsed() < LONG);
        builder.say("");
    }
    reader.say("");
    let count = forged.len();
    let from = |service: &str| {
        reader.heard.iter().filter(|it| it.starts_with(&format!("kiln.v1.home.{service}."))).count()
    };
    assert_eq!(
        (from("monitor"), from("builder"), reader.heard.len()),
        (count, count, 2 * count),
        "{:?}",
        reader.heard
    );
    for victim in &mut victims {
        victim.say("");
        assert_eq!(victim.heard, [""; 0]);
    }
    // All three streams are there, and as they were made.
    let cli = NatsBus::connect(broker.site.nats(User::Cli).unwrap()).await.unwrap();
    assert_eq!(cli.past(jiff::Timestamp::UNIX_EPOCH).await.unwrap().len(), 2 * count);
    NatsBus::ensure_streams(broker.site.nats(User::Admin).unwrap()).await.unwrap();
}

fn event(service: Service, entity: &'static str, sequence: u64) -> Event {
    let event = NewEvent {
        kind: EventType::new(service, entity, "changed"),
        server: Some("web".parse().unwrap()),
        aggregate_kind: entity.to_owned(),
        aggregate_id: "web".to_owned(),
        aggregate_version: sequence,
        payload: format!("{service} {entity} {sequence}").into_bytes(),
        time: "2026-01-02T03:04:05Z".parse().unwrap(),
        traceparent: String::new(),
    };
    Event { id: Digest::of(&event.payload), sequence, epoch: "epoch".to_owned(), event }
}

struct Tells(mpsc::UnboundedSender<Vec<u8>>);

#[async_trait]
impl Handler for Tells {
    async fn handle(&self, event: &Event, _: u64) -> Handled {
        self.0.send(event.event.payload.clone()).unwrap();
        Handled::Done
    }
}

#[async_trait]
impl ReportHandler for Tells {
    async fn handle(&self, report: &Report, _: u64) -> Handled {
        self.0.send(report.payload.clone()).unwrap();
        Handled::Done
    }
}

#[tokio::test]
async fn every_user_can_do_its_work() {
    let broker = Broker::start();
    let bus = async |user: User| NatsBus::connect(broker.site.nats(user).unwrap()).await.unwrap();
    NatsBus::ensure_streams(broker.site.nats(User::Admin).unwrap()).await.unwrap();
    let users = [
        (Service::Builder, bus(User::Builder).await),
        (Service::Deployer, bus(User::Deployer).await),
        (Service::Monitor, bus(User::Monitor).await),
    ];
    let (cli, reader) = (bus(User::Cli).await, bus(User::Reader).await);
    let (mut by_cli, mut by_reader) = (cli.follow().await.unwrap(), reader.follow().await.unwrap());
    let (stop, stopped) = watch::channel(false);
    let mut expected = Vec::new();
    // One after the other, before anybody consumes: of the first two questions that reach a fresh broker from other
    // accounts at once, it can lose the answer to one, since it subscribes to answers after it has let go of its lock.
    for (service, _) in &users {
        // Each publishes what another waits for.
        for interest in interests(*service) {
            let (_, publisher) = users.iter().find(|(it, _)| *it == interest.service).unwrap();
            let event = event(interest.service, interest.entity, 1);
            publisher.publish(&event).await.unwrap();
            expected.push(event.event.payload);
        }
    }
    let mut consuming = Vec::new();
    for (service, bus) in &users {
        let (told, given) = mpsc::unbounded_channel();
        let (bus, stopped, durable) = (bus.clone(), stopped.clone(), service.as_str());
        let interests = interests(*service);
        let task =
            tokio::spawn(
                async move { bus.consume(durable, interests, Arc::new(Tells(told)), stopped).await },
            );
        consuming.push((interests, given, task));
    }
    for (interests, mut given, task) in consuming {
        for _ in interests {
            let payload = tokio::time::timeout(LONG, given.recv()).await.unwrap().unwrap();
            assert!(expected.contains(&payload));
        }
        task.abort();
    }
    let node = bus(User::Node).await;
    node.publish(&event(Service::Node, "instance", 1)).await.unwrap();
    for follow in [&mut by_cli, &mut by_reader] {
        let mut seen = Vec::new();
        while seen.last() != Some(&b"node instance 1".to_vec()) {
            seen.push(
                tokio::time::timeout(LONG, follow.next()).await.unwrap().unwrap().unwrap().event.payload,
            );
        }
        assert!(expected.iter().all(|payload| seen.contains(payload)));
    }

    let (told, mut given) = mpsc::unbounded_channel();
    let monitor = users[2].1.clone();
    let reports =
        tokio::spawn(async move { monitor.consume_reports("monitor", Arc::new(Tells(told)), stopped).await });
    cli.report("report", "scan-1", b"a report".to_vec(), "").await.unwrap();
    assert_eq!(tokio::time::timeout(LONG, given.recv()).await.unwrap().unwrap(), b"a report");
    stop.send_replace(true);
    tokio::time::timeout(LONG, reports).await.unwrap().unwrap().unwrap();
}
