//! Which site a command is about.

use std::path::{Path, PathBuf};

use kiln_model::name::SiteName;

use crate::failure::{Code, Failure, Outcome};

/// Where the sites of a machine are, a folder for each.
const SITES: &str = "/var/lib/kiln";

/// The site's folder, made or not.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    folder: PathBuf,
    name: SiteName,
}

impl Home {
    pub(crate) fn new(folder: Option<PathBuf>, site: &str) -> Outcome<Self> {
        let name: SiteName =
            site.parse().map_err(|error| Failure::new(Code::Invalid, "the option --site", error))?;
        let folder = folder.unwrap_or_else(|| Path::new(SITES).join(name.as_str()));
        // The supervisor and the services work from `/`: a path that is relative to here would be another one there.
        let folder = std::path::absolute(&folder).map_err(|error| {
            Failure::new(Code::Invalid, format!("the folder {}", folder.display()), error)
        })?;
        Ok(Self { folder, name })
    }

    /// The folders of the sites that lie where sites do.
    pub(crate) fn all() -> Vec<PathBuf> {
        let entries = std::fs::read_dir(SITES).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The name that a new site gets; one that exists has its own in `site.toml`.
    pub(crate) fn name(&self) -> &SiteName {
        &self.name
    }

    pub(crate) fn site_file(&self) -> PathBuf {
        self.folder.join("site.toml")
    }

    pub(crate) fn exists(&self) -> bool {
        self.site_file().exists()
    }
}
