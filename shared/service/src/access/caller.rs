//! Who calls, and in which role.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use kiln_model::event::Service;
use kiln_model::name::SiteName;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// What a certificate or a token makes its holder. A service has one of its own name; people have one out of three,
/// each of which may all that the one before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Builder,
    Deployer,
    Monitor,
    Node,
    Console,
    /// Answers where the site's events go through, and calls nobody.
    Broker,
    Viewer,
    Operator,
    Admin,
}

impl Role {
    pub const ALL: [Self; 9] = [
        Self::Builder,
        Self::Deployer,
        Self::Monitor,
        Self::Node,
        Self::Console,
        Self::Broker,
        Self::Viewer,
        Self::Operator,
        Self::Admin,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Builder => "builder",
            Self::Deployer => "deployer",
            Self::Monitor => "monitor",
            Self::Node => "node",
            Self::Console => "console",
            Self::Broker => "broker",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Admin => "admin",
        }
    }

    pub const fn is_person(self) -> bool {
        matches!(self, Self::Viewer | Self::Operator | Self::Admin)
    }
}

impl From<Service> for Role {
    fn from(service: Service) -> Self {
        match service {
            Service::Builder => Self::Builder,
            Service::Deployer => Self::Deployer,
            Service::Monitor => Self::Monitor,
            Service::Node => Self::Node,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == text);
        found.ok_or_else(|| format!("`{text}` is no role: {}", Self::ALL.map(Self::as_str).join(", ")))
    }
}

/// The name of a person or of a program that acts for itself, as it stands in certificates and in the audit record.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PersonName(String);

impl PersonName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PersonName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for PersonName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let first = text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if !first || text.len() > 64 || !text.bytes().all(good) {
            let shown: String = text.chars().take(80).collect();
            return Err(format!(
                "`{shown}` is no name: 1 to 64 characters out of a-z, A-Z, 0-9, `.`, `_`, `-`, the first a letter or digit"
            ));
        }
        // The audit record tells them apart by name alone.
        if text.parse::<Role>().is_ok_and(|role| !role.is_person()) {
            return Err(format!("`{text}` is the name of a service"));
        }
        Ok(Self(text.to_owned()))
    }
}

impl Serialize for PersonName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PersonName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Whom a certificate is for. As a URI it is a SPIFFE id whose trust domain is the site:
/// `spiffe://home/service/builder`, `spiffe://home/person/ada/operator`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    person: Option<PersonName>,
    role: Role,
}

impl Identity {
    /// # Errors
    /// Where the role is one of people.
    pub fn service(role: Role) -> Result<Self, String> {
        if role.is_person() {
            return Err(format!("{role} is a role of people, no service"));
        }
        Ok(Self { person: None, role })
    }

    /// # Errors
    /// Where the role is that of a service.
    pub fn person(name: PersonName, role: Role) -> Result<Self, String> {
        if !role.is_person() {
            return Err(format!("{role} is the role of a service; people are viewer, operator or admin"));
        }
        Ok(Self { person: Some(name), role })
    }

    pub const fn role(&self) -> Role {
        self.role
    }

    /// The person's name, or the service's.
    pub fn name(&self) -> &str {
        self.person.as_ref().map_or(self.role.as_str(), PersonName::as_str)
    }

    pub fn uri(&self, site: &SiteName) -> String {
        match &self.person {
            Some(name) => format!("spiffe://{site}/person/{name}/{}", self.role),
            None => format!("spiffe://{site}/service/{}", self.role),
        }
    }

    /// # Errors
    /// What is wrong with the URI, or that it is another site's.
    pub fn of_uri(uri: &str, site: &SiteName) -> Result<Self, String> {
        let shown: String = uri.chars().take(120).collect();
        let wrong =
            || format!("`{shown}` is no `spiffe://<site>/service/<name>` or `…/person/<name>/<role>`");
        let path = uri.strip_prefix("spiffe://").ok_or_else(wrong)?;
        let mut parts = path.split('/');
        let of = parts.next().unwrap_or_default();
        let identity = match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("service"), Some(role), None, None) => Self::service(role.parse()?)?,
            (Some("person"), Some(name), Some(role), None) => Self::person(name.parse()?, role.parse()?)?,
            _ => return Err(wrong()),
        };
        if of != site.as_str() {
            return Err(format!("`{shown}` is of another site; this one is {site}"));
        }
        Ok(identity)
    }
}

/// How a caller showed who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// By being let to the Unix socket, with this process id.
    Socket {
        process: i32,
    },
    Certificate,
    Token,
}

impl Way {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Socket { .. } => "socket",
            Self::Certificate => "certificate",
            Self::Token => "token",
        }
    }
}

/// Whoever makes a call. It comes from the connection, never from what the call says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    name: String,
    /// None: every role. Whoever gets to the Unix socket can read the site's keys as well.
    role: Option<Role>,
    way: Way,
    /// When the certificate ends.
    pub(crate) until: Option<SystemTime>,
}

impl Caller {
    /// A process of this machine that the mode of the socket's folder lets in.
    pub fn local(user: impl Into<String>, process: i32) -> Self {
        Self { name: user.into(), role: None, way: Way::Socket { process }, until: None }
    }

    pub fn certified(identity: &Identity, until: SystemTime) -> Self {
        let name = identity.name().to_owned();
        Self { name, role: Some(identity.role), way: Way::Certificate, until: Some(until) }
    }

    pub(crate) fn by_token(name: &PersonName, role: Role) -> Self {
        Self { name: name.to_string(), role: Some(role), way: Way::Token, until: None }
    }

    /// For the audit record and for causes.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub const fn role(&self) -> Option<Role> {
        self.role
    }

    pub const fn way(&self) -> Way {
        self.way
    }

    pub(crate) fn is_person(&self) -> bool {
        self.role.is_some_and(Role::is_person)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, role, way, .. } = self;
        let way = match way {
            Way::Socket { .. } => "by the Unix socket",
            Way::Certificate => "by certificate",
            Way::Token => "by token",
        };
        match role {
            Some(role) => write!(f, "{name} ({role}, {way})"),
            None => write!(f, "{name} ({way})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> SiteName {
        "home".parse().unwrap()
    }

    #[test]
    fn an_identity_comes_back_from_its_uri() {
        let ada = || "ada.l".parse::<PersonName>().unwrap();
        for role in Role::ALL {
            let of = if role.is_person() { Identity::person(ada(), role) } else { Identity::service(role) };
            let identity = of.unwrap();
            assert_eq!(Identity::of_uri(&identity.uri(&site()), &site()), Ok(identity));
            let other =
                if role.is_person() { Identity::service(role) } else { Identity::person(ada(), role) };
            assert!(other.is_err(), "{role}");
        }
        let uri = Identity::person(ada(), Role::Operator).unwrap().uri(&site());
        assert_eq!(uri, "spiffe://home/person/ada.l/operator");
    }

    #[test]
    fn what_is_no_identity_of_the_site_is_refused() {
        for bad in [
            "",
            "spiffe://home",
            "spiffe://home/service",
            "spiffe://home/service/",
            "spiffe://home/service/builder/",
            "spiffe://home/service/builder/admin",
            "spiffe://home/service/admin",
            "spiffe://home/person/ada/builder",
            "spiffe://home/person/ada",
            "spiffe://home/person/../admin",
            "spiffe://home/person/monitor/admin",
            "spiffe://home/person/a b/admin",
            "spiffe://home/person/ada/admin\n",
            "spiffe://home/person//admin",
            "spiffe://other/service/builder",
            "spiffe://HOME/service/builder",
            "https://home/service/builder",
        ] {
            assert!(Identity::of_uri(bad, &site()).is_err(), "{bad}");
        }
    }
}
