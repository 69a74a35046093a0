//! What befalls instances, processes, the broker, what is outside, and clocks.

use std::time::Duration;

use jiff::SignedDuration;
use kiln_model::event::Service;
use kiln_model::name::InstanceId;

use super::Story;

impl Story {
    pub(super) fn strike_instance(&self) {
        let world = self.world();
        let machine = self.site.invariants.machine.lock().unwrap();
        let now = tokio::time::Instant::now();
        let running = machine.instances.iter().filter(|(_, held)| held.is_fleet() && held.answers(now));
        let running: Vec<InstanceId> = running.map(|(id, _)| id.clone()).collect();
        drop(machine);
        let Some(id) = world.pick(&running) else { return };
        self.site.invariants.excuse(&id.server, id.release);
        let strike = |change: &dyn Fn(&mut crate::nature::Course)| {
            let mut machine = self.site.invariants.machine.lock().unwrap();
            change(&mut machine.instances.get_mut(id).unwrap().course);
        };
        match world.between(0, 2) {
            0 => self.site.node.exit(id, 137),
            1 => {
                world.tell(format!("{id} hangs"));
                strike(&|course| course.hangs = true);
            }
            _ => {
                let period = Duration::from_millis(world.between(1_000, 20_000));
                world.tell(format!("{id} flaps, every {period:?}"));
                strike(&|course| course.flaps = Some(period));
            }
        }
    }

    pub(super) fn kill(&self) {
        let service = *self.world().pick(&Service::ALL).unwrap();
        if let Some(life) = self.site.any_life(service) {
            life.kill("by SIGKILL");
        }
    }

    /// A process stands still; where it is not the node, another one takes its place meanwhile. Then it goes on.
    pub(super) fn freeze(&self) {
        let site = self.site.clone();
        let world = self.world().clone();
        let service = *world.pick(&Service::ALL).unwrap();
        let Some(life) = site.any_life(service).filter(|life| !life.is_dead()) else { return };
        tokio::spawn(async move {
            life.freeze();
            if service != Service::Node && world.chance(0.7) {
                tokio::time::sleep(Duration::from_millis(world.between(0, 10_000))).await;
                if !life.is_dead() {
                    site.start(service, life.replica);
                }
            }
            tokio::time::sleep(Duration::from_millis(world.between(100, 90_000))).await;
            life.thaw();
            let replaced =
                site.life(service, life.replica).is_some_and(|newest| newest.name() != life.name());
            if replaced {
                tokio::time::sleep(Duration::from_millis(world.between(100, 30_000))).await;
                life.kill("since it was replaced");
            }
        });
    }

    /// The machine goes down with everything on it.
    pub(super) fn reboot(&self) {
        self.world().tell("the machine goes down");
        for life in self.site.lives() {
            life.kill("with the machine");
        }
        let ids: Vec<InstanceId> =
            self.site.invariants.machine.lock().unwrap().instances.keys().cloned().collect();
        for id in ids {
            self.site.node.exit(&id, 137);
        }
    }

    pub(super) fn trouble_broker(&self) {
        let world = self.world().clone();
        let broker = self.site.broker.clone();
        if world.chance(0.4) {
            world.tell("the broker's data is deleted");
            broker.wipe();
            return;
        }
        world.tell("the broker is away");
        broker.set_away(true);
        let away = Duration::from_millis(world.between(100, 120_000));
        tokio::spawn(async move {
            tokio::time::sleep(away).await;
            broker.set_away(false);
            world.tell("the broker is back");
        });
    }

    pub(super) fn trouble_outside(&self) {
        let world = self.world().clone();
        let outside = self.site.outside.clone();
        let git = world.chance(0.5);
        let set = move |away| if git { outside.set_git_away(away) } else { outside.set_archive_away(away) };
        world.tell(if git { "the repository is away" } else { "the archive is away" });
        set(true);
        let away = Duration::from_millis(world.between(100, 90_000));
        tokio::spawn(async move {
            tokio::time::sleep(away).await;
            set(false);
            world.tell("repository and archive are there");
        });
    }

    /// Of the machine that all services are on, or of one that a service has for itself.
    pub(super) fn fill_disk(&self) {
        let more = self.world().more();
        let one = *more.pick(&Service::ALL).unwrap();
        let of = if more.chance(0.5) { Service::ALL.to_vec() } else { vec![one] };
        let long = Duration::from_millis(more.between(100, 90_000));
        self.world().tell(format!("the disk of {of:?} is full, for {long:?}"));
        for service in of {
            self.site.disk(service).fill_until(tokio::time::Instant::now() + long);
        }
    }

    pub(super) fn jump(&self) {
        let seconds = i64::try_from(self.world().between(1, 30 * 3600)).unwrap();
        let by = if self.world().chance(0.5) { seconds } else { -seconds };
        self.world().tell(format!("the wall clock jumps by {by} s"));
        self.world().shift_wall(SignedDuration::from_secs(by));
    }
}
