//! Which keys sign the site's images, and whose signatures let which server's images run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kiln_model::name::ServerName;
use serde::{Deserialize, Serialize};

/// `[signing]` as it is written. Where it is left out, the key that `kiln up` made signs everything and is trusted with
/// everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SigningFile {
    /// Each of them signs every image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<KeyFile>,
    /// The first one that is about a server counts for it. A server that none is about has no image that may run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trust: Vec<TrustFile>,
}

/// `{ file = "keys/signing.key" }`, or `{ command = ["/usr/local/bin/sign"], public = "keys/hsm.pub" }`. Paths are
/// relative to the home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum KeyFile {
    File { file: String },
    Command { command: Vec<String>, public: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustFile {
    /// Names, beginnings of names as in `shop-*`, or `*`.
    pub servers: Vec<String>,
    /// Files of public keys, relative to the home.
    pub keys: Vec<String>,
    /// How many different ones of them must have signed.
    #[serde(default = "one")]
    pub threshold: usize,
}

fn one() -> usize {
    1
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signing {
    pub keys: Vec<Key>,
    trust: Vec<(Vec<Pattern>, Trust)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    File(PathBuf),
    Command { run: Vec<String>, public: PathBuf },
}

/// Whose signatures count, and how many of them are needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    pub keys: Vec<PathBuf>,
    pub threshold: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pattern {
    Exactly(ServerName),
    Beginning(String),
}

impl Pattern {
    fn parse(text: &str) -> Result<Self, String> {
        match text.strip_suffix('*') {
            Some(beginning) if beginning.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') => {
                Ok(Self::Beginning(beginning.to_owned()))
            }
            Some(_) => Err(format!("`{text}` has more in it than the beginning of a name and one `*`")),
            None => text.parse().map(Self::Exactly).map_err(|error| format!("{error}")),
        }
    }

    fn takes(&self, server: &str) -> bool {
        match self {
            Self::Exactly(name) => name.as_str() == server,
            Self::Beginning(beginning) => server.starts_with(beginning),
        }
    }
}

impl Signing {
    /// One key signs everything, and is trusted with everything.
    pub fn with_one_key(private: PathBuf, public: PathBuf) -> Self {
        let everything = vec![Pattern::Beginning(String::new())];
        let trust = Trust { keys: vec![public], threshold: 1 };
        Self { keys: vec![Key::File(private)], trust: vec![(everything, trust)] }
    }

    /// The rule for a server's images. Where a caller names none, only what is said of all servers.
    pub fn trust(&self, server: &str) -> Option<&Trust> {
        let found = self.trust.iter().find(|(servers, _)| servers.iter().any(|it| it.takes(server)));
        found.map(|(_, trust)| trust)
    }

    /// Keys, public keys and programs, each once.
    pub fn files(&self) -> BTreeSet<PathBuf> {
        let mut files: BTreeSet<_> = self.trust.iter().flat_map(|(_, trust)| trust.keys.clone()).collect();
        for key in &self.keys {
            match key {
                Key::File(path) => files.extend([path.clone()]),
                Key::Command { run, public } => {
                    files.extend(run.first().map(PathBuf::from));
                    files.extend([public.clone()]);
                }
            }
        }
        files
    }
}

impl SigningFile {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// # Errors
    /// What is wrong, in words.
    pub(super) fn check(self, home: &Path, own: (PathBuf, PathBuf)) -> Result<Signing, String> {
        let mut keys = Vec::new();
        for key in self.keys {
            keys.push(match key {
                KeyFile::File { file } => Key::File(home.join(file)),
                KeyFile::Command { command, public } => {
                    if !command.first().is_some_and(|program| program.starts_with('/')) {
                        return Err("a command begins with the whole path of a program".to_owned());
                    }
                    Key::Command { run: command, public: home.join(public) }
                }
            });
        }
        let mut trust = Vec::new();
        for rule in self.trust {
            let servers =
                rule.servers.iter().map(|text| Pattern::parse(text)).collect::<Result<Vec<_>, _>>()?;
            let mut keys: Vec<PathBuf> = rule.keys.iter().map(|key| home.join(key)).collect();
            keys.sort();
            keys.dedup();
            if servers.is_empty() || keys.len() != rule.keys.len() {
                return Err("a rule names servers, and each key once".to_owned());
            }
            if !(1..=keys.len()).contains(&rule.threshold) {
                let of = format!("{} keys", keys.len());
                return Err(format!(
                    "a threshold of {} can't be reached by {of}, or asks for none",
                    rule.threshold
                ));
            }
            trust.push((servers, Trust { keys, threshold: rule.threshold }));
        }
        let own = Signing::with_one_key(own.0, own.1);
        if keys.is_empty() {
            keys = own.keys;
        }
        if trust.is_empty() {
            trust = own.trust;
        }
        Ok(Signing { keys, trust })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Signing, String> {
        let file: SigningFile = toml::from_str(text).map_err(|error| error.to_string())?;
        file.check(Path::new("/home"), ("/home/own.key".into(), "/home/own.pub".into()))
    }

    #[test]
    fn the_first_rule_about_a_server_counts_and_without_rules_the_own_key_is_trusted() {
        let own = check("").unwrap();
        assert_eq!(own.keys, [Key::File("/home/own.key".into())]);
        assert_eq!(own.trust("web").unwrap().keys, [PathBuf::from("/home/own.pub")]);

        let signing = check(
            "keys = [{ file = \"a.key\" }, { command = [\"/bin/sign\", \"-x\"], public = \"/etc/b.pub\" }]\n\
             [[trust]]\nservers = [\"web\", \"shop-*\"]\nkeys = [\"a.pub\", \"/etc/b.pub\"]\nthreshold = 2\n\
             [[trust]]\nservers = [\"db\"]\nkeys = [\"a.pub\"]\n",
        )
        .unwrap();
        assert_eq!(signing.keys.len(), 2);
        for (server, threshold) in
            [("web", Some(2)), ("shop-x", Some(2)), ("db", Some(1)), ("shop", None), ("", None)]
        {
            assert_eq!(signing.trust(server).map(|it| it.threshold), threshold, "{server}");
        }
        let either = check("[[trust]]\nservers = [\"*\"]\nkeys = [\"a\", \"b\"]").unwrap();
        assert_eq!(either.trust("").unwrap().threshold, 1);
    }

    #[test]
    fn what_could_trust_more_or_less_than_meant_is_refused() {
        for (text, named) in [
            ("keys = [{ command = [\"sign\"], public = \"a.pub\" }]", "whole path"),
            ("keys = [{ command = [], public = \"a.pub\" }]", "whole path"),
            ("keys = [{ file = \"a\", public = \"b\" }]", "keys"),
            ("[[trust]]\nservers = []\nkeys = [\"a\"]", "names servers"),
            ("[[trust]]\nservers = [\"*\"]\nkeys = []", "can't be reached"),
            ("[[trust]]\nservers = [\"*\"]\nkeys = [\"a\", \"a\"]\nthreshold = 2", "each key once"),
            ("[[trust]]\nservers = [\"*\"]\nkeys = [\"a\"]\nthreshold = 2", "can't be reached"),
            ("[[trust]]\nservers = [\"*\"]\nkeys = [\"a\"]\nthreshold = 0", "can't be reached"),
            ("[[trust]]\nservers = [\"w*b\"]\nkeys = [\"a\"]", "w*b"),
            ("[[trust]]\nservers = [\"**\"]\nkeys = [\"a\"]", "**"),
            ("[[trust]]\nservers = [\"Web\"]\nkeys = [\"a\"]", "Web"),
        ] {
            let refused = check(text).unwrap_err();
            assert!(refused.contains(named), "{text}: {refused}");
        }
    }
}
