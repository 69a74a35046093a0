//! Looking on: events as they pass, for people and programs that keep no place of their own.

use async_nats::Subscriber;
use async_nats::jetstream::message::StreamMessage;
use bytes::Bytes;
use futures::StreamExt as _;
use jiff::Timestamp;
use kiln_model::event::Event;

use super::{ASK, NatsBus};
use crate::Error;
use crate::headers::decode;
use crate::subjects::Stream;

/// Ends when the connection is closed.
#[derive(Debug)]
pub struct Follow {
    subscriber: Subscriber,
}

impl Follow {
    pub(super) async fn open(bus: &NatsBus) -> Result<Self, Error> {
        let client = &bus.inner.client;
        let failed = |error: &dyn std::fmt::Display| bus.unavailable("follow events", error);
        let subject = Stream::Events.subjects(&bus.inner.site);
        let subscriber = client.subscribe(subject).await.map_err(|error| failed(&error))?;
        // What is sent is not yet known to the broker, and an event in between would be missed. It takes a connection's
        // words in their order: once it echoes one that came later, it has the subscription.
        let inbox = client.new_inbox();
        let mut echo = client.subscribe(inbox.clone()).await.map_err(|error| failed(&error))?;
        client.publish(inbox, Bytes::new()).await.map_err(|error| failed(&error))?;
        match tokio::time::timeout(ASK, echo.next()).await {
            Ok(Some(_)) => Ok(Self { subscriber }),
            Ok(None) => Err(failed(&"the connection is closed")),
            Err(_) => Err(failed(&"no answer in time")),
        }
    }

    /// The next event; an error for a message that is none.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        let message = self.subscriber.next().await?;
        let headers = message.headers.unwrap_or_default();
        Some(decode(message.subject.as_str(), &headers, &message.payload))
    }
}

/// What the broker still has from `since` on, in its order. Read message by message, which needs no consumer: whoever
/// looks back leaves nothing behind. As in [`Follow::next`], one that is no event hides none of the others.
pub(super) async fn past(bus: &NatsBus, since: Timestamp) -> Result<Vec<Result<Event, Error>>, Error> {
    let failed = |error: &dyn std::fmt::Display| bus.unavailable("read past events", error);
    let name = Stream::Events.name(&bus.inner.site);
    let stream = bus.inner.context.get_stream(name).await.map_err(|error| failed(&error))?;
    let (first, last) = (stream.cached_info().state.first_sequence, stream.cached_info().state.last_sequence);
    let get = async |sequence| stream.get_raw_message(sequence).await.map_err(|error| failed(&error));
    let is_before = |message: &StreamMessage| message.time.unix_timestamp_nanos() < since.as_nanosecond();

    // Nothing is ever deleted between the first and the last, so the place of a moment is found by halving.
    let (mut low, mut high) = (first.max(1), last + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        if is_before(&get(middle).await?) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let mut found = Vec::new();
    for sequence in low..=last {
        let message = get(sequence).await?;
        found.push(decode(message.subject.as_str(), &message.headers, &message.payload));
    }
    Ok(found)
}
