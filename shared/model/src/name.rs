//! Names and ids that can't hold a wrong value. Subjects, paths, cgroups and network names are made from them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is not the name it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {wanted}")]
pub struct BadName {
    text: String,
    wanted: &'static str,
}

impl BadName {
    fn new(text: &str, wanted: &'static str) -> Self {
        Self { text: text.chars().take(80).collect(), wanted }
    }
}

fn is_label(text: &str, max: usize) -> bool {
    let bytes = text.as_bytes();
    let edge = |b: Option<&u8>| matches!(b, Some(b'a'..=b'z' | b'0'..=b'9'));
    bytes.len() <= max
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
}

macro_rules! serde_by_text {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

macro_rules! text_name {
    ($(#[$doc:meta])* $name:ident, $wanted:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = BadName;

            fn from_str(text: &str) -> Result<Self, BadName> {
                let check: fn(&str) -> bool = $check;
                if check(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(BadName::new(text, $wanted))
                }
            }
        }

        serde_by_text!($name);
    };
}

text_name!(
    /// The name of a server.
    ServerName,
    "a server name: a DNS label of at most 40 characters (a-z, 0-9, `-`; begins and ends with a letter or digit)",
    |text| is_label(text, 40)
);

text_name!(
    /// The name of one installation of Kiln; part of every subject.
    SiteName,
    "a site name: a DNS label of at most 32 characters (a-z, 0-9, `-`; begins and ends with a letter or digit)",
    |text| is_label(text, 32)
);

text_name!(
    /// The name of a machine with a Kiln node, as `[nodes]` in site.toml has it.
    NodeName,
    "a node name: a DNS label of at most 40 characters (a-z, 0-9, `-`; begins and ends with a letter or digit)",
    |text| is_label(text, 40)
);

impl NodeName {
    /// The node that a site always has, and where servers run that name none.
    pub fn local() -> Self {
        Self("local".to_owned())
    }
}

text_name!(
    /// Eight hexadecimal digits that mark everything a site makes on a machine.
    SiteId,
    "a site id: eight lower-case hexadecimal digits",
    |text| text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
);

text_name!(
    /// The caller's id of a mutating call; its answer is kept under it.
    RequestId,
    "a request id: 1 to 64 characters out of a-z, A-Z, 0-9, `-`, `_`, `.`",
    |text| (1..=64).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
);

fn number(text: &str) -> Option<u64> {
    // One text for each number: no sign, no leading zero.
    let canonical = text == "0" || !text.starts_with('0');
    (canonical && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// A build of a server: `web-b7`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BuildId {
    pub server: ServerName,
    pub number: u64,
}

/// One running copy of a release: `web-r12-0-a3` is release 12, ordinal 0, attempt 3. A throwaway instance of an
/// image's tests is release 0, and its attempt is the build's number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId {
    pub server: ServerName,
    pub release: u64,
    pub ordinal: u32,
    pub attempt: u64,
}

impl fmt::Display for BuildId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-b{}", self.server, self.number)
    }
}

impl FromStr for BuildId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let parse = || {
            let (server, number_text) = text.rsplit_once("-b")?;
            Some(Self { server: server.parse().ok()?, number: number(number_text)? })
        };
        parse().ok_or_else(|| BadName::new(text, "a build id such as `web-b7`"))
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-r{}-{}-a{}", self.server, self.release, self.ordinal, self.attempt)
    }
}

impl FromStr for InstanceId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let parse = || {
            let (rest, attempt) = text.rsplit_once("-a")?;
            let (rest, ordinal) = rest.rsplit_once('-')?;
            let (server, release) = rest.rsplit_once("-r")?;
            Some(Self {
                server: server.parse().ok()?,
                release: number(release)?,
                ordinal: u32::try_from(number(ordinal)?).ok()?,
                attempt: number(attempt)?,
            })
        };
        parse().ok_or_else(|| BadName::new(text, "an instance id such as `web-r12-0-a3`"))
    }
}

serde_by_text!(BuildId);
serde_by_text!(InstanceId);

/// Whether a secret can be called so: it names a file.
pub fn is_secret_name(text: &str) -> bool {
    let is_first = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.len() <= 64
        && text.starts_with(is_first)
        && text.chars().all(|c| is_first(c) || matches!(c, '-' | '_' | '.'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_server_name_is_a_dns_label() {
        for good in ["web", "a", "0", "web-2", &"a".repeat(40)] {
            assert!(good.parse::<ServerName>().is_ok(), "{good}");
        }
        for bad in ["", "-web", "web-", "Web", "web.example", "we b", "../web", "web*", ">", &"a".repeat(41)]
        {
            assert!(bad.parse::<ServerName>().is_err(), "{bad}");
        }
    }

    /// Lines of a log, of a configuration and of the broker's protocol are made from them.
    #[test]
    fn no_name_holds_a_line_end_or_a_wildcard() {
        fn refuses<T: FromStr>(good: &str) {
            assert!(good.parse::<T>().is_ok(), "{good}");
            for strange in ["\n", "\r", "\r\n", "\0", "\t", " ", "*", ">", "/", "..", "\u{85}", "\u{2028}"] {
                let mut bad = vec![format!("{strange}{good}"), format!("{good}{strange}")];
                bad.extend((1..good.len()).map(|at| format!("{}{strange}{}", &good[..at], &good[at..])));
                for bad in bad {
                    // A request id may have dots, and makes no path.
                    let is_dots = strange == ".." && bad.parse::<RequestId>().is_ok();
                    assert!(is_dots || bad.parse::<T>().is_err(), "{bad:?}");
                }
            }
        }
        refuses::<ServerName>("web");
        refuses::<SiteName>("home");
        refuses::<NodeName>("local");
        refuses::<SiteId>("0123abcd");
        refuses::<RequestId>("r-1");
        refuses::<BuildId>("web-b7");
        refuses::<InstanceId>("web-r12-0-a3");
    }

    fn servers() -> impl Strategy<Value = ServerName> {
        // Also names that look like the rest of an id.
        let nasty = "(a|web|[0-9])(-(r[0-9]|b[0-9]|a[0-9]|[0-9]|-)){0,6}-?[a-z0-9]";
        prop_oneof!["[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", nasty]
            .prop_map(|name| name.parse().expect("a server name"))
    }

    proptest! {
        #[test]
        fn an_instance_id_comes_back(
            server in servers(), release in any::<u64>(), ordinal in any::<u32>(), attempt in any::<u64>()
        ) {
            let id = InstanceId { server, release, ordinal, attempt };
            prop_assert_eq!(id.to_string().parse(), Ok(id.clone()));
            let document = serde_json::to_string(&id).expect("JSON");
            prop_assert_eq!(document, format!("\"{id}\""));
        }

        #[test]
        fn a_build_id_comes_back(server in servers(), number in any::<u64>()) {
            let id = BuildId { server, number };
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }

        /// Subjects, paths and nft rules are made from names: whatever is taken is what it looks like.
        #[test]
        fn what_is_taken_has_one_text(text in ".{0,12}|[a-z0-9ABZ._/*> -]{0,70}|[a-b0-2rb-]{0,16}") {
            if let Ok(id) = text.parse::<InstanceId>() {
                prop_assert_eq!(&id.to_string(), &text);
            }
            if let Ok(id) = text.parse::<BuildId>() {
                prop_assert_eq!(&id.to_string(), &text);
            }
            if let Ok(name) = text.parse::<ServerName>() {
                prop_assert_eq!(name.as_str(), &text);
                prop_assert!(text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')));
                prop_assert!((1..=40).contains(&text.len()) && !text.starts_with('-') && !text.ends_with('-'));
            }
            if let Ok(id) = text.parse::<RequestId>() {
                prop_assert_eq!(id.as_str(), &text);
                prop_assert!((1..=64).contains(&text.len()) && text.is_ascii());
            }
        }
    }

    #[test]
    fn ids_have_one_text_each() {
        for good in ["web-r12-0-a3", "a-r1-b-r2-1-a9"] {
            assert_eq!(good.parse::<InstanceId>().map(|id| id.to_string()), Ok(good.to_owned()));
        }
        for bad in ["web", "web-r01-0-a3", "web-r1-0-a", "web-r1--a1", "web-r1-+1-a1", "-r1-0-a1"] {
            assert!(bad.parse::<InstanceId>().is_err(), "{bad}");
        }
        assert_eq!("web-b7".parse::<BuildId>().map(|id| id.number), Ok(7));
        assert!("web-b07".parse::<BuildId>().is_err());
    }
}
