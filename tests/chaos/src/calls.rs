//! Calls that are made while something happens, each until it is acknowledged: none of them may be forgotten after that.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_api::builder::GetServerRequest;
use kiln_api::deployer::RollbackRequest;
use kiln_api::monitor::{ListSignalsRequest, ReportSignalRequest};
use kiln_api::types::{ListOptions, Remedy, Signal};
use kiln_service::requests::new_id;
use kiln_tests::Result;
use kiln_tests::command::run;
use kiln_tests::free_port;
use kiln_tests::site::{Site, edge};
use kiln_tests::wait::until;

/// On an acknowledgement: whoever is away comes back within it.
const ANSWERED: Duration = Duration::from_secs(120);

const REPORTS: u64 = 3;
const BETWEEN: Duration = Duration::from_millis(700);

/// The server that the calls are about, beside the one that follows Git.
pub(crate) const SERVER: &str = "side";

/// What was acknowledged, and what therefore must be.
pub(crate) struct Calls {
    folder: tempfile::TempDir,
    port: u16,
    /// Ids of signals.
    signals: BTreeSet<String>,
    /// The definition that was applied last.
    definition: String,
    /// The page that it shows, and the one that a rollback goes back to.
    page: String,
    former: Option<String>,
}

impl Calls {
    /// # Errors
    /// What keeps the definition from being written or applied.
    pub(crate) async fn begin(site: &Site) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let definition = Path::new(env!("CARGO_MANIFEST_DIR")).join("../definitions/web");
        run(Command::new("cp").arg("-rT").arg(definition).arg(folder.path()))?;
        let port = free_port()?;
        let text = std::fs::read_to_string(folder.path().join("server.yaml"))?
            .replace("name: web", &format!("name: {SERVER}"))
            .replace("replicas: 3", "replicas: 1")
            .replace("listen: 8080", &format!("listen: {port}"));
        std::fs::write(folder.path().join("server.yaml"), text)?;
        let mut calls = Self {
            folder,
            port,
            signals: BTreeSet::new(),
            definition: String::new(),
            page: String::new(),
            former: None,
        };
        calls.apply(site, "at first").await?;
        calls.former = None;
        Ok(calls)
    }

    pub(crate) fn address(&self) -> std::net::SocketAddr {
        edge(self.port)
    }

    pub(crate) fn page(&self) -> &str {
        &self.page
    }

    /// Applies another text, or goes back to the one before, in turn; and reports, some time apart.
    ///
    /// # Errors
    /// Where one of the calls is not acknowledged within the bound.
    pub(crate) async fn make(&mut self, site: &Site, round: u64) -> Result<()> {
        match self.former.take() {
            Some(former) => {
                self.roll_back(site).await?;
                self.page = former;
            }
            None => self.apply(site, &format!("in round {round}")).await?,
        }
        for number in 1..=REPORTS {
            tokio::time::sleep(BETWEEN).await;
            self.report(site, &format!("{round}-{number}")).await?;
        }
        Ok(())
    }

    async fn apply(&mut self, site: &Site, text: &str) -> Result<()> {
        std::fs::write(self.site_page(), format!("<h1>Hello {text}</h1>\n"))?;
        let folder = self.folder.path().display().to_string();
        let answer = until("an apply", ANSWERED, async || site.json(&["apply", &folder])).await?;
        let digest = answer["servers"][0]["definition_digest"].as_str().ok_or_else(|| answer.to_string())?;
        digest.clone_into(&mut self.definition);
        self.former = Some(std::mem::replace(&mut self.page, text.to_owned()));
        Ok(())
    }

    fn site_page(&self) -> PathBuf {
        self.folder.path().join("site/index.html")
    }

    /// The same request until it is answered: one that was carried out without an answer must not go back twice.
    async fn roll_back(&self, site: &Site) -> Result<()> {
        let mut request = RollbackRequest {
            request_id: new_id(),
            server: SERVER.to_owned(),
            reason: "chaos".to_owned(),
            ..RollbackRequest::default()
        };
        request.expected_release =
            until("the fleet", ANSWERED, async || Ok(site.fleet(SERVER).await?.release)).await?;
        until("a rollback", ANSWERED, async || {
            site.deployer().rollback(request.clone()).await.map(drop).map_err(Into::into)
        })
        .await
    }

    async fn report(&mut self, site: &Site, id: &str) -> Result<()> {
        let request = ReportSignalRequest {
            request_id: new_id(),
            server: SERVER.to_owned(),
            reporter: "chaos".to_owned(),
            id: id.to_owned(),
            summary: "something was seen".to_owned(),
            remedy: Remedy::Rebuild.into(),
            instance: String::new(),
        };
        let answer = until("a report", ANSWERED, async || {
            site.monitor().report_signal(request.clone()).await.map_err(Into::into)
        })
        .await?;
        self.signals.insert(answer.into_inner().signal.ok_or("no signal")?.id);
        Ok(())
    }

    /// Whether the services know of everything that they acknowledged; what runs is looked at by the caller.
    ///
    /// # Errors
    /// What was forgotten, or who is away.
    pub(crate) async fn are_remembered(&self, site: &Site) -> Result<()> {
        let request = GetServerRequest { server: SERVER.to_owned() };
        let server = site.builder().get_server(request).await?.into_inner().server.ok_or("no server")?;
        if server.definition_digest != self.definition {
            return Err(format!("{} was applied: {server:?}", self.definition).into());
        }
        let known: BTreeSet<_> = signals(site).await?.into_iter().map(|signal| signal.id).collect();
        let forgotten: Vec<_> = self.signals.difference(&known).collect();
        if forgotten.is_empty() { Ok(()) } else { Err(format!("signals {forgotten:?} are forgotten").into()) }
    }
}

/// Every signal that the monitor knows, also of old.
///
/// # Errors
/// Where the monitor is away.
pub(crate) async fn signals(site: &Site) -> Result<Vec<Signal>> {
    let mut all = Vec::new();
    let mut page_token = String::new();
    loop {
        let options = Some(ListOptions { page_token, ..ListOptions::default() });
        let request = ListSignalsRequest { options, server: String::new() };
        let answer = site.monitor().list_signals(request).await?.into_inner();
        all.extend(answer.signals);
        page_token = answer.info.map(|info| info.next_page_token).unwrap_or_default();
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}
