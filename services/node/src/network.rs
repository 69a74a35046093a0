//! The instances' network: a bridge per site, and namespaces that are made ahead of the launches that need them.

pub(crate) mod bridge;
mod cni;
pub(crate) mod firewall;
pub(crate) mod namespace;
mod pool;

pub(crate) use cni::{Cni, leases, plugin_dir};
pub(crate) use pool::{Plug, Pool};
