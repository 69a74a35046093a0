//! `site.toml`: read and checked as a whole before anything is opened or bound.
//!
//! What stands in the file ([`SiteFile`]) and what was checked ([`Site`]) are different types.

mod broker;
mod credentials;
mod lifetime;
mod nodes;
mod signing;
mod store;

pub use broker::NatsFile;
pub use credentials::{Credentials, CredentialsFile, apt_credentials, git_credentials};
pub use lifetime::lifetime;
pub use nodes::{Registry, RegistryFile};
pub use signing::{Key as SigningKey, Signing, SigningFile, Trust};
pub use store::{Store, StoreFile};

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use jiff::SignedDuration;
use kiln_bus::User;
use kiln_model::event::Service;
use kiln_model::name::{NodeName, SiteId, SiteName, is_secret_name};
use serde::{Deserialize, Serialize};

use crate::access::Role;
use crate::tls::TlsFiles;

mod reach;

pub use reach::{Address, Addresses, LONGEST_SERVICE_LIFE, Pki, PkiFile, Place};

/// The exit code of a program whose configuration is wrong (EX_USAGE).
pub const EXIT_BAD_CONFIG: u8 = 64;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("can't read {path}: {reason}; `kiln up` makes a site, `--home` names another one")]
    Unreadable { path: PathBuf, reason: String },
    #[error("{path}: {reason}")]
    Malformed { path: PathBuf, reason: String },
    #[error("{path}: `{field}` is wrong: {reason}")]
    Invalid { path: PathBuf, field: &'static str, reason: String },
    #[error("can't speak TLS with the broker {url}: {reason}")]
    Broker { url: String, reason: String },
}

/// The file as it is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteFile {
    pub name: String,
    /// Eight hexadecimal digits that mark everything the site makes on the machine.
    pub id: String,
    /// Of the instances: a /24 inside 10.0.0.0/8, such as `10.77.3.0/24`.
    pub subnet: String,
    pub bridge: String,
    #[serde(default = "default_log")]
    pub log: String,
    pub nats: NatsFile,
    /// Where there is none, each service keeps its state in a file of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreFile>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otlp: Option<OtlpFile>,
    /// `builder = "127.0.0.1:9101"`: where each service answers `/metrics`, with mutual TLS.
    #[serde(default)]
    pub metrics: BTreeMap<Service, String>,
    /// `builder = "10.0.0.5:7101"`: where each service answers calls from other machines, with mutual TLS.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub listen: BTreeMap<Service, String>,
    /// `node = "https://10.0.0.6:7104"`: services that run on another machine; those of several replicas with commas between
    /// them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<Service, String>,
    /// `edge-2 = "https://10.0.0.7:7104"`: nodes on more machines, beside the site's own, which is called `local`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub nodes: BTreeMap<String, String>,
    /// By which images get to nodes that do not share the builder's folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<RegistryFile>,
    #[serde(default)]
    pub pki: PkiFile,
    #[serde(default)]
    pub poll: PollFile,
    #[serde(default)]
    pub builder: BuilderFile,
    #[serde(default, skip_serializing_if = "SigningFile::is_default")]
    pub signing: SigningFile,
    /// `pip-token = "keys/pip-token"`: what steps of definitions can be told while they run. Relative to the home.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "CredentialsFile::is_default")]
    pub credentials: CredentialsFile,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OtlpFile {
    /// `http://127.0.0.1:4317`
    pub endpoint: String,
}

/// Durations such as `5s` or `2m`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PollFile {
    pub git: String,
    pub archive: String,
    pub resync: String,
}

impl Default for PollFile {
    fn default() -> Self {
        Self { git: "5s".to_owned(), archive: "1m".to_owned(), resync: "30s".to_owned() }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BuilderFile {
    /// Builds that run at once.
    pub workers: u32,
    /// The store of packages; several sites can share one. Relative to the home.
    pub packages: String,
    /// The cache of layers, likewise.
    pub layers: String,
    /// How long what no build uses is kept: `7d`, `36h`.
    pub unused: String,
}

impl Default for BuilderFile {
    fn default() -> Self {
        Self {
            workers: 2,
            packages: "builder/packages".to_owned(),
            layers: "builder/cache".to_owned(),
            unused: "7d".to_owned(),
        }
    }
}

fn default_log() -> String {
    "info".to_owned()
}

/// The /24 that a site's instances live in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    network: Ipv4Addr,
}

impl Subnet {
    pub const PREFIX: u8 = 24;

    /// The address of a host number.
    pub const fn host(self, number: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.network.octets();
        Ipv4Addr::new(a, b, c, number)
    }

    pub const fn network(self) -> Ipv4Addr {
        self.network
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, Self::PREFIX)
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no private /24 such as `10.77.3.0/24`");
        let network: Ipv4Addr = text.strip_suffix("/24").ok_or_else(wrong)?.parse().map_err(|_| wrong())?;
        if !network.is_private() || network.octets()[3] != 0 {
            return Err(wrong());
        }
        Ok(Self { network })
    }
}

/// A site's settings, all of them checked.
#[derive(Debug, Clone)]
pub struct Site {
    pub home: PathBuf,
    pub name: SiteName,
    pub id: SiteId,
    pub subnet: Subnet,
    pub bridge: String,
    /// A filter for `tracing`: `info`, or `info,kiln_builder=debug`.
    pub log: String,
    pub nats_url: String,
    pub nats_replicas: usize,
    pub store: Option<Store>,
    pub otlp: Option<String>,
    pub metrics: BTreeMap<Service, SocketAddr>,
    pub listen: BTreeMap<Service, SocketAddr>,
    pub peers: BTreeMap<Service, Addresses>,
    /// On more machines; the one that every site has is not among them.
    pub nodes: BTreeMap<NodeName, Address>,
    pub registry: Option<Registry>,
    pub pki: Pki,
    pub poll: Poll,
    pub builder: Builder,
    pub signing: Signing,
    /// Files, by the names that definitions know them by.
    pub secrets: BTreeMap<String, PathBuf>,
    /// Files that nobody has looked at; see [`Site::checked_credentials`].
    pub credentials: Credentials,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Poll {
    pub git: Duration,
    pub archive: Duration,
    pub resync: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Builder {
    pub workers: usize,
    pub packages: PathBuf,
    pub layers: PathBuf,
    /// How long what no build uses is kept.
    pub unused: Duration,
}

impl Site {
    /// Reads and checks `<home>/site.toml`.
    ///
    /// # Errors
    /// Names the file, and the line or the field that is wrong.
    pub fn load(home: &Path) -> Result<Self, Error> {
        let path = home.join("site.toml");
        let unreadable =
            |error: std::io::Error| Error::Unreadable { path: path.clone(), reason: error.to_string() };
        let home = home.canonicalize().map_err(unreadable)?;
        let text = std::fs::read_to_string(&path).map_err(unreadable)?;
        let file =
            SiteFile::parse(&text).map_err(|reason| Error::Malformed { path: path.clone(), reason })?;
        file.check(&home)
    }

    pub fn paths(&self) -> Paths<'_> {
        Paths { home: &self.home }
    }

    /// Where a service of the site is reached from here.
    pub fn place(&self, service: Service) -> Place {
        match self.peers.get(&service) {
            Some(addresses) => Place::Tcp(addresses.clone()),
            None => Place::Socket(self.paths().socket(service)),
        }
    }

    /// What a service shows on TCP, and whom it believes.
    pub fn tls(&self, service: Service) -> TlsFiles {
        let (site, authority) = (self.name.clone(), self.paths().authority());
        TlsFiles { site, authority, identity: Some(self.paths().identity(service)) }
    }
}

impl SiteFile {
    /// # Errors
    /// Names the line, and does not show it: a password may have been written there.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| match error.span() {
            Some(span) => {
                let before = text.get(..span.start).unwrap_or(text);
                format!("line {}: {}", before.matches('\n').count() + 1, error.message())
            }
            None => error.message().to_owned(),
        })
    }

    /// The text of the file.
    ///
    /// # Errors
    /// Where a value has no form in TOML.
    pub fn to_text(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn check(self, home: &Path) -> Result<Site, Error> {
        let path = home.join("site.toml");
        let wrong = |field: &'static str| {
            let path = path.clone();
            move |reason: String| Error::Invalid { path: path.clone(), field, reason }
        };
        let name = self.name.parse::<SiteName>().map_err(|error| wrong("name")(error.to_string()))?;
        let id = self.id.parse::<SiteId>().map_err(|error| wrong("id")(error.to_string()))?;
        check_bridge(&self.bridge).map_err(wrong("bridge"))?;
        broker::check_url(&self.nats.url).map_err(wrong("nats.url"))?;
        broker::check_replicas(self.nats.replicas).map_err(wrong("nats.replicas"))?;
        let store = self.store.map(|store| store.check(home)).transpose().map_err(wrong("store.url"))?;
        if let Some(otlp) = &self.otlp {
            check_url(&otlp.endpoint, &["http://", "https://"]).map_err(wrong("otlp.endpoint"))?;
        }
        let own = Paths { home };
        let signing = self.signing.check(home, (own.signing_key(), own.signing_pub()));
        let signing = signing.map_err(wrong("signing"))?;
        let workers = usize::try_from(self.builder.workers).unwrap_or(0);
        if !(1..=64).contains(&workers) {
            return Err(wrong("builder.workers")(format!("{workers} is not between 1 and 64")));
        }
        tracing_subscriber::EnvFilter::builder()
            .parse(&self.log)
            .map_err(|error| wrong("log")(format!("`{}` is no filter: {error}", self.log)))?;
        Ok(Site {
            subnet: self.subnet.parse().map_err(wrong("subnet"))?,
            metrics: reach::check_ports(&self.metrics).map_err(wrong("metrics"))?,
            listen: reach::check_ports(&self.listen).map_err(wrong("listen"))?,
            peers: reach::check_peers(&self.peers).map_err(wrong("peers"))?,
            nodes: nodes::check_nodes(&self.nodes).map_err(wrong("nodes"))?,
            registry: self
                .registry
                .map(|registry| registry.check(home))
                .transpose()
                .map_err(wrong("registry.repository"))?,
            pki: Pki {
                life: check_duration(&self.pki.life)
                    .and_then(|life| reach::check_life(life, &self.pki.life))
                    .map_err(wrong("pki.life"))?,
                hosts: self.pki.hosts,
            },
            poll: Poll {
                git: check_duration(&self.poll.git).map_err(wrong("poll.git"))?,
                archive: check_duration(&self.poll.archive).map_err(wrong("poll.archive"))?,
                resync: check_duration(&self.poll.resync).map_err(wrong("poll.resync"))?,
            },
            builder: Builder {
                workers,
                packages: home.join(self.builder.packages),
                layers: home.join(self.builder.layers),
                unused: lifetime::check_unused(&self.builder.unused).map_err(wrong("builder.unused"))?,
            },
            signing,
            secrets: check_secrets(self.secrets, home).map_err(wrong("secrets"))?,
            credentials: self.credentials.check(home),
            home: home.to_owned(),
            name,
            id,
            bridge: self.bridge,
            log: self.log,
            nats_url: self.nats.url,
            nats_replicas: self.nats.replicas,
            store,
            otlp: self.otlp.map(|otlp| otlp.endpoint),
        })
    }
}

fn check_secrets(
    secrets: BTreeMap<String, String>,
    home: &Path,
) -> Result<BTreeMap<String, PathBuf>, String> {
    let checked = secrets.into_iter().map(|(name, path)| {
        if is_secret_name(&name) {
            return Ok((name, home.join(path)));
        }
        Err(format!(
            "`{name}` is no name of a secret: wanted at most 64 characters out of a-z, 0-9, `-`, `_` and `.`"
        ))
    });
    checked.collect()
}

fn check_bridge(name: &str) -> Result<(), String> {
    // The kernel's bound on the name of a network interface is 15 bytes.
    let good = (1..=15).contains(&name.len())
        && name.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !name.starts_with('-');
    if good {
        Ok(())
    } else {
        Err(format!("`{name}` is no interface name: 1 to 15 characters out of a-z, 0-9, `-`"))
    }
}

fn check_url(url: &str, schemes: &[&str]) -> Result<(), String> {
    let good = schemes.iter().any(|scheme| url.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty()));
    if good { Ok(()) } else { Err(format!("`{url}` does not begin with {}", schemes.join(" or "))) }
}

fn check_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no duration between 100ms and 24h, such as `30s` or `5m`");
    let duration: SignedDuration = text.parse().map_err(|_| wrong())?;
    let duration = Duration::try_from(duration).map_err(|_| wrong())?;
    let range = Duration::from_millis(100)..=Duration::from_secs(24 * 3600);
    if range.contains(&duration) { Ok(duration) } else { Err(wrong()) }
}

/// Where everything of a site lies.
#[derive(Debug, Clone, Copy)]
pub struct Paths<'a> {
    home: &'a Path,
}

impl Paths<'_> {
    pub fn run(&self) -> PathBuf {
        self.home.join("run")
    }

    pub fn socket(&self, service: Service) -> PathBuf {
        self.run().join(format!("{service}.sock"))
    }

    pub fn pid(&self, service: Service) -> PathBuf {
        self.run().join(format!("{service}.pid"))
    }

    /// Held while the service runs.
    pub fn lock(&self, service: Service) -> PathBuf {
        self.run().join(format!("{service}.lock"))
    }

    /// The folder that is a service's own.
    pub fn service(&self, service: Service) -> PathBuf {
        self.home.join(service.as_str())
    }

    pub fn store(&self, service: Service) -> PathBuf {
        self.service(service).join("store.db")
    }

    pub fn images(&self) -> PathBuf {
        self.home.join("images")
    }

    pub fn keys(&self) -> PathBuf {
        self.home.join("keys")
    }

    pub fn signing_key(&self) -> PathBuf {
        self.keys().join("signing.key")
    }

    pub fn signing_pub(&self) -> PathBuf {
        self.keys().join("signing.pub")
    }

    pub fn pki(&self) -> PathBuf {
        self.keys().join("pki")
    }

    /// The certificates of the authorities that the site trusts.
    pub fn authority(&self) -> PathBuf {
        self.pki().join("authority.pem")
    }

    /// A service's certificate and its key.
    pub fn identity(&self, holder: impl Into<Role>) -> PathBuf {
        self.pki().join(format!("{}.pem", holder.into()))
    }

    pub fn tokens(&self) -> PathBuf {
        self.keys().join("tokens.toml")
    }

    pub fn nats_seed(&self, user: User) -> PathBuf {
        self.keys().join("nats").join(format!("{user}.nk"))
    }

    pub fn nats(&self) -> PathBuf {
        self.home.join("nats")
    }

    pub fn logs(&self) -> PathBuf {
        self.home.join("logs")
    }

    pub fn log(&self, service: Service) -> PathBuf {
        self.logs().join(format!("{service}.log"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
name = "home"
id = "0a1b2c3d"
subnet = "10.77.3.0/24"
bridge = "kiln-0a1b2c"
[nats]
url = "nats://127.0.0.1:4222"
[metrics]
builder = "127.0.0.1:9101"
[poll]
git = "1s"
"#;

    fn load(text: &str) -> Result<Site, Error> {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("site.toml"), text).unwrap();
        Site::load(home.path())
    }

    #[test]
    fn a_site_is_read_with_defaults() {
        let site = load(GOOD).unwrap();
        assert_eq!(site.poll.git, Duration::from_secs(1));
        assert_eq!(site.poll.resync, Duration::from_secs(30));
        assert_eq!(site.builder.packages, site.home.join("builder/packages"));
        assert_eq!(site.subnet.host(7), Ipv4Addr::new(10, 77, 3, 7));
        assert!(site.paths().socket(Service::Node).ends_with("run/node.sock"));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let file: SiteFile = toml::from_str(GOOD).unwrap();
        assert!(load(&file.to_text().unwrap()).is_ok());
    }

    /// What may be written is shown to people, and what is shown may be written.
    #[test]
    fn the_example_has_every_setting_and_no_other() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/site.toml");
        let text = std::fs::read_to_string(path).unwrap();
        let file = SiteFile::parse(&text).unwrap();
        file.clone().check(Path::new("/nonexistent")).unwrap();
        // Written back it has every setting that a file can have, as the example leaves out none that has no default.
        let all: toml::Table = file.to_text().unwrap().parse().unwrap();
        let shown: toml::Table = text.parse().unwrap();
        assert_eq!(names(&all), names(&shown));
        assert_eq!(names(&all).len(), 36);
    }

    fn names(table: &toml::Table) -> Vec<String> {
        let under = |(key, value): (&String, &toml::Value)| match value {
            toml::Value::Table(table) => names(table).iter().map(|name| format!("{key}.{name}")).collect(),
            _ => vec![key.clone()],
        };
        let mut names: Vec<_> = table.iter().flat_map(under).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (from, to, named) in [
            ("name = \"home\"", "name = \"Home\"", "`name`"),
            ("0a1b2c3d", "xyz", "`id`"),
            ("10.77.3.0/24", "10.77.3.1/24", "`subnet`"),
            ("10.77.3.0/24", "8.8.8.0/24", "`subnet`"),
            ("kiln-0a1b2c", "kiln-0a1b2c3d-long", "`bridge`"),
            ("nats://127", "http://127", "`nats.url`"),
            ("4222\"", "4222,tls://127.0.0.1:4223\"", "`nats.url`"),
            ("4222\"", "4222\"\nreplicas = 2", "`nats.replicas`"),
            ("127.0.0.1:9101", "localhost:9101", "`metrics`"),
            ("[poll]", "[listen]\nbuilder = \"10.0.0.5\"\n[poll]", "`listen`"),
            ("[poll]", "[peers]\nnode = \"http://10.0.0.5:1\"\n[poll]", "`peers`"),
            ("[poll]", "[secrets]\n\"../x\" = \"keys/x\"\n[poll]", "`secrets`"),
            ("[poll]", "[pki]\nlife = \"1s\"\n[poll]", "`pki.life`"),
            ("[poll]", "[pki]\nlife = \"721h\"\n[poll]", "`pki.life`"),
            ("[poll]", "[builder]\nunused = \"1h\"\n[poll]", "`builder.unused`"),
            ("git = \"1s\"", "git = \"1\"", "`poll.git`"),
            ("git = \"1s\"", "git = \"-1s\"", "`poll.git`"),
            ("git = \"1s\"", "gti = \"1s\"", "gti"),
            ("name = \"home\"", "", "name"),
            ("id = \"0a1b2c3d\"", "id = \"0a1b2c3d\"\nlog = \"=,=\"", "`log`"),
            ("[metrics]", "[store]\nurl = \"sqlite://x\"\n[metrics]", "`store.url`"),
            ("[metrics]", "[store]\nurl = \"postgres://db/k\"\npassword = \"hunter2\"\n[metrics]", "line 10"),
            ("[metrics]", "[store]\nurl = \"postgres://u:hunter2@db/k\"\n[metrics]", "`store.url`"),
        ] {
            let error = load(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(named) && error.contains("site.toml"), "{to}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
