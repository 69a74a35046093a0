//! What the builder asks of the deployer and the monitor, so that a simulation can answer.

use async_trait::async_trait;
use kiln_api::deployer::deployer_service_client::DeployerServiceClient;
use kiln_api::deployer::{Fleet, ListFleetsRequest, ListReleasesRequest, Release};
use kiln_api::monitor::ListSignalsRequest;
use kiln_api::monitor::monitor_service_client::MonitorServiceClient;
use kiln_api::types::{Cursor, ListInfo, ListOptions, Signal};
use kiln_model::name::ServerName;
use kiln_service::client::Channel;
use tonic::Status;

const PAGE: u32 = 500;

/// What changed since a cursor.
#[derive(Debug, Clone)]
pub struct Changes<T> {
    pub items: Vec<T>,
    pub cursor: Option<Cursor>,
    /// The cursor was of another store: what is not listed does not exist.
    pub full: bool,
}

#[async_trait]
pub trait Peers: Clone + Send + Sync + 'static {
    async fn signals(&self, since: Option<Cursor>) -> Result<Changes<Signal>, Status>;

    async fn fleets(&self, since: Option<Cursor>) -> Result<Changes<Fleet>, Status>;

    async fn releases(&self, server: &ServerName) -> Result<Vec<Release>, Status>;
}

/// The site's services, by gRPC.
#[derive(Debug, Clone)]
pub struct SitePeers {
    deployer: DeployerServiceClient<Channel>,
    monitor: MonitorServiceClient<Channel>,
}

impl SitePeers {
    pub fn new(deployer: Channel, monitor: Channel) -> Self {
        Self { deployer: DeployerServiceClient::new(deployer), monitor: MonitorServiceClient::new(monitor) }
    }
}

/// Gathers the pages of a listing.
struct Pages<T> {
    items: Vec<T>,
    token: String,
    full: bool,
}

impl<T> Pages<T> {
    fn new() -> Self {
        Self { items: Vec::new(), token: String::new(), full: false }
    }

    fn options(&self, since: Option<&Cursor>) -> Option<ListOptions> {
        Some(ListOptions { since: since.cloned(), page_size: PAGE, page_token: self.token.clone() })
    }

    /// The cursor to go on from, once the last page is there.
    fn add(&mut self, items: Vec<T>, info: Option<ListInfo>) -> Option<Option<Cursor>> {
        let info = info.unwrap_or_default();
        self.items.extend(items);
        self.full |= info.full;
        self.token = info.next_page_token;
        self.token.is_empty().then_some(info.cursor)
    }
}

#[async_trait]
impl Peers for SitePeers {
    async fn signals(&self, since: Option<Cursor>) -> Result<Changes<Signal>, Status> {
        let mut client = self.monitor.clone();
        let mut pages = Pages::new();
        loop {
            let request =
                ListSignalsRequest { options: pages.options(since.as_ref()), server: String::new() };
            let page = client.list_signals(request).await?.into_inner();
            if let Some(cursor) = pages.add(page.signals, page.info) {
                return Ok(Changes { items: pages.items, cursor, full: pages.full });
            }
        }
    }

    async fn fleets(&self, since: Option<Cursor>) -> Result<Changes<Fleet>, Status> {
        let mut client = self.deployer.clone();
        let mut pages = Pages::new();
        loop {
            let request = ListFleetsRequest { options: pages.options(since.as_ref()) };
            let page = client.list_fleets(request).await?.into_inner();
            if let Some(cursor) = pages.add(page.fleets, page.info) {
                return Ok(Changes { items: pages.items, cursor, full: pages.full });
            }
        }
    }

    async fn releases(&self, server: &ServerName) -> Result<Vec<Release>, Status> {
        let mut client = self.deployer.clone();
        let mut pages = Pages::new();
        loop {
            let request = ListReleasesRequest { options: pages.options(None), server: server.to_string() };
            let page = client.list_releases(request).await?.into_inner();
            if pages.add(page.releases, page.info).is_some() {
                return Ok(pages.items);
            }
        }
    }
}
