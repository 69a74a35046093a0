//! A process's way to the broker, which is away, forgets, loses, doubles, delays and reorders.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kiln_bus::{Bus, Error, Handled, Handler, Interest, MemoryBus, ReportHandler};
use kiln_model::event::Event;
use tokio::sync::watch;

use crate::acknowledged;
use crate::invariants::Invariants;
use crate::life::Life;
use crate::store::Disk;
use crate::world::World;

/// Kind of aggregate of an event that no handler takes. It comes at once, and only by the broker: where it comes to lie is
/// what it is about.
pub(crate) const POISON: &str = "poison";

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

    /// How often its data was deleted.
    pub(crate) fn wipes(&self) -> u64 {
        *self.wiped.borrow()
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
    /// Of the process's service: what it commits because of an event.
    pub(crate) disk: Disk,
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
        self.invariants.publishing(self.life.service, event);
        let faults = self.world.faults();
        let is_lost = self.world.chance(faults.event_lost);
        if !is_lost {
            self.broker.now().publish(event).await?;
            self.invariants.published(event);
        }
        self.life.step("after a publish").await;
        if self.world.chance(faults.publish_unknown) {
            let (place, reason) = ("simulation".to_owned(), "the answer is lost".to_owned());
            return Err(Error::Unavailable { what: "publish", place, reason });
        }
        // The broker took it and lost it: nobody can know.
        self.invariants.published(event);
        Ok(())
    }

    async fn consume(
        &self,
        durable: &str,
        interests: &[Interest],
        handler: Arc<dyn Handler>,
        stop: watch::Receiver<bool>,
    ) -> Result<(), Error> {
        let handler = Arc::new(Fickle { handler, bus: self.clone(), dying: Arc::default() });
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
    bus: SimBus,
    /// The process dies as soon as what it handled is acknowledged.
    dying: Arc<AtomicBool>,
}

impl Fickle {
    fn again_later(&self, event: &Event) {
        let (handler, bus, event) = (self.handler.clone(), self.bus.clone(), event.clone());
        let wait = Duration::from_millis(bus.world.between(1, 60_000));
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            bus.life.here().await;
            handler.handle(&event, 1).await;
        });
    }

    /// The broker acknowledges before it gives the next one or waits for it: whichever comes first is the moment.
    fn die_acknowledged(&self) {
        self.dying.store(true, Ordering::SeqCst);
        let life = self.bus.life.clone();
        tokio::spawn(async move { life.kill("after an acknowledgement") });
    }
}

#[async_trait]
impl Handler for Fickle {
    async fn handle(&self, event: &Event, attempt: u64) -> Handled {
        let SimBus { disk, life, world, .. } = &self.bus;
        if self.dying.load(Ordering::SeqCst) {
            life.kill("after an acknowledgement");
        }
        life.here().await;
        let faults = world.faults();
        if event.event.aggregate_kind != POISON && world.chance(faults.event_late) {
            self.again_later(event);
            return Handled::Done;
        }
        let mut handled = self.handler.handle(event, attempt).await;
        if world.chance(faults.event_doubled) {
            life.here().await;
            handled = self.handler.handle(event, attempt).await;
        }
        if event.event.aggregate_kind == POISON {
            self.bus.invariants.poisoned(life.service, event, matches!(handled, Handled::Later(_)));
        }
        life.step("before an acknowledgement").await;
        if matches!(handled, Handled::Done) {
            if let Some(what) = acknowledged::missing(life.service, &disk.store, event).await {
                world.wrong(3, format!("{} acknowledges what it did not commit: {what}", life.name()));
            }
            if world.extras().dies_acked && world.more().chance(faults.crash) {
                self.die_acknowledged();
            }
        }
        handled
    }
}
