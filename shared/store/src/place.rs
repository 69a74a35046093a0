//! Where a store is.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use url::Url;
use zeroize::Zeroizing;

#[derive(Debug, Clone)]
pub enum Place {
    /// An SQLite file.
    File(PathBuf),
    Postgres(Database),
}

/// A schema in a PostgreSQL database.
///
/// Each service has a schema of its own in one database, and names no other one: one address and one backup serve a
/// whole site, and still no service can reach another's tables by mistake.
#[derive(Debug, Clone)]
pub struct Database {
    pub url: PostgresUrl,
    /// A name of a-z, 0-9 and `_`.
    pub schema: String,
    /// Else it comes from where libpq's programs have it: `PGPASSWORD`, or the file that `PGPASSFILE` names.
    pub password: Option<Password>,
    /// The file on this machine that notes what was seen of the store, so that a restored one is known.
    pub seen: PathBuf,
}

/// Never shown, and wiped where it was held. What the driver of the database holds of it is the driver's.
#[derive(Clone)]
pub struct Password(Zeroizing<String>);

impl Password {
    pub fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// `postgres://user@host:5432/database?sslmode=verify-full`, or `postgres:///database?host=/run/postgresql&user=kiln` for a
/// Unix socket. Never holds a password, so it can be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostgresUrl(Url);

/// What may stand behind the `?`. `password` is none of it.
const PARAMETERS: [&str; 6] = ["host", "user", "sslmode", "sslrootcert", "sslcert", "sslkey"];
const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];
/// Those that never talk in the clear.
const ALWAYS_TLS: [&str; 3] = ["require", "verify-ca", "verify-full"];

impl PostgresUrl {
    pub(crate) fn as_url(&self) -> &Url {
        &self.0
    }

    pub(crate) fn parameter(&self, name: &str) -> Option<String> {
        self.0.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    /// Certificates and keys that it names.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        ["sslrootcert", "sslcert", "sslkey"]
            .into_iter()
            .filter_map(|it| self.parameter(it))
            .map(PathBuf::from)
    }

    /// What is said there does not leave the machine.
    pub(crate) fn is_local(&self) -> bool {
        let host =
            self.parameter("host").or_else(|| self.0.host_str().map(str::to_owned)).unwrap_or_default();
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        host == "localhost" || host.starts_with('/') || address.is_ok_and(|address| address.is_loopback())
    }
}

impl FromStr for PostgresUrl {
    type Err = String;

    /// What is refused is not repeated: it may hold a password.
    fn from_str(text: &str) -> Result<Self, String> {
        let url = Url::parse(text).map_err(|error| format!("it is no URL: {error}"))?;
        if !["postgres", "postgresql"].contains(&url.scheme()) {
            return Err("it does not begin with postgres://".to_owned());
        }
        if url.password().is_some() || url.query_pairs().any(|(key, _)| key == "password") {
            return Err(
                "it holds a password: put that into a file, and name it as `password_file`".to_owned()
            );
        }
        if let Some((key, _)) = url.query_pairs().find(|(key, _)| !PARAMETERS.contains(&&**key)) {
            return Err(format!("there is no parameter `{key}`: there are {}", PARAMETERS.join(", ")));
        }
        if url.path().trim_start_matches('/').is_empty() {
            return Err("it names no database, as in postgres://host/kiln".to_owned());
        }
        let checked = Self(url);
        let has_host = checked.0.host_str().is_some_and(|host| !host.is_empty());
        match checked.parameter("host") {
            Some(host) if has_host || !host.starts_with('/') => {
                return Err(
                    "the parameter `host` is for the folder of a socket, in the place of a host".to_owned()
                );
            }
            None if !has_host => return Err("it names no host, as in postgres://host/kiln".to_owned()),
            _ => {}
        }
        match checked.parameter("sslmode").as_deref() {
            Some(mode) if !MODES.contains(&mode) => {
                Err(format!("there is no sslmode `{mode}`: there are {}", MODES.join(", ")))
            }
            Some(mode) if !ALWAYS_TLS.contains(&mode) && !checked.is_local() => Err(format!(
                "sslmode={mode} could talk in the clear with another machine: leave it out, which is verify-full"
            )),
            _ => Ok(checked),
        }
    }
}

/// Without the parameters.
impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, database) = (self.0.host_str().unwrap_or(""), self.0.path());
        let host = self.parameter("host").unwrap_or_else(|| host.to_owned());
        let port = self.0.port().map(|port| format!(":{port}")).unwrap_or_default();
        write!(f, "postgres://{host}{port}{database}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_kinds_are_shown_in_short() {
        for (text, shown, local) in [
            ("postgres://kiln@db.example/kiln", "postgres://db.example/kiln", false),
            ("postgresql://db:5433/kiln?sslmode=require", "postgres://db:5433/kiln", false),
            ("postgres://127.0.0.1/kiln?sslmode=disable", "postgres://127.0.0.1/kiln", true),
            ("postgres://[::1]:5432/kiln", "postgres://[::1]:5432/kiln", true),
            ("postgres:///kiln?host=/run/postgresql", "postgres:///run/postgresql/kiln", true),
        ] {
            let url: PostgresUrl = text.parse().unwrap();
            assert_eq!((url.to_string().as_str(), url.is_local()), (shown, local), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_a_password_is_not_repeated() {
        for (text, named) in [
            ("postgres://kiln:hunter2@db.example/kiln", "password_file"),
            ("postgres://db.example/kiln?password=hunter2", "password_file"),
            ("mysql://u:hunter2@db.example/kiln", "postgres://"),
            ("postgres://u:hunter2@db example/kiln", "no URL"),
            ("postgres://db.example", "no database"),
            ("postgres:///kiln", "no host"),
            ("postgres://db.example/kiln?host=/run/postgresql", "`host`"),
            ("postgres:///kiln?host=db.example", "`host`"),
            ("postgres://db.example/kiln?sslmode=never", "never"),
            ("postgres://db.example/kiln?sslmode=disable", "in the clear"),
            ("postgres://10.0.0.7/kiln?sslmode=prefer", "in the clear"),
            ("postgres://db.example/kiln?options=-cfsync%3Doff", "options"),
        ] {
            let error = text.parse::<PostgresUrl>().unwrap_err();
            assert!(error.contains(named) && !error.contains("hunter2"), "{text}: {error}");
        }
    }
}
