//! Copies of a store, and damage to its file.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::site::Site;
use kiln_tests::stores::Position;
use kiln_tests::wait::until;
use rustix::process::Signal;

/// Whose state is the site's, and not a machine's: in the database where there is one, and in a backup.
pub(crate) const OF_SITE: [Service; 3] = [Service::Builder, Service::Deployer, Service::Monitor];

/// A store as it was at one moment.
pub(crate) struct Copy {
    service: Service,
    /// Holds its files, or a dump of its schema.
    folder: tempfile::TempDir,
    /// Where the store was; not looked at where nobody asks.
    position: Option<Position>,
}

const FILES: [&str; 2] = ["store.db", "store.db-wal"];
const DUMP: &str = "store.sql";

fn store(site: &Site, service: Service) -> PathBuf {
    site.home().join(service.as_str())
}

impl Copy {
    /// Taken while the service stands still: between two of its writes, as a snapshot of a file system is.
    ///
    /// # Errors
    /// Where the service does not run, or its store can't be read.
    pub(crate) async fn take(site: &Site, service: Service) -> Result<Self> {
        let in_database = site.is_in_database(service)?;
        site.signal(service.as_str(), Signal::STOP)?;
        let taken = if in_database { Self::of_schema(site, service) } else { Self::of_files(site, service) };
        let position = site.position(service).await;
        site.signal(service.as_str(), Signal::CONT)?;
        Ok(Self { position: Some(position?), ..taken? })
    }

    fn of_files(site: &Site, service: Service) -> Result<Self> {
        let copy = Self { service, folder: tempfile::tempdir()?, position: None };
        for name in FILES {
            let from = store(site, service).join(name);
            if from.exists() {
                fs::copy(&from, copy.folder.path().join(name))?;
            }
        }
        Ok(copy)
    }

    fn of_schema(site: &Site, service: Service) -> Result<Self> {
        let copy = Self { service, folder: tempfile::tempdir()?, position: None };
        site.dump_store(service, &copy.folder.path().join(DUMP))?;
        Ok(copy)
    }

    /// Puts it in the place of what is there, with all services down meanwhile; the instances serve on.
    ///
    /// # Errors
    /// What `kiln down` or `kiln up` said.
    pub(crate) fn put_back(&self, site: &Site) -> Result<()> {
        site.kiln(&["down", "--keep-instances"])?;
        self.replace(site)?;
        site.kiln(&["up"]).map(drop)
    }

    /// As [`Copy::put_back`]; and the service must have noticed that something is lost, and have begun a new epoch: else
    /// nobody would ask it for all that it has, and numbers would be given out twice.
    ///
    /// # Errors
    /// What `kiln down` or `kiln up` said, or that it goes on in the epoch of the copy.
    pub(crate) async fn restore(&self, site: &Site) -> Result<()> {
        site.kiln(&["down", "--keep-instances"])?;
        let last = site.position(self.service).await?;
        self.replace(site)?;
        site.kiln(&["up"])?;
        if self.position.as_ref() == Some(&last) {
            // Nothing was written since the copy.
            return Ok(());
        }
        until("a new epoch", Duration::from_secs(30), async || {
            let now = site.position(self.service).await?;
            if now.epoch == last.epoch { Err(format!("{now:?}").into()) } else { Ok(()) }
        })
        .await
    }

    fn replace(&self, site: &Site) -> Result<()> {
        if site.is_in_database(self.service)? {
            return site.put_back_store(self.service, &self.folder.path().join(DUMP));
        }
        let place = store(site, self.service);
        for name in ["store.db", "store.db-wal", "store.db-shm"] {
            remove(&place.join(name))?;
            let from = self.folder.path().join(name);
            if from.exists() {
                fs::copy(&from, place.join(name))?;
            }
        }
        Ok(())
    }
}

/// Cuts a store's file short, with a part out of a thousand left and its log gone, while its service is killed: with a
/// whole log all might be there still. Gives what it was.
///
/// # Errors
/// Where the service does not run, or its files can't be written.
pub(crate) fn cut_short(site: &Site, service: Service, part: u64) -> Result<Copy> {
    // It would start the service again in between.
    site.signal("supervisor", Signal::STOP)?;
    let cut = || {
        site.signal(service.as_str(), Signal::KILL)?;
        let copy = Copy::of_files(site, service)?;
        let place = store(site, service);
        let file = fs::File::options().write(true).open(place.join("store.db"))?;
        file.set_len(file.metadata()?.len() * part / 1000)?;
        remove(&place.join("store.db-wal"))?;
        Ok(copy)
    };
    let copy = cut();
    site.signal("supervisor", Signal::CONT)?;
    copy
}

/// Waits until a service has said in its log that it refuses to start, and what to do.
///
/// # Errors
/// When the bound is over, with the end of the log.
pub(crate) async fn refuses(site: &Site, service: Service, from: u64) -> Result<()> {
    let path = log(site, service);
    until("a refusal in words", Duration::from_secs(30), async || {
        let text = fs::read_to_string(&path)?;
        let new = text.get(usize::try_from(from)?..).unwrap_or(&text);
        let said = new
            .lines()
            .any(|line| line.contains("store.db") && line.contains("in its place") && line.contains("copy"));
        if said { Ok(()) } else { Err(new.to_owned().into()) }
    })
    .await
}

/// How long a service's log is.
pub(crate) fn log_length(site: &Site, service: Service) -> u64 {
    fs::metadata(log(site, service)).map_or(0, |log| log.len())
}

fn log(site: &Site, service: Service) -> PathBuf {
    site.home().join(format!("logs/{service}.log"))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{}: {error}", path.display()).into())
        }
        _ => Ok(()),
    }
}
