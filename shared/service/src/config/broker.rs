//! Where the broker is, and how it is reached.

use std::path::PathBuf;

use kiln_bus::{NatsOptions, User};
use kiln_model::event::Service;
use serde::{Deserialize, Serialize};
use tokio_rustls::rustls::pki_types::{IpAddr, ServerName};

use super::{Error, Site};
use crate::tls::{self, TlsFiles};

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NatsFile {
    /// `tls://127.0.0.1:4222`; the servers of a cluster with commas between them.
    pub url: String,
    /// Copies of each event, on as many servers of the cluster: 1, 3 or 5.
    #[serde(default = "default_replicas")]
    pub replicas: usize,
}

fn default_replicas() -> usize {
    1
}

const TLS: &str = "tls://";
const PLAIN: &str = "nats://";

/// Whether the broker is reached with TLS. The settings alone say so, and nothing that comes over the wire: whoever stands
/// in between could say that there is none.
///
/// `nats://` is what a site has whose own broker was made before that had TLS, until nothing of it runs and `kiln up` brings
/// it forward: its services, those of before among them, go on as they began. It is also another's broker on loopback.
fn has_tls(url: &str) -> bool {
    url.starts_with(TLS)
}

/// # Errors
/// What is wrong with the URLs of `nats.url`.
pub(super) fn check_url(urls: &str) -> Result<(), String> {
    for url in urls.split(',') {
        let wrong = || format!("`{url}` is no address such as `{TLS}10.0.0.5:4222`");
        let rest = url.strip_prefix(TLS).or_else(|| url.strip_prefix(PLAIN)).ok_or_else(wrong)?;
        let host = host(rest).ok_or_else(wrong)?;
        if has_tls(url) != has_tls(urls) {
            return Err(format!("`{urls}` is with TLS in part: write {TLS} before each address"));
        }
        if !has_tls(url) && !is_loopback(&host) {
            return Err(format!(
                "`{url}` is on another machine, and without TLS: write `{TLS}{rest}`, and give the broker a certificate \
                 (`kiln pki issue broker`, deploy/nats)"
            ));
        }
    }
    Ok(())
}

/// Of `127.0.0.1:4222`, `[::1]:4222` or `nats.example`.
fn host(rest: &str) -> Option<ServerName<'static>> {
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let bare = match rest.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            port.strip_prefix(':').map_or(port.is_empty(), is_port).then_some(host)?
        }
        None => match rest.split_once(':') {
            Some((host, port)) => is_port(port).then_some(host)?,
            None => rest,
        },
    };
    ServerName::try_from(bare.to_owned()).ok()
}

fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|port| port != 0)
}

fn is_loopback(host: &ServerName<'_>) -> bool {
    match host {
        ServerName::IpAddress(address) => match address {
            IpAddr::V4(address) => std::net::Ipv4Addr::from(*address).is_loopback(),
            IpAddr::V6(address) => std::net::Ipv6Addr::from(*address).is_loopback(),
        },
        host => host.to_str() == "localhost",
    }
}

/// # Errors
/// An even number bears no more losses than the odd one below it.
pub(super) fn check_replicas(count: usize) -> Result<(), String> {
    if [1, 3, 5].contains(&count) { Ok(()) } else { Err(format!("{count} is not 1, 3 or 5")) }
}

impl Site {
    pub fn broker_has_tls(&self) -> bool {
        has_tls(&self.nats_url)
    }

    /// Names and addresses of the broker's servers, as they must be in their certificates.
    pub fn broker_hosts(&self) -> Vec<String> {
        let rests = self.nats_url.split(',').filter_map(|url| url.split_once("://"));
        rests.filter_map(|(_, rest)| host(rest)).map(|host| host.to_str().into_owned()).collect()
    }

    /// How a user of this site reaches the broker. Its seed is read now.
    ///
    /// # Errors
    /// Where the user's seed can't be read, or the files for TLS can't.
    pub fn nats(&self, user: User) -> Result<NatsOptions, Error> {
        let path = self.paths().nats_seed(user);
        let seed = kiln_secret::read(&path)
            .map_err(|error| Error::Unreadable { path: path.clone(), reason: error.to_string() })?;
        let (url, site) = (self.nats_url.clone(), self.name.clone());
        let files = || TlsFiles {
            site: site.clone(),
            authority: self.paths().authority(),
            identity: Some(self.shown_by(user)),
        };
        let tls = self.broker_has_tls().then(|| tls::to_broker(&files())).transpose();
        let tls = tls.map_err(|reason| Error::Broker { url: url.clone(), reason })?;
        Ok(NatsOptions { url, replicas: self.nats_replicas, site, user, seed: Some(seed), tls })
    }

    /// The certificate that a user of the broker shows. It says that its holder is of the site, and no more: the seed says
    /// which user that is. So people's commands and the supervisor, which have none of their own, show one of a service
    /// of their machine: whoever runs them can read it.
    fn shown_by(&self, user: User) -> PathBuf {
        let of = |service: Service| self.paths().identity(service);
        match user {
            User::Builder => of(Service::Builder),
            User::Deployer => of(Service::Deployer),
            User::Monitor => of(Service::Monitor),
            User::Node => of(Service::Node),
            User::Cli | User::Reader | User::Admin => {
                let there = Service::ALL.map(of).into_iter().find(|path| path.exists());
                // Where none is there, the error names one that could be.
                there.unwrap_or_else(|| of(Service::Node))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_on_another_machine_has_tls() {
        for good in [
            "tls://127.0.0.1:4222",
            "tls://nats.example",
            "tls://10.0.0.5:4222,tls://10.0.0.6:4222,tls://[2001:db8::1]:4222",
            "nats://127.0.0.1:4222",
            "nats://127.9.9.9:4222,nats://[::1]:4222,nats://localhost:4222/",
        ] {
            assert_eq!(check_url(good), Ok(()), "{good}");
        }
        for (bad, words) in [
            ("nats://10.0.0.5:4222", "`tls://10.0.0.5:4222`"),
            ("nats://nats.example", "without TLS"),
            ("nats://localhost.example:4222", "without TLS"),
            ("nats://[2001:db8::1]:4222", "without TLS"),
            ("nats://0.0.0.0:4222", "without TLS"),
            ("tls://10.0.0.5:4222,nats://127.0.0.1:4222", "in part"),
            ("nats://127.0.0.1:4222,tls://10.0.0.5:4222", "in part"),
            ("nats://127.0.0.1:4222@10.0.0.5:4222", "no address"),
            ("nats://127.0.0.1@10.0.0.5", "no address"),
            ("nats://user:password@127.0.0.1", "no address"),
            ("nats://[::1]x:4222", "no address"),
            ("nats://127.0.0.1:4222/x", "no address"),
            ("nats://127.0.0.1:4222, nats://127.0.0.1:4223", "no address"),
            ("http://127.0.0.1:4222", "no address"),
            ("127.0.0.1:4222", "no address"),
            ("tls://", "no address"),
            ("", "no address"),
        ] {
            let refused = check_url(bad).unwrap_err();
            assert!(refused.contains(words), "{bad}: {refused}");
        }
    }
}
