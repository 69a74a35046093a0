//! What else happens in a share of the stories.

use std::time::Duration;

use jiff::SignedDuration;
use kiln_bus::Bus as _;
use kiln_model::event::{Event, EventType, NewEvent, Service};

use super::Story;
use crate::bus::POISON;
use crate::nature::Nature;
use crate::site::RESYNC;

/// An image is kept for a day whoever holds it.
const MORE_THAN_A_DAY: SignedDuration = SignedDuration::from_hours(25);
/// The archive is looked at every 20 s.
const FLAP: Duration = Duration::from_secs(21);

impl Story {
    pub(super) async fn act_more(&mut self) {
        let approves = self.world().extras().approve;
        match self.world().more().between(0, 11) {
            0..=3 => self.cancel().await,
            4 => self.remove().await,
            5 | 6 => self.poison().await,
            7 => self.flap_definition().await,
            8 | 9 => self.collect().await,
            _ if approves => self.approve().await,
            _ => self.cancel().await,
        }
    }

    /// Things come from the broker that nobody can take, or that who takes them refuses for good.
    async fn poison(&mut self) {
        let kinds = [
            (Service::Monitor, "server", "needs_update"),
            (Service::Builder, "revision", "created"),
            (Service::Builder, "definition", "applied"),
            (Service::Deployer, "instance", "changed"),
        ];
        for (service, entity, verb) in kinds {
            let kind = EventType::new(service, entity, verb);
            // No message begins so, without headers and with them; or a message without the field that it is about.
            self.send(kind.clone(), 0xff, false).await;
            self.send(kind.clone(), 0xff, true).await;
            if matches!(entity, "server" | "revision") {
                self.send(kind, 0xc0, true).await;
            }
        }
    }

    async fn send(&mut self, kind: EventType, first: u8, with_headers: bool) {
        let number = self.poison.len() as u64 + 1;
        let payload = vec![first, 0x3e, u8::try_from(number % 100).unwrap()];
        let (bus, server) = (self.site.broker.now(), Some(crate::settled::web()));
        self.world().tell(format!("poison {number} comes as {}", kind.ce_type()));
        let sent = if with_headers {
            let event = NewEvent {
                kind,
                server,
                aggregate_kind: POISON.to_owned(),
                aggregate_id: number.to_string(),
                aggregate_version: 1,
                payload: payload.clone(),
                time: self.world().wall(),
                traceparent: String::new(),
            };
            let id = Event::id_of(POISON, &event, 0);
            bus.publish(&Event { id, sequence: number, epoch: POISON.to_owned(), event }).await
        } else {
            let subject = kind.subject(&"sim".parse().unwrap(), server.as_ref());
            bus.publish_raw(&subject, Default::default(), &payload)
        };
        if sent.is_ok() {
            self.poison.push((self.site.broker.wipes(), payload));
        }
    }

    /// The archive has something else each time that somebody looks.
    pub(super) async fn flap_packages(&self) {
        self.world().tell("the archive flaps");
        for _ in 0..35 {
            self.site.outside.publish(Nature::Good);
            tokio::time::sleep(FLAP).await;
        }
    }

    /// Somebody commits one and the other in turn.
    async fn flap_definition(&mut self) {
        let world = self.world().clone();
        let one = self.former.last().cloned().unwrap();
        let other = world.more().pick(&self.former).cloned().unwrap();
        for _ in 0..6 {
            for definition in [&other, &one] {
                self.commit(definition.clone());
                tokio::time::sleep(Duration::from_millis(world.more().between(500, 6_000))).await;
            }
        }
    }

    /// A day goes by, and what nobody needs is collected.
    async fn collect(&mut self) {
        let world = self.world().clone();
        world.tell("a day goes by");
        world.shift_wall(MORE_THAN_A_DAY);
        // By then the deployer was heard of after that, where it is there.
        tokio::time::sleep(RESYNC + RESYNC / 2).await;
        if self.site.any_life(Service::Deployer).is_some_and(|life| !life.is_dead()) {
            self.site.collect().await;
        }
    }
}
