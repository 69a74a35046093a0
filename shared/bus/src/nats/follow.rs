//! Looking on: events as they pass, for people and programs that keep no place of their own.

use async_nats::Subscriber;
use futures::StreamExt as _;
use kiln_model::event::Event;

use super::NatsBus;
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
        let subject = Stream::Events.subjects(&bus.inner.site);
        let subscribed = bus.inner.client.subscribe(subject).await;
        let subscriber = subscribed.map_err(|error| bus.unavailable("follow events", &error))?;
        // The broker has the subscription before the caller goes on: no event in between is missed.
        bus.flush().await?;
        Ok(Self { subscriber })
    }

    /// The next event; an error for a message that is none.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        let message = self.subscriber.next().await?;
        let headers = message.headers.unwrap_or_default();
        Some(decode(message.subject.as_str(), &headers, &message.payload))
    }
}
