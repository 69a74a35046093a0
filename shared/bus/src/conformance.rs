//! What every bus must keep, run on both.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::HeaderMap;
use async_trait::async_trait;
use kiln_model::digest::Digest;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::headers::{MESSAGE_ID, headers};
use crate::{Bus, Handled, Handler, Interest, MAX_ATTEMPTS, Report, ReportHandler};

/// A bus of the site `home` on which the monitor may publish and consume.
pub(crate) trait Harness {
    type Bus: Bus;

    fn bus(&self) -> Self::Bus;

    /// Has the consumer `monitor` given the monitor's events of an entity.
    async fn admit(&self, entity: &'static str);

    /// As any system could send it.
    async fn send(&self, subject: &str, headers: HeaderMap, payload: &[u8]);

    /// Subjects, as they were before, and payloads.
    async fn dead(&self) -> Vec<(String, Vec<u8>)>;
}

const LONG: Duration = Duration::from_secs(60);
const SUBJECT: &str = "kiln.v1.home.monitor.instance.healthy.web";

/// Each part has a bus of its own: a durable that changes its interests is not given what it passed over before.
pub(crate) async fn conformance<H: Harness>(make: impl AsyncFn() -> H) {
    events_arrive_once_and_in_order(&make().await).await;
    a_durable_goes_on_where_it_was(&make().await).await;
    a_failed_event_comes_again_and_is_given_up(&make().await).await;
    what_is_no_event_is_given_up_at_once(&make().await).await;
    what_says_other_than_its_subject_is_given_up_at_once(&make().await).await;
    a_pause_counts_no_attempt(&make().await).await;
    a_handler_that_dies_is_followed_by_another(&make().await).await;
    reports_arrive_with_their_ids(&make().await).await;
}

pub(crate) fn event(entity: &'static str, sequence: u64) -> Event {
    let event = NewEvent {
        kind: EventType::new(Service::Monitor, entity, "changed"),
        server: Some("web".parse().unwrap()),
        aggregate_kind: entity.to_owned(),
        aggregate_id: "web".to_owned(),
        aggregate_version: sequence,
        payload: format!("{entity} {sequence}").into_bytes(),
        time: "2026-01-02T03:04:05Z".parse().unwrap(),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
    };
    Event { id: Digest::of(&event.payload), sequence, epoch: "epoch".to_owned(), event }
}

type Rule = dyn Fn(&Event, u64) -> Handled + Send + Sync;

/// Tells of each delivery, then does as the rule says.
struct Told {
    rule: Box<Rule>,
    told: mpsc::UnboundedSender<(Event, u64)>,
}

#[async_trait]
impl Handler for Told {
    async fn handle(&self, event: &Event, attempt: u64) -> Handled {
        self.told.send((event.clone(), attempt)).unwrap();
        (self.rule)(event, attempt)
    }
}

pub(crate) struct Consuming {
    pub(crate) deliveries: mpsc::UnboundedReceiver<(Event, u64)>,
    stop: watch::Sender<bool>,
    pub(crate) task: JoinHandle<Result<(), crate::Error>>,
}

impl Consuming {
    pub(crate) async fn next(&mut self) -> (u64, u64) {
        let (event, attempt) = tokio::time::timeout(LONG, self.deliveries.recv()).await.unwrap().unwrap();
        (event.sequence, attempt)
    }

    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        tokio::time::timeout(LONG, self.task).await.unwrap().unwrap().unwrap();
    }
}

pub(crate) fn consume<B: Bus>(
    bus: B,
    durable: &'static str,
    entity: &'static str,
    rule: impl Fn(&Event, u64) -> Handled + Send + Sync + 'static,
) -> Consuming {
    let (told, deliveries) = mpsc::unbounded_channel();
    let (stop, stopped) = watch::channel(false);
    let handler = Arc::new(Told { rule: Box::new(rule), told });
    let interests = [Interest { service: Service::Monitor, entity }];
    let task = tokio::spawn(async move { bus.consume(durable, &interests, handler, stopped).await });
    Consuming { deliveries, stop, task }
}

async fn publish(harness: &impl Harness, entity: &'static str, sequences: impl IntoIterator<Item = u64>) {
    for sequence in sequences {
        harness.bus().publish(&event(entity, sequence)).await.unwrap();
    }
}

async fn events_arrive_once_and_in_order(harness: &impl Harness) {
    harness.admit("once").await;
    publish(harness, "other", [1]).await;
    publish(harness, "once", [1, 2, 2, 1, 3]).await;
    let mut consuming = consume(harness.bus(), "monitor", "once", |_, _| Handled::Done);
    let (first, attempt) = tokio::time::timeout(LONG, consuming.deliveries.recv()).await.unwrap().unwrap();
    assert_eq!((first, attempt), (event("once", 1), 1));
    assert_eq!(consuming.next().await, (2, 1));
    assert_eq!(consuming.next().await, (3, 1));
    publish(harness, "once", [4]).await;
    assert_eq!(consuming.next().await, (4, 1));
    consuming.stop().await;
}

async fn a_durable_goes_on_where_it_was(harness: &impl Harness) {
    harness.admit("on").await;
    publish(harness, "on", [1]).await;
    let mut consuming = consume(harness.bus(), "monitor", "on", |_, _| Handled::Done);
    assert_eq!(consuming.next().await, (1, 1));
    consuming.stop().await;
    publish(harness, "on", [2]).await;
    let mut consuming = consume(harness.bus(), "monitor", "on", |_, _| Handled::Done);
    assert_eq!(consuming.next().await, (2, 1));
    consuming.stop().await;
}

async fn a_failed_event_comes_again_and_is_given_up(harness: &impl Harness) {
    harness.admit("fail").await;
    publish(harness, "fail", [1, 2]).await;
    let mut consuming = consume(harness.bus(), "monitor", "fail", |event, _| match event.sequence {
        1 => Handled::Failed("it is\nno good".to_owned()),
        _ => Handled::Done,
    });
    let mut seen = Vec::new();
    while seen.len() < 1 + usize::try_from(MAX_ATTEMPTS).unwrap() {
        seen.push(consuming.next().await);
    }
    // The one behind did not wait for its end.
    assert_eq!(seen[..2], [(1, 1), (2, 1)]);
    assert_eq!(seen[2..], [(1, 2), (1, 3), (1, 4), (1, 5)]);
    publish(harness, "fail", [3]).await;
    assert_eq!(consuming.next().await, (3, 1));
    consuming.stop().await;
    let dead = harness.dead().await;
    let expected = ("kiln.v1.home.monitor.fail.changed.web".to_owned(), b"fail 1".to_vec());
    assert_eq!(dead.iter().filter(|letter| **letter == expected).count(), 1, "{dead:?}");
}

async fn what_is_no_event_is_given_up_at_once(harness: &impl Harness) {
    harness.admit("instance").await;
    let mut consuming = consume(harness.bus(), "monitor", "instance", |_, _| Handled::Done);
    harness.send(SUBJECT, HeaderMap::new(), b"garbage").await;
    publish(harness, "instance", [7]).await;
    assert_eq!(consuming.next().await, (7, 1));
    consuming.stop().await;
    let dead = harness.dead().await;
    assert!(dead.contains(&(SUBJECT.to_owned(), b"garbage".to_vec())), "{dead:?}");
}

/// A broker takes subjects with wildcards for what they are, and does not look at headers.
async fn what_says_other_than_its_subject_is_given_up_at_once(harness: &impl Harness) {
    harness.admit("instance").await;
    let mut consuming = consume(harness.bus(), "monitor", "instance", |_, _| Handled::Done);
    let site = "home".parse().unwrap();
    let own = event("instance", 1);
    let mut anothers = own.clone();
    anothers.event.kind.service = Service::Builder;
    let own = headers(&site, &own);
    let subject = |server: &str| format!("kiln.v1.home.monitor.instance.changed.{server}");
    let forged = [
        (subject("web"), headers(&site, &anothers)),
        (subject("*"), own.clone()),
        (subject(">"), own.clone()),
        (subject("web.web"), own.clone()),
        (subject("WEB"), own),
    ];
    for (number, (subject, headers)) in forged.iter().enumerate() {
        let mut headers = headers.clone();
        // Or the broker takes them for one.
        headers.insert(MESSAGE_ID, number.to_string());
        harness.send(subject, headers, b"forged").await;
    }
    publish(harness, "instance", [7]).await;
    assert_eq!(consuming.next().await, (7, 1));
    consuming.stop().await;
    let dead: Vec<_> = harness.dead().await.into_iter().map(|(subject, _)| subject).collect();
    assert_eq!(dead, forged.map(|(subject, _)| subject));
}

async fn a_pause_counts_no_attempt(harness: &impl Harness) {
    harness.admit("pause").await;
    publish(harness, "pause", [1, 2]).await;
    let away = Arc::new(Mutex::new(4));
    let mut consuming = consume(harness.bus(), "monitor", "pause", move |_, _| {
        let mut away = away.lock().unwrap();
        if *away == 0 {
            return Handled::Done;
        }
        *away -= 1;
        Handled::Later("the store is away".to_owned())
    });
    for _ in 0..5 {
        assert_eq!(consuming.next().await, (1, 1));
    }
    // What is behind it waits, and is a first attempt too.
    assert_eq!(consuming.next().await, (2, 1));
    consuming.stop().await;
}

async fn a_handler_that_dies_is_followed_by_another(harness: &impl Harness) {
    struct Hangs(mpsc::UnboundedSender<()>);

    #[async_trait]
    impl Handler for Hangs {
        async fn handle(&self, _: &Event, _: u64) -> Handled {
            self.0.send(()).unwrap();
            std::future::pending().await
        }
    }

    harness.admit("die").await;
    publish(harness, "die", [1]).await;
    let (told, mut began) = mpsc::unbounded_channel();
    let (_stop, stopped) = watch::channel(false);
    let bus = harness.bus();
    let dying = tokio::spawn(async move {
        let interests = [Interest { service: Service::Monitor, entity: "die" }];
        bus.consume("monitor", &interests, Arc::new(Hangs(told)), stopped).await
    });
    tokio::time::timeout(LONG, began.recv()).await.unwrap().unwrap();
    dying.abort();
    let mut consuming = consume(harness.bus(), "monitor", "die", |_, _| Handled::Done);
    assert_eq!(consuming.next().await, (1, 2));
    consuming.stop().await;
}

async fn reports_arrive_with_their_ids(harness: &impl Harness) {
    struct Reports(mpsc::UnboundedSender<(Report, u64)>);

    #[async_trait]
    impl ReportHandler for Reports {
        async fn handle(&self, report: &Report, attempt: u64) -> Handled {
            self.0.send((report.clone(), attempt)).unwrap();
            Handled::Done
        }
    }

    let subject = "kiln.in.v1.home.report";
    let mut headers = HeaderMap::new();
    headers.insert("ce-id", "scan-7");
    headers.insert("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    harness.send(subject, headers, b"one").await;
    harness.send(subject, HeaderMap::new(), b"two").await;
    let (told, mut reports) = mpsc::unbounded_channel();
    let (stop, stopped) = watch::channel(false);
    let bus = harness.bus();
    let task =
        tokio::spawn(async move { bus.consume_reports("monitor", Arc::new(Reports(told)), stopped).await });
    let (first, attempt) = tokio::time::timeout(LONG, reports.recv()).await.unwrap().unwrap();
    assert_eq!((first.id.as_str(), first.subject.as_str(), attempt), ("scan-7", subject, 1));
    assert!(first.traceparent.starts_with("00-0af7"));
    let (second, _) = tokio::time::timeout(LONG, reports.recv()).await.unwrap().unwrap();
    assert_eq!(second.payload, b"two");
    assert!(!second.id.is_empty() && second.id != first.id);
    stop.send_replace(true);
    tokio::time::timeout(LONG, task).await.unwrap().unwrap().unwrap();
}
