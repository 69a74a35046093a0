//! The node as a whole: what its flows share.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kiln_image::ImageStore;
use kiln_model::name::{InstanceId, ServerName};
use kiln_registry::Registry;
use kiln_service::config::Site;
use kiln_service::error::ApiError;
use kiln_store::Store;
use tokio::sync::{OwnedMutexGuard, Semaphore};

use crate::book::{Book, Route};
use crate::boot::Orphans;
use crate::cgroup::Cgroup;
use crate::edge::Edge;
use crate::failure::Failure;
use crate::helper::Helpers;
use crate::names::Names;
use crate::network::{self, Cni, Pool};
use crate::runtime::Runtime;
use crate::verify::Verifier;

/// Launches and clean-ups at once: each keeps a core busy for some tens of milliseconds.
const AT_ONCE: usize = 8;

#[derive(Debug)]
pub struct Node<S> {
    pub(crate) names: Names,
    pub(crate) helpers: Helpers,
    pub(crate) book: Arc<Book<S>>,
    pub(crate) runtime: Runtime,
    pub(crate) pool: Arc<Pool>,
    pub(crate) edge: Edge,
    /// What is wanted on the edge. Held while the edge changes, so that intent and edge change in the same order.
    pub(crate) routes: tokio::sync::Mutex<BTreeMap<ServerName, Route>>,
    /// Instances that have ended and whose records do not say so yet: they do not come back on the edge meanwhile.
    pub(crate) ended: Mutex<HashSet<InstanceId>>,
    /// What was found on the machine at boot, is in no record, and is not removed yet.
    pub(crate) orphans: Mutex<Orphans>,
    /// When an instance was last taken off the edge by this process.
    pub(crate) left_edge: Mutex<HashMap<InstanceId, Instant>>,
    pub(crate) verifier: Verifier,
    pub(crate) at_once: Arc<Semaphore>,
    flows: Mutex<HashMap<InstanceId, Arc<tokio::sync::Mutex<()>>>>,
}

impl<S: Store> Node<S> {
    /// Takes over the machine's state: kills what an earlier node was about to do, and makes bridge and table where they
    /// are missing. Instances run on, and users are served.
    pub(crate) async fn open(site: &Site, store: S) -> Result<Arc<Self>, ApiError> {
        let names = Names::of(site);
        let group = names.cgroup();
        let helpers = blocking(move || {
            let helpers = Cgroup::make(&group, Cgroup::HELPERS)?;
            helpers.empty()?;
            Ok::<_, Failure>(Helpers::new(helpers))
        })
        .await??;
        network::bridge::ensure(&names, &helpers).await?;
        network::firewall::ensure(&names, &helpers).await?;
        let book = Book::open(store).await?;
        let images = ImageStore::open(&site.paths().images()).map_err(|error| ApiError::internal(&error))?;
        let registry = site.registry.as_ref().map(Registry::new).transpose();
        let registry = registry.map_err(|error| ApiError::internal(&error))?;
        let routes = book.routes().await?;
        let cni = Cni::new(&names, helpers.clone())?;
        Ok(Arc::new(Self {
            runtime: Runtime::new(&names, &helpers)?,
            pool: Pool::new(cni, names.clone()),
            edge: Edge::open(&names, &helpers).await?,
            routes: tokio::sync::Mutex::new(routes),
            ended: Mutex::default(),
            orphans: Mutex::default(),
            left_edge: Mutex::default(),
            verifier: Verifier::new(images, site.signing.clone(), registry),
            at_once: Arc::new(Semaphore::new(AT_ONCE)),
            flows: Mutex::default(),
            book,
            helpers,
            names,
        }))
    }

    /// Waits until no other flow of this instance runs, and keeps others away.
    pub(crate) async fn alone(&self, id: &InstanceId) -> OwnedMutexGuard<()> {
        self.flow(id).lock_owned().await
    }

    /// The same where no flow of this instance runs now.
    pub(crate) fn try_alone(&self, id: &InstanceId) -> Option<OwnedMutexGuard<()>> {
        self.flow(id).try_lock_owned().ok()
    }

    fn flow(&self, id: &InstanceId) -> Arc<tokio::sync::Mutex<()>> {
        let mut flows = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        // Locks that nobody holds or waits for.
        flows.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(flows.entry(id.clone()).or_default())
    }
}

/// Runs what blocks on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| ApiError::internal(&error))
}

/// Runs a flow to its end, also where whoever asked for it hangs up: no flow stops half-way but by the end of the node.
pub(crate) async fn to_the_end<T: Send + 'static>(
    flow: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let flow = tracing::Instrument::in_current_span(flow);
    tokio::spawn(flow).await.map_err(|error| ApiError::internal(&error))?
}

impl From<Failure> for ApiError {
    /// The machine said no: busy, full, or in need of repair. What was to be done can be tried again.
    fn from(failure: Failure) -> Self {
        Self::Unavailable(failure.to_string())
    }
}
