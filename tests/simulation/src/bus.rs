//! A process's way to the broker, which is away, forgets, loses, doubles, delays and reorders.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kiln_bus::{Bus, Error, Handled, Handler, Interest, MemoryBus, ReportHandler};
use kiln_model::event::Event;
use tokio::sync::watch;

use crate::invariants::Invariants;
use crate::life::Life;
use crate::world::World;

/// The broker itself.
#[derive(Clone)]
pub(crate) struct Broker {
    /// Another one after its data was deleted.
    bus: Arc<Mutex<MemoryBus>>,
    wiped: Arc<watch::Sender<u64>>,
}

impl Broker {
    pub(crate) fn new() -> Self {
        Self { bus: Arc::new(Mutex::new(empty())), wiped: Arc::new(watch::Sender::new(0)) }
    }

    pub(crate) fn now(&self) -> MemoryBus {
        self.bus.lock().unwrap().clone()
    }

    pub(crate) fn set_away(&self, away: bool) {
        self.now().set_away(away);
    }

    /// Its data is deleted.
    pub(crate) fn wipe(&self) {
        *self.bus.lock().unwrap() = empty();
        self.wiped.send_modify(|times| *times += 1);
    }
}

fn empty() -> MemoryBus {
    MemoryBus::new("sim".parse().unwrap())
}

#[derive(Clone)]
pub(crate) struct SimBus {
    pub(crate) broker: Broker,
    pub(crate) life: Life,
    pub(crate) world: World,
    pub(crate) invariants: Invariants,
}

impl SimBus {
    /// Consumes from whichever broker there is.
    async fn follow<F>(&self, consume: impl Fn(MemoryBus) -> F) -> Result<(), Error>
    where
        F: Future<Output = Result<(), Error>>,
    {
        let mut wiped = self.broker.wiped.subscribe();
        loop {
            wiped.mark_unchanged();
            tokio::select! {
                biased;
                done = consume(self.broker.now()) => return done,
                _ = wiped.changed() => {}
            }
        }
    }
}

#[async_trait]
impl Bus for SimBus {
    async fn publish(&self, event: &Event) -> Result<(), Error> {
        self.world.slowly().await;
        self.life.step("before a publish").await;
        self.invariants.published(self.life.service, event);
        let faults = self.world.faults();
        if !self.world.chance(faults.event_lost) {
            self.broker.now().publish(event).await?;
        }
        self.life.step("after a publish").await;
        if self.world.chance(faults.publish_unknown) {
            let (place, reason) = ("simulation".to_owned(), "the answer is lost".to_owned());
            return Err(Error::Unavailable { what: "publish", place, reason });
        }
        Ok(())
    }

    async fn consume(
        &self,
        durable: &str,
        interests: &[Interest],
        handler: Arc<dyn Handler>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let handler = Arc::new(Fickle { handler, life: self.life.clone(), world: self.world.clone() });
        self.follow(|bus| {
            let (handler, stop) = (handler.clone(), stop.clone());
            async move { bus.consume(durable, interests, handler, stop).await }
        })
        .await
    }

    async fn consume_reports(
        &self,
        durable: &str,
        handler: Arc<dyn ReportHandler>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        self.follow(|bus| {
            let (handler, stop) = (handler.clone(), stop.clone());
            async move { bus.consume_reports(durable, handler, stop).await }
        })
        .await
    }
}

/// Gives events twice, late, and after others.
struct Fickle {
    handler: Arc<dyn Handler>,
    life: Life,
    world: World,
}

impl Fickle {
    fn again_later(&self, event: &Event) {
        let (handler, life, event) = (self.handler.clone(), self.life.clone(), event.clone());
        let wait = Duration::from_millis(self.world.between(1, 60_000));
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            life.here().await;
            handler.handle(&event, 1).await;
        });
    }
}

#[async_trait]
impl Handler for Fickle {
    async fn handle(&self, event: &Event, attempt: u64) -> Handled {
        self.life.here().await;
        let faults = self.world.faults();
        if self.world.chance(faults.event_late) {
            self.again_later(event);
            return Handled::Done;
        }
        let mut handled = self.handler.handle(event, attempt).await;
        if self.world.chance(faults.event_doubled) {
            self.life.here().await;
            handled = self.handler.handle(event, attempt).await;
        }
        self.life.step("before an acknowledgement").await;
        handled
    }
}
