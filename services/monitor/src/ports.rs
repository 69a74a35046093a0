//! What the monitor needs of others. The loops know nothing else of them, so the same loops run against the real
//! ones, against fakes in tests, and in the simulation.

use std::net::IpAddr;

use async_trait::async_trait;
use futures::stream::BoxStream;
use kiln_api::{builder, deployer, engine, monitor};
use kiln_model::check::{Check, CheckResult};
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_model::release_file::ReleaseFile;
use kiln_model::run::HealthPolicy;
use kiln_model::time::Millis;

/// Somebody could not be asked, or refused. It says who, what and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Problem(pub String);

/// A full listing, and the epoch of the store that it comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Listing<T> {
    pub epoch: String,
    pub items: Vec<T>,
}

#[async_trait]
pub trait Deployer: Send + Sync + 'static {
    /// Every instance that was not retired.
    async fn instances(&self) -> Result<Listing<deployer::Instance>, Problem>;
}

#[async_trait]
pub trait Builder: Send + Sync + 'static {
    async fn servers(&self) -> Result<Listing<builder::Server>, Problem>;
    async fn sources(&self) -> Result<Listing<builder::Source>, Problem>;
    async fn inspect(&self, source: &str) -> Result<builder::InspectSourceResponse, Problem>;
    async fn plan(&self, server: &ServerName) -> Result<builder::Plan, Problem>;
}

#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// The present state of everything, then each change. It ends when the engine does.
    async fn watch(&self) -> Result<BoxStream<'static, engine::WatchInstancesResponse>, Problem>;
    /// Answers where the engine does.
    async fn ping(&self) -> Result<(), Problem>;
    /// Runs a check inside an instance.
    async fn check(
        &self,
        instance: &InstanceId,
        check: &Check,
        timeout: Millis,
    ) -> Result<CheckResult, Problem>;
}

/// The other replicas of the monitor.
#[async_trait]
pub trait Others: Send + Sync + 'static {
    /// What the replica at an address sees of the instances that it looks at, as it is now, then each answer. It ends when
    /// that replica does.
    async fn watch(&self, address: &str) -> Result<BoxStream<'static, monitor::Health>, Problem>;
    /// What the replica at an address knows of a server by itself.
    async fn status(
        &self,
        address: &str,
        server: &ServerName,
    ) -> Result<monitor::GetServerStatusResponse, Problem>;
}

#[async_trait]
pub trait Git: Send + Sync + 'static {
    /// The commit that a branch points to.
    async fn head(&self, url: &str, branch: &str) -> Result<String, Problem>;
}

#[async_trait]
pub trait Archive: Send + Sync + 'static {
    async fn release_file(&self, url: &str) -> Result<ReleaseFile, Problem>;
}

/// An instance as a look needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub id: InstanceId,
    pub node: NodeName,
    pub address: IpAddr,
    /// Without one it is healthy while the engine says that it runs.
    pub policy: Option<HealthPolicy>,
}

#[async_trait]
pub trait Eyes: Send + Sync + 'static {
    /// One look. None where nobody could look, which says nothing of the instance.
    async fn look(&self, target: &Target) -> Option<CheckResult>;
}

/// A release file that a lock was resolved from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Pinned {
    pub url: String,
    pub digest: Digest,
}
