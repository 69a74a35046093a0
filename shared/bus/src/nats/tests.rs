mod server;

use std::time::Instant;

use async_nats::jetstream::stream::Config;
use kiln_model::event::{EventType, Service};
use server::Server;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;

use super::*;
use crate::conformance::{Harness, conformance, consume, event};
use crate::subjects::Stream;
use crate::{Handled, Interest, MAX_ATTEMPTS};

/// Short, for tests that wait for it.
const ACK_WAIT: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(60);

struct Nats {
    server: Server,
    monitor: NatsBus,
    root: Client,
}

impl Nats {
    async fn start() -> Self {
        let server = Server::start();
        let monitor = NatsBus::connect_with(server.options(User::Monitor), ACK_WAIT).await.unwrap();
        let root = server.root().await;
        let nats = Self { server, monitor, root };
        nats.prepare().await;
        nats
    }

    async fn prepare(&self) {
        NatsBus::ensure_with(self.server.options(User::Admin), ACK_WAIT).await.unwrap();
        self.admit("server").await;
    }

    /// As the admin does, with filters of the test's own.
    async fn give(&self, durable: &str, entity: &'static str) {
        let admin = NatsBus::connect_with(self.server.options(User::Admin), ACK_WAIT).await.unwrap();
        let filters = filters(&admin.inner.site, &[Interest { service: Service::Monitor, entity }]);
        consumer::ensure(&admin, Stream::Events, durable, filters).await.unwrap();
    }

    async fn letters(&self) -> Vec<(HeaderMap, Vec<u8>)> {
        let stream = jetstream::new(self.root.clone());
        let stream = stream.get_stream("KILN_DEAD_HOME").await.unwrap();
        let mut letters = Vec::new();
        for sequence in 1..=stream.cached_info().state.last_sequence {
            let message = stream.get_raw_message(sequence).await.unwrap();
            letters.push((message.headers, message.payload.to_vec()));
        }
        letters
    }
}

impl Harness for Nats {
    type Bus = NatsBus;

    fn bus(&self) -> NatsBus {
        self.monitor.clone()
    }

    async fn admit(&self, entity: &'static str) {
        self.give("monitor", entity).await;
    }

    async fn send(&self, subject: &str, headers: HeaderMap, payload: &[u8]) {
        let context = jetstream::new(self.root.clone());
        let sent = context.publish_with_headers(subject.to_owned(), headers, payload.to_vec().into()).await;
        sent.unwrap().await.unwrap();
    }

    async fn dead(&self) -> Vec<(String, Vec<u8>)> {
        let letters = self.letters().await.into_iter();
        letters
            .map(|(headers, payload)| (headers.get("kiln-dead-subject").unwrap().to_string(), payload))
            .collect()
    }
}

#[tokio::test]
async fn it_keeps_every_promise() {
    conformance(Nats::start).await;
}

#[tokio::test]
async fn an_event_is_stored_once_with_its_headers() {
    let nats = Nats::start().await;
    let event = event("server", 7);
    nats.monitor.publish(&event).await.unwrap();
    nats.monitor.publish(&event).await.unwrap();
    let stream = jetstream::new(nats.root.clone()).get_stream("KILN_HOME").await.unwrap();
    assert_eq!(stream.cached_info().state.messages, 1);
    let stored = stream.get_raw_message(1).await.unwrap();
    assert_eq!(stored.subject.as_str(), "kiln.v1.home.monitor.server.changed.web");
    let header = |name: &str| stored.headers.get(name).unwrap().to_string();
    assert_eq!(header("ce-type"), "kiln.monitor.server.changed.v1");
    assert_eq!(header("ce-source"), "kiln/home/monitor");
    assert_eq!(header("ce-sequence"), "7");
    assert_eq!(header("ce-dataschema"), "kiln.events.v1.NeedsUpdate");
    assert_eq!(header("Nats-Msg-Id"), event.id.to_string());
    assert_eq!(header("traceparent"), event.event.traceparent);
    assert_eq!(stored.payload, event.event.payload);
}

/// Several that fail on one message: it lies in the dead letters once, and says why.
#[tokio::test]
async fn a_dead_letter_lies_there_once() {
    let nats = Nats::start().await;
    let builder = NatsBus::connect_with(nats.server.options(User::Builder), ACK_WAIT).await.unwrap();
    nats.give("builder", "server").await;
    nats.send("kiln.v1.home.monitor.server.changed.web", HeaderMap::new(), b"garbage").await;
    nats.monitor.publish(&event("server", 1)).await.unwrap();
    let mut consuming = [
        consume(nats.monitor.clone(), "monitor", "server", |_, _| Handled::Done),
        consume(builder, "builder", "server", |_, _| Handled::Done),
    ];
    for consuming in &mut consuming {
        assert_eq!(consuming.next().await, (1, 1));
    }
    for consuming in consuming {
        consuming.stop().await;
    }
    let letters = nats.letters().await;
    assert_eq!(letters.len(), 1, "{letters:?}");
    let header = |name: &str| letters[0].0.get(name).unwrap().to_string();
    assert_eq!(header("Nats-Msg-Id"), "KILN_HOME:1");
    assert_eq!(header("kiln-dead-attempts"), "1");
    assert!(header("kiln-dead-reason").contains("ce-specversion"));
}

/// As large as a message can be, and a reason that is longer than a header should be.
#[tokio::test]
async fn what_is_large_is_buried_too_and_hides_no_other() {
    let nats = Nats::start().await;
    let large = vec![b'x'; (1 << 20) - 512];
    nats.send("kiln.v1.home.monitor.server.changed.web", HeaderMap::new(), &large).await;
    nats.monitor.publish(&event("server", 1)).await.unwrap();
    let why = "because ".repeat(100_000);
    let mut consuming = consume(nats.monitor.clone(), "monitor", "server", move |event, _| {
        if event.sequence == 1 { Handled::Failed(why.clone()) } else { Handled::Done }
    });
    nats.monitor.publish(&event("server", 2)).await.unwrap();
    while consuming.next().await.0 != 2 {}
    // The one that fails is tried some times more.
    let begin = Instant::now();
    while nats.letters().await.len() < 2 {
        assert!(begin.elapsed() < LONG, "{:?}", nats.letters().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    consuming.stop().await;
    let letters = nats.letters().await;
    assert_eq!(letters.iter().map(|(_, payload)| payload.len()).max(), Some(large.len()));
    assert!(
        letters.iter().all(|(headers, _)| headers.get("kiln-dead-reason").unwrap().as_str().len() <= 4096)
    );
    assert_eq!(letters.len(), 2);

    let cli = NatsBus::connect(nats.server.options(User::Cli)).await.unwrap();
    let past = cli.past(jiff::Timestamp::UNIX_EPOCH).await.unwrap();
    let seen: Vec<_> =
        past.iter().filter_map(|event| event.as_ref().ok()).map(|event| event.sequence).collect();
    assert_eq!((seen, past.len()), (vec![1, 2], 3));
}

#[tokio::test]
async fn a_broker_that_is_killed_and_comes_back_is_used_again() {
    let mut nats = Nats::start().await;
    let mut consuming = consume(nats.monitor.clone(), "monitor", "server", |_, _| Handled::Done);
    nats.monitor.publish(&event("server", 1)).await.unwrap();
    assert_eq!(consuming.next().await, (1, 1));
    nats.server.kill();
    let refused = nats.monitor.publish(&event("server", 2)).await.unwrap_err();
    assert!(
        matches!(&refused, Error::Unavailable { .. }) && refused.to_string().contains("away"),
        "{refused}"
    );
    nats.server.run();
    // As the relay does.
    let begin = Instant::now();
    while nats.monitor.publish(&event("server", 2)).await.is_err() {
        assert!(begin.elapsed() < LONG);
        tokio::task::yield_now().await;
    }
    // An acknowledgement just before the kill can be lost: the first may come again.
    while consuming.next().await.0 != 2 {}
    nats.monitor.publish(&event("server", 3)).await.unwrap();
    assert_eq!(consuming.next().await, (3, 1));
    consuming.stop().await;
}

#[tokio::test]
async fn a_broker_whose_data_was_wiped_is_used_again() {
    let mut nats = Nats::start().await;
    let monitor = nats.monitor.clone();
    let begin_again = || consume(monitor.clone(), "monitor", "server", |_, _| Handled::Done);
    let mut consuming = begin_again();
    nats.monitor.publish(&event("server", 1)).await.unwrap();
    assert_eq!(consuming.next().await, (1, 1));
    nats.server.kill();
    nats.server.wipe();
    nats.server.run();
    nats.prepare().await;
    let begin = Instant::now();
    while nats.monitor.publish(&event("server", 2)).await.is_err() {
        assert!(begin.elapsed() < LONG);
        tokio::task::yield_now().await;
    }
    // One that asked before there was a stream again has ended, and whoever runs it begins again.
    let (delivered, attempt) = loop {
        match tokio::time::timeout(LONG, consuming.deliveries.recv()).await.unwrap() {
            Some(delivery) => break delivery,
            None => consuming = begin_again(),
        }
    };
    assert_eq!((delivered.sequence, attempt), (2, 1));
    consuming.stop().await;
}

/// It is not there when the service starts, and is found when it comes.
#[tokio::test]
async fn a_broker_that_comes_late_is_waited_for() {
    let mut nats = Nats::start().await;
    nats.server.kill();
    let bus = NatsBus::connect_with(nats.server.options(User::Monitor), ACK_WAIT).await.unwrap();
    let mut consuming = consume(bus.clone(), "monitor", "server", |_, _| Handled::Done);
    assert!(bus.publish(&event("server", 1)).await.is_err());
    nats.server.run();
    let begin = Instant::now();
    while bus.publish(&event("server", 2)).await.is_err() {
        assert!(begin.elapsed() < LONG);
        tokio::task::yield_now().await;
    }
    assert_eq!(consuming.next().await, (2, 1));
    consuming.stop().await;
}

#[tokio::test]
async fn nobody_may_do_another_s_work() {
    let nats = Nats::start().await;
    let mut foreign = event("server", 1);
    foreign.event.kind = EventType::new(Service::Deployer, "rollout", "started");
    let refused = nats.monitor.publish(&foreign).await.unwrap_err().to_string();
    assert!(refused.contains("ermissions") && refused.contains("kiln.v1.home.deployer"), "{refused}");

    // A consumer in another's name, a stream, another site.
    let filters = [Stream::Events.subjects(&"home".parse().unwrap())];
    let builder = NatsBus::connect(nats.server.options(User::Builder)).await.unwrap();
    let reader = NatsBus::connect(nats.server.options(User::Reader)).await.unwrap();
    let event = event("server", 2);
    // A refusal is a silence that runs out: all of them at once.
    let refused = tokio::join!(
        consumer::bind(&nats.monitor, Stream::Events, "builder", &filters),
        consumer::bind(&nats.monitor, Stream::DeadLetters, "monitor", &filters),
        consumer::bind(&builder, Stream::Reports, "builder", &filters),
        streams::ensure(&builder, Stream::Events),
        reader.publish(&event),
        reader.report("report", "1", Vec::new(), ""),
    );
    assert!(refused.0.is_err() && refused.1.is_err() && refused.2.is_err());
    assert!(refused.3.is_err() && refused.4.is_err() && refused.5.is_err());
    let filters = ["kiln.v1.home.monitor.server.>".to_owned()];
    consumer::bind(&nats.monitor, Stream::Events, "monitor", &filters).await.unwrap();
}

#[tokio::test]
async fn those_who_look_on_see_events_and_the_cli_may_report() {
    let nats = Nats::start().await;
    for user in [User::Reader, User::Cli] {
        let bus = NatsBus::connect(nats.server.options(user)).await.unwrap();
        let mut follow = bus.follow().await.unwrap();
        let event = event("server", user as u64);
        nats.monitor.publish(&event).await.unwrap();
        let seen = tokio::time::timeout(LONG, follow.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(seen, event);
    }
    let cli = NatsBus::connect(nats.server.options(User::Cli)).await.unwrap();
    cli.report("report", "scan-1", b"x".to_vec(), "").await.unwrap();
    // What is no event hides none of those after it.
    let context = jetstream::new(nats.root.clone());
    let junk = context.publish("kiln.v1.home.monitor.server.junk.web", "junk".into()).await.unwrap();
    junk.await.unwrap();
    nats.monitor.publish(&event("server", 89)).await.unwrap();
    let past = cli.past(jiff::Timestamp::UNIX_EPOCH).await.unwrap();
    assert_eq!(past.iter().filter(|event| event.is_err()).count(), 1);
    assert_eq!(past.last().unwrap().as_ref().unwrap().event.aggregate_version, 89);
    let other = async_nats::ConnectOptions::new().nkey(nats.server.seed(User::Cli).to_string());
    let other = other.connect(nats.server.url()).await.unwrap();
    let mut spy = other.subscribe("_INBOX.monitor.>").await.unwrap();
    other.flush().await.unwrap();
    nats.monitor.publish(&event("server", 90)).await.unwrap();
    let heard = tokio::time::timeout(Duration::from_millis(500), futures::StreamExt::next(&mut spy)).await;
    assert!(!matches!(heard, Ok(Some(_))), "another's inbox can be read");
}

#[tokio::test]
async fn a_stream_with_other_settings_is_not_used() {
    let nats = Nats::start().await;
    let context = jetstream::new(nats.root.clone());
    let found = context.get_stream("KILN_HOME").await.unwrap().cached_info().config.clone();
    let changed = Config { max_age: Duration::from_secs(3600), ..found };
    context.update_stream(changed).await.unwrap();
    let consuming = consume(nats.monitor.clone(), "monitor", "server", |_, _| Handled::Done);
    let ended = tokio::time::timeout(LONG, consuming.task).await.unwrap().unwrap();
    let Err(Error::Unsuitable { reason, .. }) = ended else { panic!("{ended:?}") };
    assert!(reason.contains("max_age"), "{reason}");
    // The admin brings it back.
    nats.prepare().await;
    let mut consuming = consume(nats.monitor.clone(), "monitor", "server", |_, _| Handled::Done);
    nats.monitor.publish(&event("server", 1)).await.unwrap();
    assert_eq!(consuming.next().await, (1, 1));
    consuming.stop().await;
}

/// A message that kills its process every time is given up without being handled once more.
#[tokio::test]
async fn deliveries_that_nobody_lived_to_count_are_counted() {
    let nats = Nats::start().await;
    nats.monitor.publish(&event("server", 1)).await.unwrap();
    let filters = vec!["kiln.v1.home.monitor.server.>".to_owned()];
    let pull = consumer::bind(&nats.monitor, Stream::Events, "monitor", &filters).await.unwrap();
    for _ in 0..MAX_ATTEMPTS {
        let mut batch = pull.batch().max_messages(1).expires(LONG).messages().await.unwrap();
        let message = futures::StreamExt::next(&mut batch).await.unwrap().unwrap();
        message.ack_with(jetstream::AckKind::Nak(None)).await.unwrap();
    }
    nats.monitor.publish(&event("server", 2)).await.unwrap();
    let mut consuming = consume(nats.monitor.clone(), "monitor", "server", |_, _| Handled::Done);
    assert_eq!(consuming.next().await, (2, 1));
    let begin = Instant::now();
    while nats.letters().await.is_empty() {
        assert!(begin.elapsed() < LONG);
        tokio::task::yield_now().await;
    }
    consuming.stop().await;
    assert_eq!(nats.letters().await[0].1, b"server 1");
}

/// Speaks just enough of the protocol to be taken for a server: of these versions, one for each connection.
async fn fake(versions: &'static [&'static str]) -> NatsOptions {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        for version in versions {
            let (stream, _) = listener.accept().await.unwrap();
            let (read, mut write) = stream.into_split();
            let info = format!(
                r#"INFO {{"server_id":"x","version":"{version}","proto":1,"max_payload":1048576,"headers":true}}"#
            );
            write.write_all(format!("{info}\r\n").as_bytes()).await.unwrap();
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                if line.starts_with("PING") {
                    write.write_all(b"PONG\r\n").await.unwrap();
                }
                // Whatever else is wanted of it ends the connection.
                if line.starts_with("PUB") || line.starts_with("HPUB") {
                    break;
                }
            }
        }
    });
    NatsOptions {
        url,
        replicas: 1,
        site: "home".parse().unwrap(),
        user: User::Builder,
        seed: None,
        tls: None,
    }
}

#[tokio::test]
async fn an_old_server_is_refused_in_words() {
    for version in ["2.9.10", "2.9.25", "1.4.1", "dev"] {
        let refused = NatsBus::connect(fake(Box::leak(Box::new([version]))).await).await.unwrap_err();
        assert!(matches!(refused, Error::Unsuitable { .. }), "{refused}");
        assert!(refused.to_string().contains(version) && refused.to_string().contains("2.10"), "{refused}");
    }
}

/// Of a cluster, the next connection may be to another server.
#[tokio::test]
async fn an_old_server_is_refused_also_where_the_last_one_was_good() {
    let bus = NatsBus::connect(fake(&["2.14.4", "2.9.25"]).await).await.unwrap();
    let begin = Instant::now();
    let refused = loop {
        match bus.publish(&event("server", 1)).await {
            Err(refused @ Error::Unsuitable { .. }) => break refused.to_string(),
            other => assert!(begin.elapsed() < LONG, "{other:?}"),
        }
    };
    assert!(refused.contains("2.9.25"), "{refused}");
}

#[tokio::test]
async fn a_consumer_with_other_settings_is_not_used() {
    let nats = Nats::start().await;
    let stream = jetstream::new(nats.root.clone()).get_stream("KILN_HOME").await.unwrap();
    let mut changed = stream.consumer_info("monitor").await.unwrap().config;
    changed.max_ack_pending = 1;
    stream.create_consumer(changed).await.unwrap();
    let consuming = consume(nats.monitor.clone(), "monitor", "server", |_, _| Handled::Done);
    let ended = tokio::time::timeout(LONG, consuming.task).await.unwrap().unwrap();
    let Err(Error::Unsuitable { reason, .. }) = ended else { panic!("{ended:?}") };
    assert!(reason.contains("consumer monitor") && reason.contains("max_ack_pending"), "{reason}");
    nats.prepare().await;
    let mut consuming = consume(nats.monitor.clone(), "monitor", "server", |_, _| Handled::Done);
    nats.monitor.publish(&event("server", 1)).await.unwrap();
    assert_eq!(consuming.next().await, (1, 1));
    consuming.stop().await;
}

#[tokio::test]
async fn a_wrong_seed_is_told() {
    let nats = Nats::start().await;
    let options = |seed: zeroize::Zeroizing<String>| NatsOptions {
        seed: Some(seed),
        ..nats.server.options(User::Builder)
    };
    assert!(matches!(
        NatsBus::connect(options("nonsense".to_owned().into())).await,
        Err(Error::Unsuitable { .. })
    ));
    // A good one that the broker does not know: it may be about to be told of it, so this is tried again.
    let stranger = NatsBus::connect(options(new_key().unwrap().seed)).await.unwrap();
    let refused = stranger.publish(&event("server", 1)).await.unwrap_err().to_string();
    assert!(refused.to_lowercase().contains("authorization"), "{refused}");
}
