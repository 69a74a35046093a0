//! The broker of the site's own: its settings, and that it takes new certificates.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_model::event::Service;
use kiln_service::access::Role;
use kiln_service::config::Site;
use kiln_service::guard;
use kiln_service::reloaded::{Stamp, stamp};

use super::programs::{self, Kind};
use super::{keys, pki, supervisor};
use crate::failure::{Code, During as _, Failure, Outcome};

pub(crate) fn config_file(site: &Site) -> PathBuf {
    site.paths().nats().join("nats.conf")
}

pub(crate) fn pid_file(site: &Site) -> PathBuf {
    site.paths().run().join("nats.pid")
}

/// Whether the site has one of its own.
pub(crate) fn is_own(site: &Site) -> bool {
    config_file(site).exists()
}

/// With a broker of the site's own its configuration; with another's, the users that it must be given.
pub(super) fn write(site: &Site, is_anothers: bool) -> Outcome {
    let own = config_file(site);
    let users = keys::accounts_section(site.paths(), &site.name)?;
    let is_made = site.home.join("site.toml").exists();
    if is_anothers || (!own.exists() && is_made) {
        if own.exists() {
            fs::remove_file(&own).during(format_args!("removing {}", own.display()))?;
        }
        return keys::write(&site.paths().nats().join("users.conf"), &users);
    }
    if site.nats_replicas > 1 {
        return Err(Failure::new(
            Code::Invalid,
            format!("keeping {} copies of each event", site.nats_replicas),
            "the site's own broker is one server",
        )
        .reason("bad_config")
        .todo("name the servers of a cluster: kiln up --nats-url tls://a:4222,tls://b:4222,tls://c:4222"));
    }
    if site.broker_has_tls() {
        check_identity(site)?;
    } else if !is_plain(&own) || !runs(site)? {
        let rest = site.nats_url.split_once("://").map_or("", |(_, rest)| rest);
        let what = format!("the setting nats.url, {}", site.nats_url);
        return Err(Failure::new(Code::Invalid, what, "the site's own broker has TLS")
            .reason("bad_config")
            .todo(format!("write tls://{rest} in site.toml")));
    }
    keys::write(&own, &config(site, common(site, &own)?, &users))
}

/// Whether these are the settings of a broker that was made before it had TLS.
fn is_plain(config: &Path) -> bool {
    fs::read_to_string(config).is_ok_and(|text| !text.contains(TLS))
}

/// A machine without the authority's key has what it was given, and a broker without a certificate does not start.
fn check_identity(site: &Site) -> Outcome {
    let path = site.paths().identity(Role::Broker);
    let is_made_here = pki::authority_key(site).exists() || !site.paths().authority().exists();
    if is_made_here || path.exists() {
        return Ok(());
    }
    Err(Failure::new(
        Code::Refused,
        "giving the broker a certificate",
        format!("{} is not there, and the authority's key is not here to make it", path.display()),
    )
    .reason("no_certificate")
    .todo(format!(
        "where that key is: kiln pki issue broker --host localhost --host 127.0.0.1 --out broker.pem; bring it to {}",
        path.display()
    )))
}

/// What every broker has, with the folder of its data as a variable.
const COMMON: &str = include_str!("../../../../deploy/nats/kiln.conf");

/// What one had that was made before it had bounds.
const BOUNDLESS: &str =
    "max_payload: 4MB\njetstream {\n  store_dir: $KILN_NATS_DATA\n  sync_interval: 1s\n}\n";

/// While anything runs a broker without bounds has none: it takes them at its start alone, and refuses to read a file anew
/// that has them, and with it the new certificate that it is told of so.
fn common(site: &Site, config: &Path) -> Outcome<&'static str> {
    let is_boundless = fs::read_to_string(config).is_ok_and(|text| !text.contains("\nmax_pending:"));
    Ok(if is_boundless && runs(site)? { BOUNDLESS } else { COMMON })
}

fn config(site: &Site, common: &str, users: &str) -> String {
    let (folder, pid) = (site.paths().nats().join("jetstream"), pid_file(site));
    let listen = site.nats_url.split_once("://").map_or("", |(_, rest)| rest.trim_end_matches('/'));
    let (name, folder, pid) = (&site.name, folder.display(), pid.display());
    let tls = if site.broker_has_tls() { tls(site) } else { String::new() };
    format!(
        "# Made by `kiln up`, anew each time.\n\
         server_name: \"kiln-{name}\"\n\
         listen: \"{listen}\"\n\
         pid_file: \"{pid}\"\n\
         {tls}\
         KILN_NATS_DATA: \"{folder}\"\n\
         {common}\
         {users}"
    )
}

/// What begins its settings for TLS.
const TLS: &str = "\ntls {";

/// The handshake comes before the greeting with which a broker begins else: that tells anybody who connects what it is.
fn tls(site: &Site) -> String {
    let (own, authority) = (site.paths().identity(Role::Broker), site.paths().authority());
    let (own, authority) = (own.display(), authority.display());
    format!(
        "tls {{\n  cert_file: \"{own}\"\n  key_file: \"{own}\"\n  ca_file: \"{authority}\"\n  verify: true\n  \
         min_version: \"1.3\"\n  handshake_first: true\n  timeout: 5\n}}\n"
    )
}

/// A site that was made before its broker had TLS has it from the next start of everything on: where its URL is to become
/// another one, that. While anything of it runs it stays as it is, and so does what an upgrade has not replaced yet or puts
/// back: no end guesses what the other one speaks.
pub(super) fn outgrown(home: &Path) -> Outcome<Option<String>> {
    // What is wrong with the settings is told by whoever reads them next.
    let Ok(site) = Site::load(home) else { return Ok(None) };
    if site.broker_has_tls() || !is_own(&site) || runs(&site)? {
        return Ok(None);
    }
    Ok(site.nats_url.split_once("://").map(|(_, rest)| format!("tls://{rest}")))
}

/// By the locks too: a process in a container has another id here.
fn runs(site: &Site) -> Outcome<bool> {
    let programs = programs::of(site)?;
    let locks = Service::ALL.map(|service| site.paths().lock(service));
    Ok(supervisor::running(site).is_some()
        || programs.iter().any(|program| program.running().is_some())
        || locks.iter().chain([&supervisor::lock_file(site)]).any(|lock| guard::is_held(lock)))
}

/// From its first sign of life to where it takes signals in peace: it shows its process before it has read its data.
const STARTS: Duration = Duration::from_secs(2);

/// What a running broker was told to read last: it does not look by itself, nor say what it has.
#[derive(Debug, Default)]
pub(super) struct Told(Option<(i32, Vec<Stamp>)>);

impl Told {
    /// Tells the broker that runs, where it may have other files than there are now: after each change, and once where it
    /// is new here. Gives its process then.
    ///
    /// # Errors
    /// Where it can't be told.
    pub(super) fn tell(&mut self, site: &Site) -> Outcome<Option<i32>> {
        let broker = programs::of(site)?.into_iter().find(|program| program.kind == Kind::Broker);
        let Some(process) = broker.and_then(|program| program.running()) else { return Ok(None) };
        let age = fs::metadata(pid_file(site)).and_then(|it| it.modified()).map(|it| it.elapsed());
        // A clock that was set back says nothing.
        if age.is_ok_and(|age| age.is_ok_and(|age| age < STARTS)) {
            return Ok(None);
        }
        let files = [config_file(site), site.paths().identity(Role::Broker), site.paths().authority()];
        // Before it is told: of what changes in between it is told again.
        let now = Some((process.pid(), files.iter().map(stamp).collect()));
        if self.0 == now {
            return Ok(None);
        }
        process.reload().map_err(|error| {
            Failure::failed(
                format!("having the broker, process {}, read its files anew", process.pid()),
                error,
            )
        })?;
        self.0 = now;
        Ok(Some(process.pid()))
    }
}
