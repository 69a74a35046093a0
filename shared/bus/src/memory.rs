//! A bus within one process, for tests and simulation. It keeps the rules of JetStream that the others rely on: what
//! is stored twice is stored once, a durable goes on where it was, what is not acknowledged comes again.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::HeaderMap;
use async_trait::async_trait;
use kiln_model::event::Event;
use kiln_model::name::SiteName;
use tokio::sync::watch;

use crate::delivery::{Backoff, Message, Target, Verdict, stopped};
use crate::headers::{MESSAGE_ID, check_size, headers};
use crate::subjects::{filters, matches, report_filter};
use crate::{Bus, Error, Handler, Interest, ReportHandler, headers as wire};

/// A message that nobody could handle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub subject: String,
    pub payload: Vec<u8>,
    pub durable: String,
    pub reason: String,
}

#[derive(Debug, Clone)]
pub struct MemoryBus {
    site: SiteName,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Counts what could give a consumer something to do.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    away: bool,
    messages: Vec<Arc<Stored>>,
    ids: HashSet<String>,
    durables: BTreeMap<String, Durable>,
    dead: Vec<DeadLetter>,
    dead_keys: HashSet<usize>,
}

#[derive(Debug)]
struct Stored {
    subject: String,
    headers: HeaderMap,
    payload: Vec<u8>,
}

#[derive(Debug, Default)]
struct Durable {
    next: usize,
    again: VecDeque<Delivery>,
}

#[derive(Debug, Clone, Copy)]
struct Delivery {
    index: usize,
    attempt: u64,
}

impl MemoryBus {
    pub fn new(site: SiteName) -> Self {
        let (changed, _) = watch::channel(0);
        Self { site, shared: Arc::new(Shared { state: Mutex::default(), changed }) }
    }

    /// While it is away, publishing fails and nothing is delivered.
    pub fn set_away(&self, away: bool) {
        self.lock().away = away;
        self.wake();
    }

    /// Stores a message as any system could send it; one whose `Nats-Msg-Id` is known is not stored again.
    ///
    /// # Errors
    /// [`Error::Unavailable`] while the bus is away.
    pub fn publish_raw(&self, subject: &str, headers: HeaderMap, payload: &[u8]) -> Result<(), Error> {
        let mut state = self.lock();
        if state.away {
            return Err(Error::Unavailable {
                what: "publish",
                place: "memory".to_owned(),
                reason: "the bus is away".to_owned(),
            });
        }
        let known = headers.get(MESSAGE_ID).is_some_and(|id| !state.ids.insert(id.as_str().to_owned()));
        if !known {
            state.messages.push(Arc::new(Stored {
                subject: subject.to_owned(),
                headers,
                payload: payload.to_vec(),
            }));
        }
        drop(state);
        self.wake();
        Ok(())
    }

    /// Every event that was stored, in order.
    pub fn published(&self) -> Vec<Event> {
        let state = self.lock();
        let events = state
            .messages
            .iter()
            .map(|message| wire::decode(&message.subject, &message.headers, &message.payload));
        events.filter_map(Result::ok).collect()
    }

    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        self.lock().dead.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.shared.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// The next message for a durable. It is in flight until the guard is settled.
    fn take(&self, durable: &str, filters: &[String]) -> Option<InFlight> {
        let mut state = self.lock();
        let state = &mut *state;
        if state.away {
            return None;
        }
        let queue = state.durables.entry(durable.to_owned()).or_default();
        let fresh = state.messages.iter().enumerate().skip(queue.next);
        let fresh = fresh
            .map(|(index, _)| index)
            .find(|index| filters.iter().any(|filter| matches(filter, &state.messages[*index].subject)));
        let delivery = match fresh {
            Some(index) => {
                queue.next = index + 1;
                Delivery { index, attempt: 1 }
            }
            None => {
                queue.next = state.messages.len();
                queue.again.pop_front()?
            }
        };
        let message = state.messages[delivery.index].clone();
        Some(InFlight { bus: self.clone(), durable: durable.to_owned(), message, delivery: Some(delivery) })
    }

    async fn run(&self, durable: &str, filters: &[String], target: Target, mut stop: watch::Receiver<bool>) {
        let mut changed = self.shared.changed.subscribe();
        let mut backoff = Backoff::default();
        while !*stop.borrow() {
            changed.mark_unchanged();
            let Some(in_flight) = self.take(durable, filters) else {
                tokio::select! {
                    biased;
                    () = stopped(&mut stop) => return,
                    _ = changed.changed() => continue,
                }
            };
            if in_flight.handle(&target, &mut backoff, &mut stop).await.is_none() {
                return;
            }
        }
    }
}

/// Goes back into the queue where it is dropped unsettled, as when the process died.
struct InFlight {
    bus: MemoryBus,
    durable: String,
    message: Arc<Stored>,
    delivery: Option<Delivery>,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(Delivery { index, attempt }) = self.delivery.take() {
            let again = Delivery { index, attempt: attempt + 1 };
            self.bus.lock().durables.entry(self.durable.clone()).or_default().again.push_back(again);
            self.bus.wake();
        }
    }
}

impl InFlight {
    /// None where the consumer was told to stop.
    async fn handle(
        mut self,
        target: &Target,
        backoff: &mut Backoff,
        stop: &mut watch::Receiver<bool>,
    ) -> Option<()> {
        let message = self.message.clone();
        while let Some(Delivery { index, attempt }) = self.delivery {
            let key = format!("memory:{index}");
            let Stored { subject, headers, payload } = &*message;
            match target.deliver(&Message { subject, headers, payload, key: &key, attempt }).await {
                Verdict::Acknowledge => {
                    backoff.reset();
                    self.delivery = None;
                }
                Verdict::Retry(reason) => {
                    tracing::warn!(%subject, attempt, reason, "an event could not be handled");
                    return Some(());
                }
                Verdict::Pause(reason) => {
                    tracing::info!(%subject, reason, "consuming is paused");
                    tokio::select! {
                        biased;
                        () = stopped(stop) => return None,
                        () = tokio::time::sleep(backoff.next()) => {}
                    }
                }
                Verdict::DeadLetter(reason) => {
                    self.delivery = None;
                    let mut state = self.bus.lock();
                    if state.dead_keys.insert(index) {
                        let (subject, payload) = (subject.clone(), payload.clone());
                        state.dead.push(DeadLetter {
                            subject,
                            payload,
                            durable: self.durable.clone(),
                            reason,
                        });
                    }
                }
            }
        }
        Some(())
    }
}

#[async_trait]
impl Bus for MemoryBus {
    async fn publish(&self, event: &Event) -> Result<(), Error> {
        let subject = event.event.kind.subject(&self.site, event.event.server.as_ref());
        check_size(&subject, event)?;
        self.publish_raw(&subject, headers(&self.site, event), &event.event.payload)
    }

    async fn consume(
        &self,
        durable: &str,
        interests: &[Interest],
        handler: Arc<dyn Handler>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        self.run(durable, &filters(&self.site, interests), Target::Events(handler), stop).await;
        Ok(())
    }

    async fn consume_reports(
        &self,
        durable: &str,
        handler: Arc<dyn ReportHandler>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        // A name of its own: on a broker it is a consumer of another stream.
        let durable = format!("reports-{durable}");
        self.run(&durable, &[report_filter(&self.site)], Target::Reports(handler), stop).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{Harness, conformance};

    struct Memory(MemoryBus);

    impl Harness for Memory {
        type Bus = MemoryBus;

        fn bus(&self) -> MemoryBus {
            self.0.clone()
        }

        /// Each consumer names its interests itself.
        async fn admit(&self, _: &'static str) {}

        async fn send(&self, subject: &str, headers: HeaderMap, payload: &[u8]) {
            self.0.publish_raw(subject, headers, payload).unwrap();
        }

        async fn dead(&self) -> Vec<(String, Vec<u8>)> {
            self.0.dead_letters().into_iter().map(|letter| (letter.subject, letter.payload)).collect()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_keeps_every_promise() {
        conformance(async || Memory(MemoryBus::new("home".parse().unwrap()))).await;
    }

    #[tokio::test(start_paused = true)]
    async fn while_it_is_away_nothing_is_stored_or_delivered() {
        let bus = MemoryBus::new("home".parse().unwrap());
        bus.set_away(true);
        let refused = bus.publish_raw("kiln.v1.home.monitor.server.settled._", HeaderMap::new(), &[]);
        assert!(matches!(refused, Err(Error::Unavailable { .. })));
        bus.set_away(false);
        assert_eq!(bus.published(), []);
    }
}
