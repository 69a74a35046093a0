//! Texts of a definition that have a syntax of their own, and can't hold anything else.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ImagePlace;
use super::node::quoted;
use crate::digest::Digest;
use crate::name::{NodeName, ServerName, is_secret_name};
use crate::run::GRANTABLE;

/// What a text must look like.
pub(super) trait Syntax {
    type Value;
    /// After "is not": `a Debian package name`.
    const WHAT: &'static str;
    /// What would be right.
    const HELP: &'static str;
    /// The same for editors, as a regular expression.
    const PATTERN: &'static str;

    fn parse(text: &str) -> Option<Self::Value>;
}

/// A text that follows its syntax.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Text<S: Syntax>(pub(super) S::Value);

impl<'de, S: Syntax> Deserialize<'de> for Text<S> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Checked<S>(PhantomData<S>);

        impl<S: Syntax> Visitor<'_> for Checked<S> {
            type Value = Text<S>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text")
            }

            // Here, where the node is still known that the error is about.
            fn visit_str<E: Error>(self, text: &str) -> Result<Text<S>, E> {
                let wrong = || E::custom(format!("{} is not {}\n{}", quoted(text), S::WHAT, S::HELP));
                S::parse(text).map(Text).ok_or_else(wrong)
            }
        }

        deserializer.deserialize_str(Checked(PhantomData))
    }
}

impl<S: Syntax<Value: fmt::Display>> Serialize for Text<S> {
    fn serialize<Z: Serializer>(&self, serializer: Z) -> Result<Z::Ok, Z::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<S: Syntax> JsonSchema for Text<S> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        S::WHAT.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": S::PATTERN })
    }
}

macro_rules! syntax {
    ($name:ident, $what:literal, $help:literal, $pattern:literal, $parse:expr) => {
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) struct $name;

        impl Syntax for $name {
            type Value = String;
            const WHAT: &'static str = $what;
            const HELP: &'static str = $help;
            const PATTERN: &'static str = $pattern;

            fn parse(text: &str) -> Option<String> {
                let parse: fn(&str) -> Option<String> = $parse;
                parse(text)
            }
        }
    };
}

fn whole(text: &str, good: bool) -> Option<String> {
    good.then(|| text.to_owned())
}

fn only(text: &str, also: &[u8]) -> bool {
    text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || also.contains(&b))
}

fn begins_with_digit(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_digit())
}

fn begins_with_letter_or_digit(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name;

impl Syntax for Name {
    type Value = ServerName;
    const WHAT: &'static str = "a server name";
    const HELP: &'static str =
        "wanted at most 40 characters out of a-z, 0-9 and `-`, beginning and ending with a letter or digit";
    const PATTERN: &'static str = "^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$";

    fn parse(text: &str) -> Option<ServerName> {
        text.parse().ok()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Machine;

impl Syntax for Machine {
    type Value = NodeName;
    const WHAT: &'static str = "a node name";
    const HELP: &'static str = Name::HELP;
    const PATTERN: &'static str = Name::PATTERN;

    fn parse(text: &str) -> Option<NodeName> {
        text.parse().ok()
    }
}

syntax!(
    SuiteName,
    "the name of a Debian suite",
    "wanted one such as bookworm",
    "^[a-z0-9][a-z0-9.+-]*(/[a-z0-9.+-]+)*$",
    |text| {
        let parts = text.split('/').all(|part| !part.is_empty() && part != ".." && part != ".");
        whole(text, parts && text.len() <= 80 && begins_with_letter_or_digit(text) && only(text, b"./+-"))
    }
);

syntax!(
    ComponentName,
    "the name of an archive's component",
    "wanted one such as main",
    "^[a-z0-9][a-z0-9/-]*$",
    |text| whole(text, text.len() <= 80 && begins_with_letter_or_digit(text) && only(text, b"/-"))
);

syntax!(
    ArchiveUrl,
    "the address of a package archive",
    "wanted one that begins with http:// or https://, without a user name or spaces",
    "^https?://[^\\s@\"'<>\\\\]+$",
    |text| {
        let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
        let good = rest.is_some_and(|rest| {
            rest.starts_with(|first: char| first.is_ascii_alphanumeric() || first == '[')
                && rest
                    .bytes()
                    .all(|b| b.is_ascii_graphic() && !matches!(b, b'@' | b'"' | b'\'' | b'<' | b'>' | b'\\'))
        });
        whole(text, good && text.len() <= 2000)
    }
);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RootPlace;

/// A file of the definition's folder, or an address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FileOrUrl {
    File(String),
    Url(String),
}

impl Syntax for RootPlace {
    type Value = FileOrUrl;
    const WHAT: &'static str = "a root file system's archive";
    const HELP: &'static str = "wanted a file in the definition's folder, such as rootfs.tar.xz, or an address that begins with http:// or https://";
    const PATTERN: &'static str = "^[^/].*$";

    fn parse(text: &str) -> Option<FileOrUrl> {
        match ArchiveUrl::parse(text) {
            Some(url) => Some(FileOrUrl::Url(url)),
            None if text.contains("://") => None,
            None => InnerPath::parse(text).map(FileOrUrl::File),
        }
    }
}

syntax!(
    SecretName,
    "the name of a secret",
    "wanted at most 64 characters out of a-z, 0-9, `-`, `_` and `.`, beginning with a letter or digit, such as pip-token",
    "^[a-z0-9][a-z0-9._-]{0,63}$",
    |text| whole(text, is_secret_name(text))
);

syntax!(
    StageName,
    "the name of a Containerfile's stage",
    "wanted what stands behind AS, out of letters, digits, `-`, `_` and `.`, or the stage's number",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
    |text| {
        let good = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        whole(
            text,
            good && text.len() <= 128 && text.starts_with(|first: char| first.is_ascii_alphanumeric()),
        )
    }
);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PlaceOfImage;

impl Syntax for PlaceOfImage {
    type Value = ImagePlace;
    const WHAT: &'static str = "the place of an image";
    const HELP: &'static str = "wanted one with its registry, such as registry.example/app:1.2, or an OCI layout in the definition's folder, such as oci:folder:tag";
    const PATTERN: &'static str = "^(oci:[^/\\s][^\\s]*|[^/\\s@]+/[^\\s]+)$";

    fn parse(text: &str) -> Option<ImagePlace> {
        text.parse().ok()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Sha256;

impl Syntax for Sha256 {
    type Value = Digest;
    const WHAT: &'static str = "a SHA-256 hash";
    const HELP: &'static str = "wanted 64 digits out of 0-9 and a-f, as sha256sum gives them";
    const PATTERN: &'static str = "^[0-9a-f]{64}$";

    fn parse(text: &str) -> Option<Digest> {
        format!("sha256:{text}").parse().ok()
    }
}

syntax!(
    PackageName,
    "the name of a Debian package",
    "wanted at least two characters out of a-z, 0-9, `+`, `-` and `.`, beginning with a letter or digit",
    "^[a-z0-9][a-z0-9+.-]+$",
    |text| whole(
        text,
        (2..=200).contains(&text.len()) && begins_with_letter_or_digit(text) && only(text, b"+-.")
    )
);

syntax!(
    PackageVersion,
    "a package's version, or what it begins with",
    "wanted characters out of letters, digits, `.`, `+`, `-`, `~` and `:`, beginning with a digit, such as 1.22",
    "^[0-9][A-Za-z0-9.+~:-]*$",
    |text| {
        let good = begins_with_digit(text)
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".+-~:".contains(&b));
        whole(text, good && text.len() <= 200)
    }
);

syntax!(
    UserName,
    "the name of a user or a group",
    "wanted one such as www-data, out of a-z, 0-9, `_` and `-`, beginning with a letter or `_`",
    "^[a-z_][a-z0-9_-]*$",
    |text| whole(text, is_user(text) && !begins_with_digit(text))
);

syntax!(
    ProgramName,
    "the name of a program",
    "wanted one without its folder, such as nginx",
    "^[!-.0-~]+$",
    |text| {
        let good = (1..=255).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        whole(text, good)
    }
);

syntax!(
    VariableName,
    "the name of a variable",
    "wanted one out of letters, digits and `_`, beginning with a letter or `_`, such as worker_count",
    "^[A-Za-z_][A-Za-z0-9_]*$",
    |text| {
        let good = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        whole(text, good && (1..=200).contains(&text.len()) && !begins_with_digit(text))
    }
);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Address;

impl Syntax for Address {
    type Value = IpAddr;
    const WHAT: &'static str = "an address";
    const HELP: &'static str = "wanted one such as 127.0.0.1, 0.0.0.0 or \"::\"";
    const PATTERN: &'static str = "^[0-9a-fA-F.:]+$";

    fn parse(text: &str) -> Option<IpAddr> {
        text.parse().ok()
    }
}

syntax!(
    InnerPath,
    "a path inside the definition's folder",
    "wanted one that is relative to the folder of server.yaml and never leaves it, such as site/index.html",
    "^[^/].*$",
    |text| {
        let inside = !text.is_empty() && !text.starts_with('/') && text.split('/').all(|part| part != "..");
        let parts: Vec<_> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        let path = if parts.is_empty() { ".".to_owned() } else { parts.join("/") };
        (inside && is_path(text)).then_some(path)
    }
);

syntax!(
    AbsolutePath,
    "a path in the image",
    "wanted one that begins with `/`, without `.`, `..` or `//`, such as /var/www/html",
    "^/.*$",
    |text| {
        let inner = text.strip_prefix('/')?;
        let inner = inner.strip_suffix('/').unwrap_or(inner);
        let good = inner.is_empty() || inner.split('/').all(|part| !matches!(part, "" | "." | ".."));
        (good && is_path(text)).then(|| format!("/{inner}"))
    }
);

/// Within the kernel's limits, and harmless in a log or a mount option.
fn is_path(text: &str) -> bool {
    text.len() < 4096 && text.split('/').all(|part| part.len() <= 255) && !text.contains(char::is_control)
}

syntax!(FileMode, "a file mode", "wanted octal digits in quotes, such as \"0644\"", "^[0-7]{3,4}$", |text| {
    whole(text, matches!(text.len(), 3 | 4) && text.bytes().all(|b| matches!(b, b'0'..=b'7')))
});

fn is_user(text: &str) -> bool {
    let number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if number {
        // Within the 65,536 ids that a server has.
        return text.parse::<u16>().is_ok();
    }
    text.len() <= 32
        && text.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
        && only(text, b"_-")
}

syntax!(
    Owner,
    "a user and a group",
    "wanted both as names or numbers with a colon between them, such as root:root",
    "^[a-z0-9_][a-z0-9_-]*:[a-z0-9_][a-z0-9_-]*$",
    |text| whole(text, text.split_once(':').is_some_and(|(user, group)| is_user(user) && is_user(group)))
);

syntax!(
    User,
    "a user",
    "wanted a name or number, such as root, www-data or \"1000\", with a group after a colon if it is not the user's own",
    "^[a-z0-9_][a-z0-9_-]*(:[a-z0-9_][a-z0-9_-]*)?$",
    |text| {
        let good = match text.split_once(':') {
            Some((user, group)) => is_user(user) && is_user(group),
            None => is_user(text),
        };
        whole(text, good)
    }
);

syntax!(
    EnvName,
    "the name of an environment variable",
    "wanted letters, digits and `_`, not beginning with a digit",
    "^[A-Za-z_][A-Za-z0-9_]*$",
    |text| {
        let good = text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        whole(text, good && text.len() <= 255)
    }
);

syntax!(Script, "a command", "wanted at least one word for /bin/sh", "\\S", |text| whole(
    text,
    !text.trim().is_empty()
));

syntax!(
    Wanted,
    "a text that could be found or missed",
    "wanted at least one character",
    "[\\s\\S]",
    |text| whole(text, !text.is_empty())
);

syntax!(
    UrlPath,
    "the path of a request",
    "wanted one that begins with `/` and holds no spaces, such as /health",
    "^/[!-~]*$",
    |text| whole(
        text,
        text.starts_with('/') && text.len() <= 2000 && text.bytes().all(|b| b.is_ascii_graphic())
    )
);

syntax!(
    Capability,
    "a capability that is granted to instances",
    "wanted one such as NET_BIND_SERVICE, in capitals and without CAP_; never one that leads out of the instance",
    "^[A-Z_]+$",
    |text| whole(text, GRANTABLE.contains(&text))
);
