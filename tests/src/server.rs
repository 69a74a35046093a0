//! The server that most scenarios and benchmarks are about: three nginx behind one port, from a Git repository.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_api::builder::ListRevisionsRequest;
use kiln_api::deployer::Fleet;
use kiln_api::engine::{InstanceState, ListInstancesRequest};
use kiln_api::types::Revision;

use crate::Result;
use crate::free_port;
use crate::load::{Load, Options};
use crate::repo::Repo;
use crate::site::{Site, edge};

/// From an apply or a commit to a whole fleet, with everything that must be fetched and baked.
pub const SETTLES: Duration = Duration::from_secs(120);

pub struct Web {
    pub site: Site,
    pub repo: Repo,
    pub port: u16,
    /// Holds the repository.
    folder: tempfile::TempDir,
}

impl Web {
    /// Three healthy instances of release 1.
    ///
    /// # Errors
    /// What was refused, or what is missing when the bound is over.
    pub async fn start(site: Site) -> Result<Self> {
        Self::start_with(site, |_| Ok(())).await
    }

    /// As [`Web::start`], with changes of the definition before it is applied.
    ///
    /// # Errors
    /// What was refused, or what is missing when the bound is over.
    pub async fn start_with(site: Site, change: impl FnOnce(&Repo) -> Result<()>) -> Result<Self> {
        let web = Self::apply(site, change)?;
        web.settled(1).await?;
        Ok(web)
    }

    /// The definition is applied; nothing is waited for.
    ///
    /// # Errors
    /// What was refused.
    pub fn apply(site: Site, change: impl FnOnce(&Repo) -> Result<()>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let definition = Path::new(env!("CARGO_MANIFEST_DIR")).join("definitions/web");
        let repo = Repo::with(&folder.path().join("servers"), "web", &definition)?;
        let port = free_port()?;
        repo.replace("web/server.yaml", "listen: 8080", &format!("listen: {port}"))?;
        change(&repo)?;
        repo.commit("Choose a port")?;
        site.kiln(&["apply", &repo.url(), "--branch", "main"])?;
        Ok(Self { site, repo, port, folder })
    }

    /// For whatever else the test needs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn address(&self) -> SocketAddr {
        edge(self.port)
    }

    /// Four clients, a connection for each request.
    pub fn load(&self) -> Load {
        Load::start(Options {
            target: self.address(),
            path: "/".to_owned(),
            clients: 4,
            rate: 400.0,
            wanted: "Hello".to_owned(),
        })
    }

    /// Commits another text for the page.
    ///
    /// # Errors
    /// Where git fails.
    pub fn say(&self, text: &str) -> Result<String> {
        self.repo.write("web/site/index.html", &format!("<h1>Hello {text}</h1>\n"))?;
        self.repo.commit(&format!("Say {text}"))
    }

    /// # Errors
    /// When the bound is over, with what is missing.
    pub async fn settled(&self, release: u64) -> Result<Fleet> {
        self.site.settled("web", release, SETTLES).await
    }

    /// The newest revision.
    ///
    /// # Errors
    /// Where there is none.
    pub async fn revision(&self) -> Result<Revision> {
        let request = ListRevisionsRequest { server: "web".to_owned(), ..Default::default() };
        let revisions = self.site.builder().list_revisions(request).await?.into_inner().revisions;
        revisions.into_iter().max_by_key(|revision| revision.generation).ok_or_else(|| "no revision".into())
    }

    /// The main processes of what runs.
    ///
    /// # Errors
    /// Where the node does not answer.
    pub async fn pids(&self) -> Result<Vec<u32>> {
        let listed = self.site.engine().list_instances(ListInstancesRequest::default()).await?.into_inner();
        let running = listed.instances.into_iter().filter(|i| i.state() == InstanceState::Running);
        Ok(running.map(|instance| instance.pid).collect())
    }

    /// The main process of one instance.
    ///
    /// # Errors
    /// Where the node does not know it.
    pub async fn pid_of(&self, id: &str) -> Result<u32> {
        let listed = self.site.engine().list_instances(ListInstancesRequest::default()).await?.into_inner();
        let found = listed.instances.iter().find(|i| i.spec.as_ref().is_some_and(|spec| spec.id == id));
        Ok(found.ok_or_else(|| format!("the node does not know {id}"))?.pid)
    }

    /// The newest image as a folder in OCI layout.
    ///
    /// # Errors
    /// Where the export fails.
    pub fn export(&self) -> Result<PathBuf> {
        self.site.export("web", self.folder())
    }
}
