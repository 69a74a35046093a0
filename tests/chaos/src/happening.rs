//! What can happen to a site, and how it is brought about.

use std::time::Duration;

use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::random::Random;
use kiln_tests::site::{Site, full};
use kiln_tests::wait::until;
use rustix::process::{Pid, Signal, kill_process};

use crate::backup::Backup;
use crate::deck::shuffled;
use crate::disk::Disk;
use crate::kernel;
use crate::stores::{self, Copy, OF_SITE};
use crate::wire::{Cut, Wire};

pub(crate) const SERVICES: [&str; 4] = ["builder", "deployer", "monitor", "node"];
const PROCESSES: [&str; 5] = ["builder", "deployer", "monitor", "node", "nats"];
const OWNERS: [Service; 4] = [Service::Builder, Service::Deployer, Service::Monitor, Service::Node];

/// Both ends are told of such a cut at their next word, and try to connect until it is mended.
const CUT: Duration = Duration::from_secs(8);
/// A client asks every 10 s whether the broker is there, and gives the connection up when it would ask a third time with
/// two answers missing: 30 s after the last word at the latest. Then it tries to connect, in vain at first.
const SILENCE: Duration = Duration::from_secs(35);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// SIGKILL of every service and of the broker, one after the other.
    Killed,
    /// SIGSTOP of one of them.
    Frozen,
    BrokerWiped,
    BrokerCut,
    DiskFull,
    StoreCutShort,
    StoreRestored,
    /// A store of the database.
    SchemaRestored,
    /// By `kiln restore`, on another machine.
    SiteRestored,
    /// As a reboot does.
    AllKilled,
    DatabaseKilled,
    DatabaseFrozen,
}

impl Kind {
    pub(crate) const ON_FILES: [Self; 9] = [
        Self::Killed,
        Self::Frozen,
        Self::BrokerWiped,
        Self::BrokerCut,
        Self::DiskFull,
        Self::StoreCutShort,
        Self::StoreRestored,
        Self::SiteRestored,
        Self::AllKilled,
    ];
    pub(crate) const OF_DATABASE: [Self; 4] =
        [Self::DatabaseKilled, Self::DatabaseFrozen, Self::SchemaRestored, Self::AllKilled];
    pub(crate) const ON_POSTGRES: [Self; 10] = [
        Self::DatabaseKilled,
        Self::DatabaseFrozen,
        Self::SchemaRestored,
        Self::SiteRestored,
        Self::Killed,
        Self::Frozen,
        Self::BrokerWiped,
        Self::BrokerCut,
        Self::DiskFull,
        Self::AllKilled,
    ];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Done {
    Midway,
    Whole,
}

impl Done {
    const ALL: [Self; 2] = [Self::Midway, Self::Whole];
}

/// One of a kind, with everything that chance says about it.
#[derive(Debug, Clone)]
pub(crate) enum Happening {
    Killed(Vec<(&'static str, Duration)>),
    Frozen(&'static str, Duration),
    BrokerWiped,
    BrokerCut(Cut, Duration),
    DiskFull(Duration),
    StoreCutShort(Service, u64),
    /// As it was before the round, in the middle of it or once all that was asked for is done.
    StoreRestored(Service, Done),
    SiteRestored(Done),
    AllKilled,
    DatabaseKilled(Duration),
    DatabaseFrozen(Duration),
}

/// What was put aside before, to go back to.
pub(crate) enum Kept {
    Store(Copy),
    Site(Backup),
}

impl Happening {
    /// Sampled, a stop lasts longer than the lease of a build (20 s), the broker's wait for an ack (30 s), a statement
    /// (10 s) and a connection (12 s) of a database.
    pub(crate) fn of(kind: Kind, random: &mut Random) -> Self {
        let long = |sampled| Duration::from_secs(if full() { 60 } else { sampled });
        match kind {
            Kind::Killed => {
                let order = shuffled(&PROCESSES, random);
                let pause = |random: &mut Random| Duration::from_millis(random.below(1500));
                Self::Killed(order.into_iter().map(|process| (process, pause(random))).collect())
            }
            Kind::Frozen => Self::Frozen(one(&PROCESSES, random), long(32)),
            Kind::BrokerWiped => Self::BrokerWiped,
            Kind::BrokerCut => match one(&[Cut::Silent, Cut::Reset], random) {
                Cut::Silent => Self::BrokerCut(Cut::Silent, SILENCE),
                Cut::Reset => Self::BrokerCut(Cut::Reset, CUT),
            },
            Kind::DiskFull => Self::DiskFull(Duration::from_secs(4)),
            Kind::StoreCutShort => Self::StoreCutShort(one(&OWNERS, random), random.below(1000)),
            Kind::StoreRestored => Self::StoreRestored(one(&OWNERS, random), one(&Done::ALL, random)),
            Kind::SchemaRestored => Self::StoreRestored(one(&OF_SITE, random), one(&Done::ALL, random)),
            Kind::SiteRestored => Self::SiteRestored(one(&Done::ALL, random)),
            Kind::AllKilled => Self::AllKilled,
            // Longer than a service waits for a connection.
            Kind::DatabaseKilled => Self::DatabaseKilled(Duration::from_secs(6)),
            Kind::DatabaseFrozen => Self::DatabaseFrozen(long(14)),
        }
    }

    /// Whether instances end in it: users notice, and the monitor has something to say.
    pub(crate) fn ends_instances(&self) -> bool {
        matches!(self, Self::AllKilled | Self::StoreRestored(Service::Node, _) | Self::SiteRestored(_))
    }

    /// Whether what was done since the round began is forgotten in it.
    pub(crate) fn forgets(&self) -> bool {
        matches!(self, Self::StoreRestored(..) | Self::SiteRestored(_))
    }

    /// Whether releases are: numbers go on past those.
    pub(crate) fn forgets_releases(&self) -> bool {
        matches!(self, Self::StoreRestored(Service::Deployer, _) | Self::SiteRestored(_))
    }

    /// Whether it waits for the end of what it comes after.
    pub(crate) fn comes_late(&self) -> bool {
        matches!(self, Self::StoreRestored(_, Done::Whole) | Self::SiteRestored(Done::Whole))
    }

    /// Whether a build can fail by it, which is then tried again.
    pub(crate) fn fails_builds(&self) -> bool {
        matches!(self, Self::DiskFull(_))
    }

    /// Puts aside what it goes back to.
    ///
    /// # Errors
    /// Where that can't be copied.
    pub(crate) async fn keep(&self, site: &Site) -> Result<Option<Kept>> {
        Ok(match self {
            Self::StoreRestored(service, _) => Some(Kept::Store(Copy::take(site, *service).await?)),
            Self::SiteRestored(_) => Some(Kept::Site(Backup::take(site)?)),
            _ => None,
        })
    }

    /// Brings it about, to its end.
    ///
    /// # Errors
    /// Where it can't be, or what should have been noticed was not.
    pub(crate) async fn happen(&self, site: &Site, disk: &Disk, kept: Option<&Kept>) -> Result<()> {
        match self {
            Self::Killed(order) => {
                for (process, pause) in order {
                    // It may be on its way up still.
                    until(process, Duration::from_secs(30), async || site.signal(process, Signal::KILL))
                        .await?;
                    tokio::time::sleep(*pause).await;
                }
                Ok(())
            }
            Self::Frozen(process, still) => {
                site.signal(process, Signal::STOP)?;
                tokio::time::sleep(*still).await;
                site.signal(process, Signal::CONT)
            }
            Self::BrokerWiped => wipe(site).await,
            Self::BrokerCut(how, away) => {
                let wire = Wire::cut(site, *how)?;
                tokio::time::sleep(*away).await;
                drop(wire);
                Ok(())
            }
            Self::DiskFull(long) => {
                disk.fill()?;
                tokio::time::sleep(*long).await;
                disk.free()
            }
            Self::StoreCutShort(service, part) => {
                let from = stores::log_length(site, *service);
                let whole = stores::cut_short(site, *service, *part)?;
                stores::refuses(site, *service, from).await?;
                whole.put_back(site)
            }
            Self::StoreRestored(..) | Self::SiteRestored(_) => match kept.ok_or("nothing was put aside")? {
                Kept::Store(copy) => copy.restore(site).await,
                Kept::Site(backup) => backup.restore(site).await,
            },
            Self::AllKilled => reboot(site).await,
            Self::DatabaseKilled(away) => tokio::task::block_in_place(|| site.kill_database(*away)),
            Self::DatabaseFrozen(still) => tokio::task::block_in_place(|| site.freeze_database(*still)),
        }
    }
}

fn one<T: std::marker::Copy>(all: &[T], random: &mut Random) -> T {
    let at = random.below(all.len() as u64);
    all[usize::try_from(at).unwrap_or_default()]
}

async fn wipe(site: &Site) -> Result<()> {
    // At once, as it makes and removes files itself; it writes on into what it has open, until it is killed. One that
    // ended often in a short time is not started again at once.
    let data = site.home().join("nats/jetstream");
    let gone = data.with_extension(format!("deleted-{}", site.pid("nats")?));
    until("the broker's data", Duration::from_secs(30), async || {
        std::fs::rename(&data, &gone).map_err(Into::into)
    })
    .await?;
    site.signal("nats", Signal::KILL)?;
    Ok(std::fs::remove_dir_all(gone)?)
}

/// Everything that runs is killed at once, the instances, what holds them and the database too, and the kernel knows
/// nothing of the site any more.
async fn reboot(site: &Site) -> Result<()> {
    // First the one that would start the others again. One may be on its way up, and is found below.
    site.signal("supervisor", Signal::KILL)?;
    for process in PROCESSES {
        let _ = site.signal(process, Signal::KILL);
    }
    if site.has_database() {
        tokio::task::block_in_place(|| site.kill_database(Duration::ZERO))?;
    }
    until("the end of every process", Duration::from_secs(30), async || {
        let left = processes(site)?;
        for pid in &left {
            // It may end by itself meanwhile.
            let _ = kill_process(*pid, Signal::KILL);
        }
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}").into()) }
    })
    .await?;
    kernel::forgets(site).await?;
    site.kiln(&["up"]).map(drop)
}

fn processes(site: &Site) -> Result<Vec<Pid>> {
    let lines = site.on_machine()?;
    let pids =
        lines.iter().filter_map(|line| line.strip_prefix("process: ")?.split(' ').next()?.parse().ok());
    Ok(pids.filter_map(Pid::from_raw).collect())
}
