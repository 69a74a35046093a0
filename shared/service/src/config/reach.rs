//! Where services are reached from other machines, and how long certificates live.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use kiln_model::event::Service;
use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::pki_types::ServerName;

/// Of the certificates that `kiln up` gives to the services of its machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PkiFile {
    /// They are renewed when a third of it is left.
    pub life: String,
    /// Host names and addresses of this machine as others call it, beside `localhost` and those in `[listen]`.
    pub hosts: Vec<String>,
}

impl Default for PkiFile {
    fn default() -> Self {
        Self { life: "24h".to_owned(), hosts: Vec::new() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pki {
    pub life: Duration,
    pub hosts: Vec<String>,
}

/// A service at a TCP port: `https://kiln.example:7101`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    host: ServerName<'static>,
    port: u16,
}

impl Address {
    /// The name that the server's certificate must have.
    pub fn host(&self) -> &ServerName<'static> {
        &self.host
    }

    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            ServerName::IpAddress(address) => {
                write!(f, "https://{}", SocketAddr::new((*address).into(), self.port))
            }
            host => write!(f, "https://{}:{}", host.to_str(), self.port),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no address such as `https://kiln.example:7101`");
        let rest = text.strip_prefix("https://").ok_or_else(wrong)?;
        let (host, port) = rest.trim_end_matches('/').rsplit_once(':').ok_or_else(wrong)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let host = ServerName::try_from(bare.to_owned()).map_err(|_| wrong())?;
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
        Ok(Self { host, port })
    }
}

/// Where the replicas of one service are, at least one: `https://10.0.0.5:7101,https://10.0.0.6:7101`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses(Vec<Address>);

impl Addresses {
    pub fn iter(&self) -> impl Iterator<Item = &Address> {
        self.0.iter()
    }
}

impl From<Address> for Addresses {
    fn from(address: Address) -> Self {
        Self(vec![address])
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.iter().map(Address::to_string).collect::<Vec<_>>().join(","))
    }
}

impl FromStr for Addresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

impl Serialize for Address {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Where one service of a site is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Socket(PathBuf),
    /// One replica is as good as another.
    Tcp(Addresses),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => write!(f, "{}", path.display()),
            Self::Tcp(addresses) => write!(f, "{addresses}"),
        }
    }
}

pub(super) fn check_ports(
    ports: &BTreeMap<Service, String>,
) -> Result<BTreeMap<Service, SocketAddr>, String> {
    let mut seen = BTreeSet::new();
    let mut checked = BTreeMap::new();
    for (service, text) in ports {
        let address: SocketAddr =
            text.parse().map_err(|_| format!("`{text}` of {service} is no `address:port`"))?;
        if !seen.insert(address) {
            return Err(format!("`{text}` is given to two services"));
        }
        checked.insert(*service, address);
    }
    Ok(checked)
}

pub(super) fn check_peers(peers: &BTreeMap<Service, String>) -> Result<BTreeMap<Service, Addresses>, String> {
    peers.iter().map(|(service, text)| Ok((*service, text.parse()?))).collect()
}

/// None can be revoked: what is stolen is of use for so long.
pub const LONGEST_SERVICE_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Certificates count in whole seconds, and a third of the life must do for a renewal. None can be revoked.
pub(super) fn check_life(life: Duration, text: &str) -> Result<Duration, String> {
    let least = Duration::from_secs(3);
    if life < least {
        return Err(format!("`{text}` is shorter than 3s"));
    }
    if life > LONGEST_SERVICE_LIFE {
        return Err(format!("`{text}` is longer than 30 days"));
    }
    Ok(life)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_back_as_it_was_written() {
        for good in ["https://kiln.example:7101", "https://10.0.0.5:7101", "https://[2001:db8::1]:7101"] {
            assert_eq!(good.parse::<Address>().unwrap().to_string(), good);
        }
        for bad in [
            "http://kiln.example:7101",
            "https://kiln.example",
            "https://kiln.example:0",
            "https://:7101",
            "https://user@kiln.example:7101",
            "https://kiln.example:7101/x",
            "https://kiln example:7101",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn replicas_have_commas_between_them() {
        for (good, count) in
            [("https://10.0.0.5:7101", 1), ("https://10.0.0.5:7101,https://b.example:7101", 2)]
        {
            let addresses: Addresses = good.parse().unwrap();
            assert_eq!((addresses.to_string().as_str(), addresses.iter().count()), (good, count));
        }
        for bad in ["", ",", "https://10.0.0.5:7101,", "https://10.0.0.5:7101, https://10.0.0.6:7101"] {
            assert!(bad.parse::<Addresses>().is_err(), "{bad}");
        }
    }
}
