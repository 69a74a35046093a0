//! One durable pull consumer.
//!
//! Messages are asked for one at a time: what waits in a client's buffer behind a paused one would run into its
//! acknowledgement deadline and be counted as an attempt that nobody made.

use std::time::Duration;

use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{
    self, AckPolicy, DeliverPolicy, IntoConsumerConfig as _, PullConsumer, ReplayPolicy,
};
use async_nats::jetstream::{AckKind, Message as Delivered};
use futures::{FutureExt as _, StreamExt as _};
use tokio::sync::watch;

use super::{NatsBus, streams};
use crate::Error;
use crate::delivery::{Backoff, Message, Target, Verdict, stopped};
use crate::headers::MESSAGE_ID;
use crate::subjects::{Stream, dead_letter};
use async_nats::HeaderMap;

const MAX_ACK_PENDING: i64 = 256;
/// A request for the next message waits this long at the broker.
const POLL: Duration = Duration::from_secs(30);
/// Bound on a clean end; a broker that is away needs none.
const FLUSH: Duration = Duration::from_millis(300);
/// Bytes of why a message was buried: a handler may quote what it was given.
const MAX_REASON: usize = 4096;
/// A message that failed comes again after this time, so that its attempts are not used up within a moment.
const RETRY: Duration = Duration::from_secs(1);

fn wanted(durable: &str, filters: Vec<String>, ack_wait: Duration) -> Config {
    Config {
        durable_name: Some(durable.to_owned()),
        deliver_policy: DeliverPolicy::All,
        ack_policy: AckPolicy::Explicit,
        ack_wait,
        // Unlimited: its end would be an advisory and nothing more. The attempts are counted here.
        max_deliver: -1,
        filter_subjects: filters,
        replay_policy: ReplayPolicy::Instant,
        max_ack_pending: MAX_ACK_PENDING,
        ..Config::default()
    }
}

fn judge(bus: &NatsBus, wanted: Config, found: &consumer::Config) -> Result<(), Error> {
    let name = wanted.durable_name.clone().unwrap_or_default();
    let (wanted, found) = (in_one_form(wanted.into_consumer_config()), in_one_form(found.clone()));
    streams::compare(&wanted, &found).map_err(|names| Error::Unsuitable {
        place: bus.inner.url.clone(),
        reason: format!(
            "consumer {name} has other settings than asked for: {names}; `kiln up` brings them back"
        ),
    })
}

/// One filter is said in two ways, and the order of several says nothing.
fn in_one_form(mut config: consumer::Config) -> consumer::Config {
    config.filter_subjects.sort();
    if let [only] = config.filter_subjects.as_mut_slice() {
        config.filter_subject = std::mem::take(only);
        config.filter_subjects.clear();
    }
    config
}

/// Makes a consumer, or brings it to the wanted settings.
pub(super) async fn ensure(
    bus: &NatsBus,
    stream: Stream,
    durable: &str,
    filters: Vec<String>,
) -> Result<(), Error> {
    let wanted = wanted(durable, filters, bus.inner.ack_wait);
    let name = stream.name(&bus.inner.site);
    let made = bus.inner.context.create_consumer_on_stream(wanted.clone(), name).await;
    let consumer: PullConsumer = made.map_err(|error| bus.unavailable("make a consumer", &error))?;
    judge(bus, wanted, &consumer.cached_info().config)
}

/// The consumer as it is, which must be as wanted.
pub(super) async fn bind(
    bus: &NatsBus,
    stream: Stream,
    durable: &str,
    filters: &[String],
) -> Result<PullConsumer, Error> {
    bus.check_version()?;
    let stream = streams::bind(bus, stream).await?;
    let wanted = wanted(durable, filters.to_vec(), bus.inner.ack_wait);
    let consumer: PullConsumer =
        stream.get_consumer(durable).await.map_err(|error| bus.unavailable("bind to a consumer", &error))?;
    judge(bus, wanted, &consumer.cached_info().config)?;
    Ok(consumer)
}

/// Until told to stop. What the broker can't do now is tried again; only an unsuitable one ends it.
pub(super) async fn run(
    bus: &NatsBus,
    stream: Stream,
    durable: &str,
    filters: Vec<String>,
    target: Target,
    stop: watch::Receiver<bool>,
) -> Result<(), Error> {
    let mut connected = bus.inner.signs.connected.subscribe();
    let mut consumer = Consumer { bus, stream, durable, target, stop, backoff: Backoff::default() };
    while !*consumer.stop.borrow() {
        connected.mark_unchanged();
        // A wait for a broker that is away is cut short by the stop.
        let bound = tokio::select! {
            () = stopped(&mut consumer.stop) => return Ok(()),
            bound = bind(bus, stream, durable, &filters) => bound,
        };
        let interruption = match bound {
            Ok(pull) => consumer.drain(&pull, &mut connected).await,
            Err(error @ Error::Unsuitable { .. }) => return Err(error),
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = interruption {
            tracing::warn!(durable, reason, "can't consume now, trying again");
            // A broker that is back is asked at once.
            tokio::select! {
                _ = consumer.pause() => {}
                _ = connected.changed() => consumer.backoff.reset(),
            }
        }
    }
    Ok(())
}

struct Consumer<'a> {
    bus: &'a NatsBus,
    stream: Stream,
    durable: &'a str,
    target: Target,
    stop: watch::Receiver<bool>,
    backoff: Backoff,
}

impl Consumer<'_> {
    /// False where the service was told to stop.
    async fn pause(&mut self) -> bool {
        tokio::select! {
            () = stopped(&mut self.stop) => false,
            () = tokio::time::sleep(self.backoff.next()) => true,
        }
    }

    /// Handles what comes until it is interrupted, and says by what; None where the broker was reconnected, or the
    /// service is to stop.
    async fn drain(&mut self, pull: &PullConsumer, connected: &mut watch::Receiver<u64>) -> Option<String> {
        while !*self.stop.borrow() {
            let connection = self.bus.connections();
            let mut request = match pull.batch().max_messages(1).expires(POLL).messages().await {
                Ok(request) => request,
                Err(error) => return Some(error.to_string()),
            };
            let message = loop {
                tokio::select! {
                    biased;
                    message = request.next() => break message,
                    () = stopped(&mut self.stop) => {
                        let _ = tokio::time::timeout(FLUSH, at_hand(pull)).await;
                        // What came meanwhile is handled to its end; without, it would count an attempt that nobody made.
                        if let Some(message) = request.next().now_or_never() {
                            break message;
                        }
                        // The broker takes the request back before anything else is sent to it.
                        drop(request);
                        let flushed = tokio::time::timeout(FLUSH, self.bus.flush()).await;
                        tracing::debug!(durable = self.durable, ?flushed, "consuming ends");
                        return None;
                    }
                    // The broker forgot the request with the old connection. But the client tells of a connection after it
                    // stands: told of the one that the request went by, nothing is given up, as a message may be on its way
                    // that would not come again before its wait is over.
                    _ = connected.changed() => if self.bus.connections() != connection { return None },
                }
            };
            match message {
                Some(Ok(message)) => {
                    if let Err(error) = self.settle(&message).await {
                        return Some(error);
                    }
                }
                Some(Err(error)) => return Some(error.to_string()),
                // Nothing came in time.
                None => {}
            }
        }
        None
    }

    /// Handles one message to its end: a handler that began is not cut short by the stop.
    async fn settle(&mut self, message: &Delivered) -> Result<(), String> {
        let (sequence, attempt) = {
            let info = message.info().map_err(|error| error.to_string())?;
            (info.stream_sequence, u64::try_from(info.delivered).unwrap_or(1))
        };
        let key = format!("{}:{sequence}", self.stream.name(&self.bus.inner.site));
        let ack_wait = self.bus.inner.ack_wait;
        let empty = HeaderMap::new();
        let parts = Message {
            subject: message.subject.as_str(),
            headers: message.headers.as_ref().unwrap_or(&empty),
            payload: &message.payload,
            key: &key,
            attempt,
        };
        loop {
            match at_work(message, ack_wait, self.target.deliver(&parts)).await {
                Verdict::Acknowledge => {
                    self.backoff.reset();
                    return acknowledge(message, AckKind::Ack).await;
                }
                Verdict::Retry(reason) => {
                    tracing::warn!(subject = parts.subject, attempt, reason, "an event could not be handled");
                    return acknowledge(message, AckKind::Nak(Some(RETRY))).await;
                }
                // Held, not given back: the broker counts every delivery.
                Verdict::Pause(reason) => {
                    tracing::info!(subject = parts.subject, reason, "consuming is paused");
                    if !at_work(message, ack_wait, self.pause()).await {
                        return Ok(());
                    }
                }
                Verdict::DeadLetter(reason) => match self.bury(&parts, &reason).await {
                    Ok(()) => return acknowledge(message, AckKind::Ack).await,
                    Err(error) => return Err(error.to_string()),
                },
            }
        }
    }

    async fn bury(&self, message: &Message<'_>, reason: &str) -> Result<(), Error> {
        tracing::error!(
            subject = message.subject,
            key = message.key,
            reason,
            "an event goes to the dead letters"
        );
        let mut headers = message.headers.clone();
        // Stream and sequence: whichever consumers fail on it, it lies there once.
        headers.insert(MESSAGE_ID, message.key);
        headers.insert("kiln-dead-subject", message.subject);
        headers.insert("kiln-dead-consumer", self.durable);
        headers.insert("kiln-dead-attempts", message.attempt.to_string());
        // A header ends at its line's end.
        let mut reason = reason.replace(['\r', '\n'], " ");
        reason.truncate(reason.floor_char_boundary(MAX_REASON));
        headers.insert("kiln-dead-reason", reason);
        let subject = dead_letter(&self.bus.inner.site, self.durable, message.subject);
        self.bus.store(subject, headers, message.payload.to_vec()).await
    }
}

/// Returns once a request waits at the broker. It takes requests up by and by, and finds out only then whose account one is
/// from; one that was taken back before is held for somebody's, and the next message is sent to nobody.
async fn at_hand(pull: &PullConsumer) {
    while pull.get_info().await.is_ok_and(|info| info.num_waiting == 0) {}
}

async fn acknowledge(message: &Delivered, kind: AckKind) -> Result<(), String> {
    message.ack_with(kind).await.map_err(|error| format!("acknowledging failed: {error}"))
}

/// Tells the broker that the message is being worked on for as long as that takes.
async fn at_work<T>(message: &Delivered, ack_wait: Duration, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + ack_wait / 3, ack_wait / 3);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = ticks.tick() => {
                if let Err(error) = message.ack_with(AckKind::Progress).await {
                    tracing::debug!(%error, "could not tell the broker of progress");
                }
            }
        }
    }
}
