//! Who may do what at the broker: every user has just the subjects of its work, and an inbox of its own.

use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;

use kiln_model::event::Service;
use kiln_model::name::SiteName;
use zeroize::Zeroizing;

use crate::interests;
use crate::subjects::{Stream, filters, report_filter};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum User {
    Builder,
    Deployer,
    Monitor,
    Node,
    /// Looks on, and sends reports.
    Cli,
    /// Other systems that look on.
    Reader,
    /// Makes the streams and the services' consumers, and nothing else.
    Admin,
}

impl User {
    pub const ALL: [Self; 7] =
        [Self::Builder, Self::Deployer, Self::Monitor, Self::Node, Self::Cli, Self::Reader, Self::Admin];

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Builder => "builder",
            Self::Deployer => "deployer",
            Self::Monitor => "monitor",
            Self::Node => "node",
            Self::Cli => "cli",
            Self::Reader => "reader",
            Self::Admin => "admin",
        }
    }

    /// The prefix of the subjects on which this user is answered: nobody else may listen there.
    pub(super) fn inbox(self) -> String {
        format!("_INBOX.{self}")
    }

    /// The prefix of its calls to JetStream. Those of a service are imported into its account under a name of their
    /// own, as each account has a JetStream by the usual one, which would answer too.
    pub(super) const fn api(self) -> &'static str {
        match self {
            Self::Builder | Self::Deployer | Self::Monitor | Self::Node => "kiln.api",
            Self::Cli | Self::Reader | Self::Admin => SERVERS_API,
        }
    }

    /// What a service may ask of the site's account: to store its own events and dead letters, and to read by the one
    /// consumer of its name on each stream.
    fn services(self, site: &SiteName) -> Option<Services> {
        let own = [format!("kiln.v1.{site}.{self}.>"), format!("kiln.dead.v1.{site}.{self}.>")];
        let (own, consumes): (&[String], &[Stream]) = match self {
            Self::Builder | Self::Deployer => (&own, &[Stream::Events]),
            Self::Monitor => (&own, &[Stream::Events, Stream::Reports]),
            // It is told everything by gRPC, and its facts come to light there.
            Self::Node => (&own[..1], &[]),
            Self::Cli | Self::Reader | Self::Admin => return None,
        };
        let mut services = Services { subjects: own.to_vec(), calls: Vec::new() };
        for stream in consumes {
            let stream = stream.name(site);
            services.subjects.push(format!("$JS.ACK.{stream}.{self}.>"));
            services.calls.extend([
                format!("STREAM.INFO.{stream}"),
                format!("CONSUMER.INFO.{stream}.{self}"),
                format!("CONSUMER.MSG.NEXT.{stream}.{self}"),
            ]);
        }
        Some(services)
    }

    fn publish(self, site: &SiteName) -> Vec<String> {
        if let Some(services) = self.services(site) {
            let calls = services.calls.iter().map(|call| format!("{}.{call}", self.api()));
            return services.subjects.iter().cloned().chain(calls).collect();
        }
        match self {
            Self::Cli => {
                let stream = Stream::Events.name(site);
                vec![
                    // To learn by its own echo that a subscription stands.
                    format!("{}.>", self.inbox()),
                    Stream::Reports.subjects(site),
                    format!("$JS.API.STREAM.INFO.{stream}"),
                    format!("$JS.API.STREAM.MSG.GET.{stream}"),
                ]
            }
            Self::Admin => {
                let streams = ["CREATE", "UPDATE", "INFO"].into_iter().flat_map(|verb| {
                    Stream::ALL.map(|stream| format!("$JS.API.STREAM.{verb}.{}", stream.name(site)))
                });
                let consumers = consumers(site).into_iter().flat_map(|Durable { stream, user, .. }| {
                    let stream = stream.name(site);
                    let create = format!("$JS.API.CONSUMER.CREATE.{stream}.{user}");
                    [format!("{create}.>"), create]
                });
                streams.chain(consumers).collect()
            }
            _ => vec![format!("{}.>", self.inbox())],
        }
    }

    fn subscribe(self, site: &SiteName) -> Vec<String> {
        let mut allowed = vec![format!("{}.>", self.inbox())];
        match self {
            Self::Cli => allowed.extend([Stream::Events.subjects(site), Stream::DeadLetters.subjects(site)]),
            Self::Reader => allowed.push(Stream::Events.subjects(site)),
            Self::Builder | Self::Deployer | Self::Monitor | Self::Node | Self::Admin => {}
        }
        allowed
    }
}

const SERVERS_API: &str = "$JS.API";

/// What an account takes from the site's.
struct Services {
    /// By the same name.
    subjects: Vec<String>,
    /// To JetStream, without a prefix.
    calls: Vec<String>,
}

/// A consumer that the admin makes for a service.
pub(super) struct Durable {
    pub(super) stream: Stream,
    pub(super) user: User,
    pub(super) filters: Vec<String>,
}

pub(super) fn consumers(site: &SiteName) -> Vec<Durable> {
    let events = [
        (User::Builder, Service::Builder),
        (User::Deployer, Service::Deployer),
        (User::Monitor, Service::Monitor),
    ];
    let events = events.map(|(user, service)| Durable {
        stream: Stream::Events,
        user,
        filters: filters(site, interests(service)),
    });
    let reports =
        Durable { stream: Stream::Reports, user: User::Monitor, filters: vec![report_filter(site)] };
    events.into_iter().chain([reports]).collect()
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("`{0}` is no user of the broker: wanted builder, deployer, monitor, node, cli, reader or admin")]
pub struct NotAUser(String);

impl FromStr for User {
    type Err = NotAUser;

    fn from_str(text: &str) -> Result<Self, NotAUser> {
        Self::ALL.into_iter().find(|user| user.as_str() == text).ok_or_else(|| NotAUser(text.to_owned()))
    }
}

/// A user's key pair: the seed is its secret, the public key stands in the broker's configuration.
#[derive(Clone)]
pub struct NewKey {
    pub seed: Zeroizing<String>,
    pub public: String,
}

/// Makes a key pair.
///
/// # Errors
/// Where the machine gives no random bytes.
pub fn new_key() -> Result<NewKey, nkeys::error::Error> {
    let pair = nkeys::KeyPair::new_user();
    Ok(NewKey { seed: Zeroizing::new(pair.seed()?), public: pair.public_key() })
}

/// The `accounts` section of the broker's configuration, for users with their public keys.
///
/// Each service has an account of its own, since permissions alone do not bind it: a broker sends an answer to whichever
/// subject the question names, whoever may publish there. So a service that may ask for its next message could have it
/// stored as another's event. In an account of its own such an answer stays there.
pub fn accounts_section(site: &SiteName, keys: &[(User, String)]) -> String {
    let upper = site.as_str().to_ascii_uppercase();
    let own = |user: User| format!("KILN_{upper}_{}", user.as_str().to_ascii_uppercase());
    let services = || keys.iter().filter_map(|(user, public)| Some((*user, public, user.services(site)?)));
    let mut text = format!("accounts {{\n  KILN_{upper}: {{\n    jetstream: enabled\n    users: [\n");
    // Writing to a String can't fail, here and below.
    for (user, public) in keys.iter().filter(|(user, _)| user.services(site).is_none()) {
        let _ = writeln!(text, "      {}", entry(site, *user, public));
    }
    text.push_str("    ]\n    exports: [\n");
    for (user, _, services) in services() {
        let calls = services.calls.iter().map(|call| format!("{SERVERS_API}.{call}"));
        for subject in services.subjects.iter().cloned().chain(calls) {
            let _ = writeln!(text, "      {{ service: \"{subject}\", accounts: [{}] }}", own(user));
        }
    }
    text.push_str("    ]\n  }\n");
    for (user, public, services) in services() {
        let _ = write!(text, "  {}: {{\n    users: [{}]\n", own(user), entry(site, user, public));
        text.push_str("    imports: [\n");
        let from = |subject: &str| format!("service: {{ account: KILN_{upper}, subject: \"{subject}\" }}");
        for subject in &services.subjects {
            let _ = writeln!(text, "      {{ {} }}", from(subject));
        }
        for call in &services.calls {
            let subject = from(&format!("{SERVERS_API}.{call}"));
            let _ = writeln!(text, "      {{ {subject}, to: \"{}.{call}\" }}", user.api());
        }
        text.push_str("    ]\n  }\n");
    }
    text.push_str("}\n");
    text
}

fn entry(site: &SiteName, user: User, public: &str) -> String {
    let list = |subjects: Vec<String>| {
        let quoted: Vec<_> = subjects.iter().map(|subject| format!("\"{subject}\"")).collect();
        quoted.join(", ")
    };
    let (publish, subscribe) = (list(user.publish(site)), list(user.subscribe(site)));
    format!(
        "{{ nkey: {public}, permissions: {{ publish: {{ allow: [{publish}] }}, subscribe: {{ allow: [{subscribe}] }} }} }}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_service_may_publish_for_another_or_make_anything() {
        let site = "home".parse().unwrap();
        let builder = User::Builder.publish(&site);
        assert!(builder.contains(&"kiln.v1.home.builder.>".to_owned()));
        assert!(!builder.iter().any(|subject| subject.contains("deployer") || subject.contains("CREATE")));
        assert!(!User::Reader.subscribe(&site).iter().any(|subject| subject == ">" || subject == "_INBOX.>"));
    }
}
