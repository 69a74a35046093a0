//! The order of servers whose images begin with one another's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Definition, Source};
use crate::name::ServerName;

/// Servers that are their own parents, by way of one another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cycle(Vec<ServerName>);

impl Cycle {
    /// Each begins with the image of the next, and the last with that of the first.
    pub fn servers(&self) -> &[ServerName] {
        &self.0
    }
}

/// `servers can't begin with one another's images: base -> web -> base`
impl fmt::Display for Cycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("servers can't begin with one another's images: ")?;
        for server in &self.0 {
            write!(f, "{server} -> ")?;
        }
        self.0.first().map_or(Ok(()), |first| write!(f, "{first}; let one of them begin with something else"))
    }
}

impl std::error::Error for Cycle {}

impl Definition {
    /// The server whose image this one begins with.
    pub fn parent(&self) -> Option<&ServerName> {
        match &self.image.from {
            Source::Server { name } => Some(name),
            Source::Scratch
            | Source::Debian { .. }
            | Source::Archive { .. }
            | Source::Image { .. }
            | Source::Containerfile(_) => None,
        }
    }
}

/// Parents before their children, otherwise by name. A parent that is not among the servers is none of them, and is
/// left out: whether it exists is known to whoever keeps them.
///
/// # Errors
/// The first cycle, by name.
pub fn order_by_parent(servers: &BTreeMap<ServerName, Option<ServerName>>) -> Result<Vec<ServerName>, Cycle> {
    let mut done = BTreeSet::new();
    let mut order = Vec::with_capacity(servers.len());
    for start in servers.keys() {
        // From the server up to a parent that has its place already, or that is not here; there is one way up.
        let mut way: Vec<&ServerName> = Vec::new();
        let mut on_the_way = BTreeSet::new();
        let mut next = Some(start);
        while let Some((server, parent)) = next.and_then(|name| servers.get_key_value(name)) {
            if done.contains(server) {
                break;
            }
            if !on_the_way.insert(server) {
                let cycle = way.into_iter().skip_while(|name| *name != server).cloned().collect();
                return Err(Cycle(cycle));
            }
            way.push(server);
            next = parent.as_ref();
        }
        for server in way.into_iter().rev() {
            done.insert(server);
            order.push(server.clone());
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use proptest::collection::btree_map;
    use proptest::prelude::*;

    use super::*;

    fn servers(pairs: &[(&str, Option<&str>)]) -> BTreeMap<ServerName, Option<ServerName>> {
        let name = |text: &str| text.parse::<ServerName>().expect("a server name");
        pairs.iter().map(|(server, parent)| (name(server), parent.map(name))).collect()
    }

    fn names(order: &[ServerName]) -> Vec<&str> {
        order.iter().map(ServerName::as_str).collect()
    }

    #[test]
    fn parents_come_first() {
        let order = order_by_parent(&servers(&[
            ("a", Some("z")),
            ("b", Some("elsewhere")),
            ("c", None),
            ("z", Some("c")),
        ]))
        .expect("no cycle");
        assert_eq!(names(&order), ["c", "z", "a", "b"]);
    }

    #[test]
    fn a_cycle_is_named() {
        let circle = servers(&[("a", Some("b")), ("b", Some("c")), ("c", Some("d")), ("d", Some("b"))]);
        let cycle = order_by_parent(&circle).expect_err("a cycle");
        assert_eq!(names(cycle.servers()), ["b", "c", "d"]);
        assert_eq!(
            cycle.to_string(),
            "servers can't begin with one another's images: b -> c -> d -> b; let one of them begin with something else"
        );
        assert_eq!(order_by_parent(&servers(&[("a", Some("a"))])).map_err(|cycle| cycle.0.len()), Err(1));
    }

    proptest! {
        #[test]
        fn an_order_or_a_cycle(pairs in btree_map("[a-f]", proptest::option::of("[a-g]"), 0..7)) {
            let pairs: Vec<_> =
                pairs.iter().map(|(server, parent)| (server.as_str(), parent.as_deref())).collect();
            let servers = servers(&pairs);
            match order_by_parent(&servers) {
                Ok(order) => {
                    prop_assert_eq!(order.iter().collect::<BTreeSet<_>>(), servers.keys().collect());
                    prop_assert_eq!(order.len(), servers.len());
                    for (index, server) in order.iter().enumerate() {
                        if let Some(parent) = &servers[server] {
                            prop_assert!(!order[index..].contains(parent), "{} before {}", server, parent);
                        }
                    }
                }
                Err(Cycle(cycle)) => {
                    prop_assert!(!cycle.is_empty());
                    for (index, server) in cycle.iter().enumerate() {
                        prop_assert_eq!(servers[server].as_ref(), cycle.get((index + 1) % cycle.len()));
                    }
                }
            }
        }
    }
}
