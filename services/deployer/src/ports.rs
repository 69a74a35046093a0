//! What the deployer needs of others. Its loops know nothing else of them, so the same loops run against the real ones,
//! against fakes in tests, and in the simulation.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;
use kiln_api::{engine, monitor, types};
use kiln_deployer_core::{Listener, Verdict};
use kiln_model::check::{Check, CheckResult};
use kiln_model::digest::Digest;
use kiln_model::name::{InstanceId, NodeName, ServerName};
use kiln_model::run::RunSpec;
use kiln_model::time::Millis;

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Away, busy, or in the middle of something. It may be tried again.
    #[error("{0}")]
    Later(String),
    /// Looked at, and refused.
    #[error("{0}")]
    Refused(String),
}

/// An instance to be launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    pub id: InstanceId,
    pub image: Digest,
    pub run: RunSpec,
    pub generation: u64,
}

/// Everything that a node has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Listing {
    pub instances: Vec<engine::Instance>,
    pub routes: Vec<engine::Route>,
}

/// Where instances run.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    async fn verify(&self, server: &ServerName, image: &Digest) -> Result<Verdict, Problem>;
    async fn launch(&self, launch: &Launch) -> Result<engine::Instance, Problem>;
    async fn route(
        &self,
        server: &ServerName,
        generation: u64,
        listeners: &[Listener],
    ) -> Result<(), Problem>;
    /// Answers when the instance is gone.
    async fn retire(&self, id: &InstanceId, generation: u64, drain: Millis) -> Result<(), Problem>;
    async fn check(&self, id: &InstanceId, check: &Check, timeout: Millis) -> Result<CheckResult, Problem>;
    /// The last lines that an instance wrote.
    async fn last_log(&self, id: &InstanceId) -> Result<Vec<String>, Problem>;
    async fn list(&self) -> Result<Listing, Problem>;
    /// Changes from the moment on at which this answers. It ends when the engine does.
    async fn watch(&self) -> Result<BoxStream<'static, engine::Instance>, Problem>;
}

/// The site's nodes by their names.
#[derive(Clone)]
pub struct Nodes(Arc<BTreeMap<NodeName, Arc<dyn Engine>>>);

impl Nodes {
    pub fn new(nodes: BTreeMap<NodeName, Arc<dyn Engine>>) -> Self {
        Self(Arc::new(nodes))
    }

    /// The node that every site has, and no other.
    pub fn local(engine: impl Engine) -> Self {
        let engine: Arc<dyn Engine> = Arc::new(engine);
        Self::new(BTreeMap::from([(NodeName::local(), engine)]))
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &NodeName> {
        self.0.keys()
    }

    pub(crate) fn of(&self, node: &NodeName) -> Result<&dyn Engine, Problem> {
        let unknown = || Problem::Later(format!("there is no node `{node}` under `[nodes]` in site.toml"));
        self.0.get(node).map(AsRef::as_ref).ok_or_else(unknown)
    }
}

/// Every signal, and the epoch of the store that their versions count in.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Signals {
    pub epoch: String,
    pub signals: Vec<types::Signal>,
}

/// Who knows how instances are.
#[async_trait]
pub trait Monitor: Send + Sync + 'static {
    /// Of one server's instances, or of all.
    async fn health(&self, server: Option<&ServerName>) -> Result<Vec<monitor::Health>, Problem>;
    /// Each change from now on. It ends when the monitor does.
    async fn watch(&self) -> Result<BoxStream<'static, monitor::Health>, Problem>;
    async fn signals(&self) -> Result<Signals, Problem>;
}

/// Revisions after a cursor, and the cursor to ask with the next time.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Revisions {
    pub revisions: Vec<types::Revision>,
    pub cursor: Option<types::Cursor>,
}

/// Who makes revisions.
#[async_trait]
pub trait Builder: Send + Sync + 'static {
    async fn revisions(&self, since: Option<&types::Cursor>) -> Result<Revisions, Problem>;
    /// Keeps these images for this server, and lets go of those that were kept for it before.
    async fn hold(&self, server: &ServerName, images: &BTreeSet<Digest>) -> Result<(), Problem>;
}
