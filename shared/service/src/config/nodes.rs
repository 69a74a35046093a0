//! Machines beside the site's own, and the registry by which images get there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use kiln_model::name::NodeName;
use kiln_model::repository::Repository;
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
    /// Others of the same registry: what they have is taken over from them by its name instead of being sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_from: Vec<String>,
}

/// Where the builder puts images, and nodes on other machines find them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registry {
    pub repository: Repository,
    pub ca: Option<PathBuf>,
    pub credentials: Option<PathBuf>,
    /// On the same host.
    pub mount_from: Vec<Repository>,
}

impl RegistryFile {
    /// # Errors
    /// What is wrong, in words.
    pub(super) fn check(self, home: &Path) -> Result<Registry, String> {
        let Self { repository, ca, credentials, mount_from } = self;
        let parse = |text: &String| -> Result<Repository, String> {
            text.parse().map_err(|why| format!("`{text}` is no repository: {why}"))
        };
        let repository = parse(&repository)?;
        let mount_from = mount_from.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        if let Some(other) = mount_from.iter().find(|other| other.host != repository.host) {
            return Err(format!("`mount_from`: {other} is of another registry than {repository}"));
        }
        Ok(Registry {
            repository,
            ca: ca.map(|file| home.join(file)),
            credentials: credentials.map(|file| home.join(file)),
            mount_from,
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
        mounting(repository, &[])
    }

    fn mounting(repository: &str, from: &[&str]) -> Result<Registry, String> {
        let mount_from = from.iter().map(|&text| text.to_owned()).collect();
        let file =
            RegistryFile { repository: repository.to_owned(), ca: None, credentials: None, mount_from };
        file.check(Path::new("/home"))
    }

    #[test]
    fn a_repository_is_named_with_its_registry() {
        let found = registry("registry.example:5000/team/kiln").unwrap();
        assert_eq!(found.repository.to_string(), "registry.example:5000/team/kiln");
        for wrong in ["", "kiln", "team/kiln", "registry.example/kiln:tag", "registry.example/kiln@sha256"] {
            assert!(registry(wrong).is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn what_is_taken_over_is_of_the_same_registry() {
        let found =
            mounting("registry.example/kiln", &["registry.example/a", "registry.example/b/c"]).unwrap();
        assert_eq!(found.mount_from.len(), 2);
        for wrong in ["registry.example:5000/a", "other.example/a", "a"] {
            let why = mounting("registry.example/kiln", &[wrong]).unwrap_err();
            assert!(why.contains(wrong), "{why}");
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
