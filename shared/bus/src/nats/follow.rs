//! Looking on: events as they pass, for people and programs that keep no place of their own.

use std::ops::RangeInclusive;

use async_nats::Subscriber;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::RawMessageErrorKind;
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
    let get = async |sequence| match stream.get_raw_message(sequence).await {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(failed(&error)),
    };
    let is_before = |message: &StreamMessage| message.time.unix_timestamp_nanos() < since.as_nanosecond();
    let found = found_since(first..=last, get, is_before).await?;
    Ok(found
        .into_iter()
        .map(|message| decode(message.subject.as_str(), &message.headers, &message.payload))
        .collect())
}

/// As [`past`], of one subject.
pub(super) async fn all_of(bus: &NatsBus, subject: &str) -> Result<Vec<Result<Event, Error>>, Error> {
    let failed = |error: &dyn std::fmt::Display| bus.unavailable("read past events", error);
    let name = Stream::Events.name(&bus.inner.site);
    let stream = bus.inner.context.get_stream(name).await.map_err(|error| failed(&error))?;
    let (mut found, mut next) = (Vec::new(), 1);
    loop {
        match stream.get_first_raw_message_by_subject(subject, next).await {
            Ok(message) => {
                next = message.sequence + 1;
                found.push(decode(message.subject.as_str(), &message.headers, &message.payload));
            }
            Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => return Ok(found),
            Err(error) => return Err(failed(&error)),
        }
    }
}

/// Nothing but the oldest is ever deleted, so the place of a moment is found by halving; `get` gives none for what the
/// broker dropped since it named `kept`.
async fn found_since<M, E>(
    kept: RangeInclusive<u64>,
    get: impl AsyncFn(u64) -> Result<Option<M>, E>,
    is_before: impl Fn(&M) -> bool,
) -> Result<Vec<M>, E> {
    let (mut low, mut high) = ((*kept.start()).max(1), kept.end() + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        if get(middle).await?.as_ref().is_none_or(&is_before) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let mut found = Vec::new();
    for sequence in low..=*kept.end() {
        found.extend(get(sequence).await?);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// Messages are their own times; those before `dropped` went after the broker named what it kept.
    async fn since(moment: u64, kept: RangeInclusive<u64>, dropped: u64) -> Vec<u64> {
        let get = async |sequence| Ok::<_, Infallible>((sequence >= dropped).then_some(sequence));
        found_since(kept, get, |message| *message < moment).await.unwrap()
    }

    #[tokio::test]
    async fn what_is_kept_from_a_moment_on_is_found_also_where_the_oldest_went() {
        let all = |from: u64, to: u64| (from..=to).collect::<Vec<_>>();
        assert_eq!(since(0, 0..=0, 1).await, all(1, 0), "an empty stream");
        assert_eq!(since(0, 5..=9, 5).await, all(5, 9));
        assert_eq!(since(7, 5..=9, 5).await, all(7, 9));
        assert_eq!(since(10, 5..=9, 5).await, all(10, 9));
        assert_eq!(since(0, 5..=30, 20).await, all(20, 30));
        assert_eq!(since(25, 5..=30, 20).await, all(25, 30));
        assert_eq!(since(25, 5..=30, 31).await, all(31, 30), "all of them went");
    }
}
