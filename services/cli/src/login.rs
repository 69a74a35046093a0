//! What `kiln login` keeps of a site on other machines: where its services are, whom to believe, who one is.

use std::collections::BTreeMap;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use kiln_model::event::Service;
use kiln_model::name::SiteName;
use kiln_service::client::{self, Channel};
use kiln_service::config::{Address, Addresses};
use kiln_service::tls::TlsFiles;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::site::keys::write;

/// Where a service listens if nothing else is said.
const PORTS: [(Service, u16); 4] =
    [(Service::Builder, 7101), (Service::Deployer, 7102), (Service::Monitor, 7103), (Service::Node, 7104)];

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Servers {
    servers: BTreeMap<Service, Address>,
}

impl Servers {
    /// Of `https://host` for all services on their usual ports, and `builder=https://host:port` for one of them.
    pub(crate) fn parse(texts: &[String]) -> Result<Self, String> {
        let mut servers = BTreeMap::new();
        let of_host = texts.iter().filter(|text| !text.contains('='));
        for host in of_host {
            let host = host.trim_end_matches('/');
            for (service, port) in PORTS {
                servers.insert(service, format!("{host}:{port}").parse()?);
            }
        }
        for (name, url) in texts.iter().filter_map(|text| text.split_once('=')) {
            let service = Service::ALL.into_iter().find(|service| service.as_str() == name);
            let service = service.ok_or_else(|| format!("`{name}` is no service"))?;
            servers.insert(service, url.parse()?);
        }
        match Service::ALL.into_iter().find(|service| !servers.contains_key(service)) {
            Some(service) => Err(format!("where the {service} is was not said")),
            None => Ok(Self { servers }),
        }
    }
}

/// How a person shows who it is.
pub(crate) enum Proof {
    /// PEM of a certificate and its key.
    Certificate(Zeroizing<String>),
    Token(Zeroizing<String>),
}

#[derive(Debug)]
pub(crate) struct Login {
    site: SiteName,
    folder: PathBuf,
    servers: Servers,
}

/// `~/.config/kiln/<site>`
fn folder(site: &SiteName) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|it| !it.is_empty()).map(PathBuf::from);
    let config = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")))?;
    Some(config.join("kiln").join(site.as_str()))
}

impl Login {
    /// What was kept for a site, if anything.
    pub(crate) fn of(site: &SiteName) -> Outcome<Option<Self>> {
        let Some(folder) = folder(site) else { return Ok(None) };
        let path = folder.join("login.toml");
        let what = format!("reading {}", path.display());
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.during(&what)?,
        };
        let servers = toml::from_str(&text).map_err(|error| {
            Failure::new(Code::Invalid, &what, error).todo("kiln login, which writes it anew")
        })?;
        Ok(Some(Self { site: site.clone(), folder, servers }))
    }

    pub(crate) fn keep(site: &SiteName, servers: Servers, authority: &str, proof: &Proof) -> Outcome<Self> {
        let what = "keeping the login";
        let folder = folder(site).ok_or_else(|| {
            Failure::new(Code::Refused, what, "neither XDG_CONFIG_HOME nor HOME says where")
        })?;
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&folder).during(what)?;
        let it = Self { site: site.clone(), folder, servers };
        write(&it.authority(), authority)?;
        let (new, old, text) = match proof {
            Proof::Certificate(pem) => (it.identity(), it.token(), pem),
            Proof::Token(token) => (it.token(), it.identity(), token),
        };
        write(&new, text)?;
        match std::fs::remove_file(&old) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).during(what),
            _ => {}
        }
        // Last: a folder with it is a whole one.
        let text = toml::to_string(&it.servers).map_err(|error| Failure::failed(what, error))?;
        write(&it.folder.join("login.toml"), &text)?;
        Ok(it)
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn authority(&self) -> PathBuf {
        self.folder.join("authority.pem")
    }

    fn identity(&self) -> PathBuf {
        self.folder.join("identity.pem")
    }

    fn token(&self) -> PathBuf {
        self.folder.join("token")
    }

    /// The address of a service, or that which the site's own settings name.
    pub(crate) fn channel(&self, service: Service, own: Option<Addresses>) -> Outcome<Channel> {
        let what = format!("calling the {service} of {}", self.site);
        let (identity, token) = (self.identity(), self.token());
        let token = token.exists().then(|| kiln_secret::read(&token).during(&what)).transpose()?;
        let files = TlsFiles {
            site: self.site.clone(),
            authority: self.authority(),
            identity: token.is_none().then_some(identity),
        };
        let kept = || self.servers.servers.get(&service).cloned().map(Addresses::from);
        let addresses = own.or_else(kept).ok_or_else(|| {
            Failure::new(Code::Refused, &what, "where it is was not said").todo("kiln login --server …")
        })?;
        client::remote(addresses, &files, service, token.as_deref().map(|token| token.trim()))
            .map_err(|error| Failure::new(Code::Refused, what, error).todo("kiln login"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(texts: &[&str]) -> Result<Servers, String> {
        Servers::parse(&texts.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn servers_are_named_by_a_host_or_one_by_one() {
        let host = parse(&["https://kiln.example"]).unwrap();
        assert_eq!(host.servers[&Service::Node].to_string(), "https://kiln.example:7104");
        let mixed = parse(&["node=https://10.0.0.6:9000", "https://kiln.example/"]).unwrap();
        assert_eq!(mixed.servers[&Service::Node].to_string(), "https://10.0.0.6:9000");
        assert_eq!(mixed.servers[&Service::Builder], host.servers[&Service::Builder]);
        assert_eq!(toml::from_str::<Servers>(&toml::to_string(&mixed).unwrap()).unwrap(), mixed);
        for bad in [&[][..], &["node=https://x:1"], &["http://x"], &["https://x:1"], &["web=https://x:1"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
