//! Who may do what at the broker: every user has just the subjects of its work, and an inbox of its own.

use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;

use kiln_model::name::SiteName;

use crate::subjects::Stream;

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
    /// Makes the streams, and nothing else.
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

    fn publish(self, site: &SiteName) -> Vec<String> {
        match self {
            Self::Builder | Self::Deployer => self.service(site, &[Stream::Events]),
            Self::Monitor => self.service(site, &[Stream::Events, Stream::Reports]),
            // It is told everything by gRPC, and its facts come to light there.
            Self::Node => vec![format!("kiln.v1.{site}.node.>")],
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
            Self::Reader => vec![format!("{}.>", self.inbox())],
            Self::Admin => {
                let verbs = ["CREATE", "UPDATE", "INFO"];
                let calls = verbs.iter().flat_map(|verb| {
                    Stream::ALL.map(|stream| format!("$JS.API.STREAM.{verb}.{}", stream.name(site)))
                });
                calls.collect()
            }
        }
    }

    /// Publishes its own events and dead letters, and keeps one durable consumer, of its own name, on each stream.
    fn service(self, site: &SiteName, consumes: &[Stream]) -> Vec<String> {
        let mut allowed = vec![format!("kiln.v1.{site}.{self}.>"), format!("kiln.dead.v1.{site}.{self}.>")];
        for stream in consumes {
            let stream = stream.name(site);
            allowed.extend([
                format!("$JS.API.STREAM.INFO.{stream}"),
                format!("$JS.API.CONSUMER.CREATE.{stream}.{self}"),
                format!("$JS.API.CONSUMER.CREATE.{stream}.{self}.>"),
                format!("$JS.API.CONSUMER.INFO.{stream}.{self}"),
                format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{self}"),
                format!("$JS.ACK.{stream}.{self}.>"),
            ]);
        }
        allowed
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
#[derive(Debug, Clone)]
pub struct NewKey {
    pub seed: String,
    pub public: String,
}

/// Makes a key pair.
///
/// # Errors
/// Where the machine gives no random bytes.
pub fn new_key() -> Result<NewKey, nkeys::error::Error> {
    let pair = nkeys::KeyPair::new_user();
    Ok(NewKey { seed: pair.seed()?, public: pair.public_key() })
}

/// The `authorization` section of the broker's configuration, for users with their public keys.
pub fn users_section(site: &SiteName, keys: &[(User, String)]) -> String {
    let list = |subjects: Vec<String>| {
        let quoted: Vec<_> = subjects.iter().map(|subject| format!("\"{subject}\"")).collect();
        format!("[{}]", quoted.join(", "))
    };
    let mut text = String::from("authorization {\n  users = [\n");
    for (user, public) in keys {
        let publish = user.publish(site);
        let publish = format!("{{ allow: {} }}", list(publish));
        let subscribe = list(user.subscribe(site));
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "    # {user}\n    {{ nkey: {public}, permissions: {{ publish: {publish}, subscribe: {{ allow: {subscribe} }} }} }}"
        );
    }
    text.push_str("  ]\n}\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_service_may_publish_for_another_or_make_streams() {
        let site = "home".parse().unwrap();
        let builder = User::Builder.publish(&site);
        assert!(builder.contains(&"kiln.v1.home.builder.>".to_owned()));
        assert!(
            !builder.iter().any(|subject| subject.contains("deployer") || subject.contains("STREAM.CREATE"))
        );
        assert!(!User::Reader.subscribe(&site).iter().any(|subject| subject == ">" || subject == "_INBOX.>"));
    }
}
