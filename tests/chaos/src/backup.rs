//! A backup of a site, and the site out of it again, as an operator does both.

use kiln_tests::Result;
use kiln_tests::site::Site;

use crate::stores::OF_SITE;

pub(crate) struct Backup {
    folder: tempfile::TempDir,
}

impl Backup {
    /// # Errors
    /// What `kiln backup` said.
    pub(crate) fn take(site: &Site) -> Result<Self> {
        let backup = Self { folder: tempfile::tempdir()? };
        site.kiln(&backup.command("backup").each_ref().map(String::as_str))?;
        Ok(backup)
    }

    fn command(&self, verb: &str) -> [String; 4] {
        let path = |name: &str| self.folder.path().join(name).display().to_string();
        [verb.to_owned(), path("site.kiln"), "--key".to_owned(), path("key")]
    }

    /// Onto what is as good as another machine: nothing of the site is left, its instances neither. Every store begins a
    /// new epoch.
    ///
    /// # Errors
    /// What one of the commands said, or a store that goes on in its epoch.
    pub(crate) async fn restore(&self, site: &Site) -> Result<()> {
        let mut lost = Vec::new();
        for service in OF_SITE {
            lost.push((service, site.position(service).await?));
        }
        site.erase()?;
        site.kiln(&self.command("restore").each_ref().map(String::as_str))?;
        for (service, lost) in lost {
            let found = site.position(service).await?;
            if found.epoch == lost.epoch {
                return Err(format!("{service} goes on from {lost:?} at {found:?}").into());
            }
        }
        site.kiln(&["up"]).map(drop)
    }
}
