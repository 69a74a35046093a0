//! Machines beside the site's own, and the registry by which images get there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_model::name::NodeName;
use serde::{Deserialize, Serialize};

use super::reach::Address;

/// `[registry]` as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryFile {
    /// `registry.example/kiln`: one for all images of the site.
    pub repository: String,
    /// Of the authorities that the registry's certificate may be of, instead of the machine's; relative to the home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
    /// A `config.json` of docker with `auths`, relative to the home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<String>,
}

/// Where the builder puts images, and nodes on other machines find them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    /// `host` or `host:port`.
    pub host: String,
    /// The repository's name there.
    pub path: String,
    pub ca: Option<PathBuf>,
    pub credentials: Option<PathBuf>,
}

impl Registry {
    /// Without TLS on this machine alone, where nobody listens in between.
    pub fn is_on_loopback(&self) -> bool {
        let bare = self.host.rsplit_once(':').map_or(self.host.as_str(), |(host, _)| host);
        bare == "localhost" || bare == "127.0.0.1" || bare == "[::1]"
    }
}

impl RegistryFile {
    /// # Errors
    /// What is wrong, in words.
    pub(super) fn check(self, home: &Path) -> Result<Registry, String> {
        let wrong = || format!("`{}` is no repository such as `registry.example/kiln`", self.repository);
        let (host, path) = self.repository.split_once('/').unwrap_or((&self.repository, ""));
        let is_host = |text: &str| {
            // Docker's rule: without a dot or a port it would be a path at a registry that nobody named.
            (text.contains(['.', ':']) || text == "localhost")
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]".contains(&b))
                && !text.starts_with(['.', '-', ':'])
        };
        let is_part = |text: &str| {
            let edge = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
            edge(text.as_bytes().first())
                && edge(text.as_bytes().last())
                && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        if !is_host(host) || self.repository.len() > 200 || !path.split('/').all(is_part) {
            return Err(wrong());
        }
        Ok(Registry {
            host: host.to_owned(),
            path: path.to_owned(),
            ca: self.ca.map(|file| home.join(file)),
            credentials: self.credentials.map(|file| home.join(file)),
        })
    }
}

/// # Errors
/// Names what is no node name, or no address.
pub(super) fn check_nodes(nodes: &BTreeMap<String, String>) -> Result<BTreeMap<NodeName, Address>, String> {
    let one = |(name, address): (&String, &String)| {
        let name: NodeName = name.parse().map_err(|error: kiln_model::name::BadName| error.to_string())?;
        if name == NodeName::local() {
            return Err(format!(
                "`{name}` is the site's own node; `peers.node` says where it is if not here"
            ));
        }
        Ok((name, address.parse()?))
    };
    nodes.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry(repository: &str) -> Result<Registry, String> {
        let file = RegistryFile { repository: repository.to_owned(), ca: None, credentials: None };
        file.check(Path::new("/home"))
    }

    #[test]
    fn a_repository_is_a_host_and_a_path() {
        let found = registry("registry.example:5000/team/kiln").unwrap();
        assert_eq!((found.host.as_str(), found.path.as_str()), ("registry.example:5000", "team/kiln"));
        assert!(!found.is_on_loopback() && registry("127.0.0.1:5000/kiln").unwrap().is_on_loopback());
        for wrong in [
            "",
            "kiln",
            "team/kiln",
            "https://registry.example/kiln",
            "registry.example",
            "registry.example/",
            "a.b/Kiln",
            "a.b/../c",
            "a.b/kiln@sha256",
            "user:pass@a.b/kiln",
            "a.b/kiln\n",
            "-a.b/kiln",
            "a.b/ki ln",
        ] {
            assert!(registry(wrong).is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn nodes_have_names_and_addresses_and_the_sites_own_is_not_named() {
        let nodes =
            |name: &str, address: &str| check_nodes(&BTreeMap::from([(name.to_owned(), address.to_owned())]));
        assert_eq!(nodes("edge-2", "https://10.0.0.7:7104").unwrap().len(), 1);
        for (name, address) in [
            ("local", "https://10.0.0.7:7104"),
            ("Edge", "https://10.0.0.7:7104"),
            ("edge-2", "http://10.0.0.7:7104"),
            ("edge-2", "unix:/run/node.sock"),
        ] {
            assert!(nodes(name, address).is_err(), "{name} at {address} was taken");
        }
    }
}
