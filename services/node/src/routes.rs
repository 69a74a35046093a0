//! What each server has on the edge: asked for by plans, cut back by the node itself where an instance has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use kiln_api::convert::{self, Invalid};
use kiln_api::engine;
use kiln_model::name::{InstanceId, ServerName};
use kiln_service::error::ApiError;
use kiln_store::{Batch, Store};
use tokio::sync::MutexGuard;

use crate::book::{Backend, Listener, Route};
use crate::edge::{SLOTS, Wanted};
use crate::node::{Node, to_the_end};
use crate::record::State;

#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) server: ServerName,
    pub(crate) route: Route,
}

impl TryFrom<engine::RouteRequest> for Plan {
    type Error = Invalid;

    fn try_from(request: engine::RouteRequest) -> Result<Self, Invalid> {
        let port = |field: &str, number: u32| {
            let port = u16::try_from(number).ok().filter(|port| *port > 0);
            port.ok_or_else(|| Invalid::new(field, format!("is {number}, wanted a port from 1 to 65535")))
        };
        let mut listeners = Vec::new();
        let mut seen = BTreeSet::new();
        for listener in request.listeners {
            let listen = port("listeners.listen", listener.listen)?;
            if !seen.insert(listen) {
                return Err(Invalid::new("listeners.listen", format!("has {listen} twice")));
            }
            if listener.backends.len() > SLOTS {
                let why =
                    format!("has {} for port {listen}, at most {SLOTS} are served", listener.backends.len());
                return Err(Invalid::new("listeners.backends", why));
            }
            let backend = |backend: engine::Backend| {
                Ok(Backend {
                    instance: convert::text("listeners.backends.instance", &backend.instance)?,
                    target: port("listeners.backends.target", backend.target)?,
                })
            };
            let mut backends =
                listener.backends.into_iter().map(backend).collect::<Result<Vec<_>, Invalid>>()?;
            backends.sort();
            backends.dedup();
            listeners.push(Listener { listen, backends });
        }
        listeners.sort_by_key(|listener| listener.listen);
        let server = convert::text("server", &request.server)?;
        let id = convert::text("request_id", &request.request_id)?;
        Ok(Self { server, route: Route { generation: request.generation, request: Some(id), listeners } })
    }
}

impl Route {
    fn instances(&self) -> BTreeSet<&InstanceId> {
        self.listeners
            .iter()
            .flat_map(|listener| &listener.backends)
            .map(|backend| &backend.instance)
            .collect()
    }

    pub(crate) fn to_message(&self, server: &ServerName) -> engine::Route {
        let backend = |backend: &Backend| engine::Backend {
            instance: backend.instance.to_string(),
            target: backend.target.into(),
        };
        let listener = |listener: &Listener| engine::Listener {
            listen: listener.listen.into(),
            backends: listener.backends.iter().map(backend).collect(),
        };
        engine::Route {
            server: server.to_string(),
            generation: self.generation,
            listeners: self.listeners.iter().map(listener).collect(),
        }
    }
}

impl<S: Store> Node<S> {
    /// Replaces what a server has on the edge. False where it was so already.
    pub(crate) async fn route(self: &Arc<Self>, plan: Plan) -> Result<bool, ApiError> {
        let node = Arc::clone(self);
        to_the_end(async move { node.route_alone(plan).await }).await
    }

    async fn route_alone(&self, Plan { server, mut route }: Plan) -> Result<bool, ApiError> {
        // Takes a walk through /proc where a port is new: not with the lock.
        self.refuse_foreign_ports(&route).await?;
        let mut routes = self.routes.lock().await;
        let along = self.book.fence(&server, route.generation).await?;
        self.refuse_not_running(&server, &route)?;
        refuse_taken_ports(&routes, &server, &route)?;
        let before = routes.get(&server).cloned();
        let same =
            before.as_ref().map_or(route.listeners.is_empty(), |before| before.listeners == route.listeners);
        // A call that is made again answers as it did when it changed this.
        let again = same && before.as_ref().is_some_and(|before| before.request == route.request);
        if let Some(before) = before.as_ref().filter(|_| same) {
            route.request.clone_from(&before.request);
        }
        if before.as_ref() != Some(&route) {
            // The intent first: after a crash in between the next node brings the edge to it.
            self.book.write_route(&server, &route, along).await?;
            routes.insert(server.clone(), route);
        }
        let changed = self.edge.apply(|| self.wanted(&routes)).await?;
        self.note_left(before.as_ref(), routes.get(&server));
        Ok(changed || !same || again)
    }

    fn note_left(&self, before: Option<&Route>, after: Option<&Route>) {
        let still = after.map(Route::instances).unwrap_or_default();
        let mut left = self.left_edge.lock().unwrap_or_else(PoisonError::into_inner);
        for instance in before.map(Route::instances).unwrap_or_default() {
            if !still.contains(instance) {
                left.insert(instance.clone(), Instant::now());
            }
        }
    }

    fn refuse_not_running(&self, server: &ServerName, route: &Route) -> Result<(), ApiError> {
        for instance in route.instances() {
            let what_to_do = "look at the instances again, and plan anew";
            if instance.server != *server {
                let reason = format!("instance {instance} is not one of server {server}");
                return Err(ApiError::precondition(reason, what_to_do));
            }
            let ended = self.has_ended(instance);
            let state = self.book.get(instance).map(|held| held.value.state);
            let is = |word: &str| format!("instance {instance} can't serve users: it is {word}");
            return Err(match &state {
                Some(State::Running { .. }) if !ended => continue,
                // In a moment its record says so, and another plan is made.
                Some(State::Running { .. }) => ApiError::Conflict(is("about to be recorded as exited")),
                Some(state) => ApiError::precondition(is(state.word()), what_to_do),
                None => ApiError::precondition(is("not there"), what_to_do),
            });
        }
        Ok(())
    }

    /// Ports that something else on the machine has.
    async fn refuse_foreign_ports(&self, route: &Route) -> Result<(), ApiError> {
        for Listener { listen, .. } in &route.listeners {
            if let Some(holder) = self.edge.held_by_other(*listen).await? {
                return Err(held(*listen, &holder));
            }
        }
        Ok(())
    }

    /// What the edge should be: everything that is asked for and runs.
    fn wanted(&self, routes: &BTreeMap<ServerName, Route>) -> Wanted {
        let address = |backend: &Backend| {
            // Asked before the record is: once the end is recorded it is not noted any more.
            if self.has_ended(&backend.instance) {
                return None;
            }
            let record = self.book.get(&backend.instance)?.value;
            let address = record.plug.as_ref().filter(|_| record.is_running())?.address;
            Some(SocketAddrV4::new(address, backend.target))
        };
        let listeners = routes.values().flat_map(|route| &route.listeners);
        listeners.map(|l| (l.listen, l.backends.iter().filter_map(address).collect())).collect()
    }

    /// Takes an instance that has ended out of what is wanted on the edge, where it does not stand any more.
    pub(crate) async fn forget_on_edge(&self, id: &InstanceId) -> Result<(), ApiError> {
        let mut routes = self.routes.lock().await;
        let Some(route) = routes.get(&id.server).filter(|route| route.instances().contains(id)) else {
            return Ok(());
        };
        let mut route = route.clone();
        for listener in &mut route.listeners {
            listener.backends.retain(|backend| backend.instance != *id);
        }
        self.book.write_route(&id.server, &route, Batch::default()).await?;
        routes.insert(id.server.clone(), route);
        Ok(())
    }

    /// Brings the edge to what is wanted, whatever happened to it.
    pub(crate) async fn restore_edge(&self) -> Result<(), ApiError> {
        self.edge.look().await?;
        let routes = self.routes.lock().await;
        self.edge.apply(|| self.wanted(&routes)).await?;
        Ok(())
    }

    /// Keeps the edge as it is, which has no such instance on it.
    pub(crate) async fn off_edge(
        &self,
        id: &InstanceId,
    ) -> Result<MutexGuard<'_, BTreeMap<ServerName, Route>>, ApiError> {
        let routes = self.routes.lock().await;
        if routes.get(&id.server).is_some_and(|route| route.instances().contains(id)) {
            return Err(ApiError::precondition(
                format!("instance {id} is on the edge"),
                "take it off with Route, then retire it",
            ));
        }
        Ok(routes)
    }
}

/// Ports that other servers have.
fn refuse_taken_ports(
    routes: &BTreeMap<ServerName, Route>,
    server: &ServerName,
    route: &Route,
) -> Result<(), ApiError> {
    for Listener { listen, .. } in &route.listeners {
        let others = routes.iter().filter(|(other, _)| *other != server);
        let mut holders = others.filter(|(_, route)| route.listeners.iter().any(|l| l.listen == *listen));
        if let Some((other, _)) = holders.next() {
            return Err(held(*listen, &format!("server {other}")));
        }
    }
    Ok(())
}

fn held(listen: u16, holder: &str) -> ApiError {
    ApiError::precondition(
        format!("port {listen} is held by {holder}"),
        "choose another `run.ports.listen`, or stop what holds the port",
    )
}
