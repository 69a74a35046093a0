//! The single values of a definition: texts with a syntax of their own, and numbers within bounds. None of them can
//! hold a wrong value.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::node::quoted;
use crate::name::ServerName;
use crate::time::Millis;

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
    "a Linux capability",
    "wanted its name in capitals without CAP_, such as NET_BIND_SERVICE",
    "^[A-Z_]+$",
    |text| whole(text, CAPABILITIES.contains(&text))
);

/// capabilities(7), as of Linux 5.9.
const CAPABILITIES: [&str; 41] = [
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// A number and its unit: `number("10s")` is 10 and `s`.
fn number_and_unit(text: &str) -> Option<(u64, &str)> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    Some((number.parse().ok()?, unit))
}

const TIME_UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// A time such as `10s`, from `MIN` to `MAX` milliseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Time<const MIN: u64, const MAX: u64>(pub(super) Millis);

/// A time as it is written: in the largest unit without a rest.
pub(super) fn time_text(time: Millis) -> String {
    let unit = TIME_UNITS.into_iter().find(|(_, millis)| time.0 > 0 && time.0.is_multiple_of(*millis));
    unit.map_or_else(|| "0s".to_owned(), |(unit, millis)| format!("{}{unit}", time.0 / millis))
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Time<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WithUnit<const MIN: u64, const MAX: u64>;

        impl<const MIN: u64, const MAX: u64> Visitor<'_> for WithUnit<MIN, MAX> {
            type Value = Time<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a time with its unit, such as 500ms, 10s, 5m or 1h")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Time<MIN, MAX>, E> {
                let millis = number_and_unit(text).and_then(|(number, unit)| {
                    let (_, millis) = TIME_UNITS.into_iter().find(|(name, _)| *name == unit)?;
                    number.checked_mul(millis)
                });
                match millis {
                    Some(millis) if (MIN..=MAX).contains(&millis) => Ok(Time(Millis(millis))),
                    Some(_) => {
                        let (min, max) = (time_text(Millis(MIN)), time_text(Millis(MAX)));
                        Err(E::custom(format!("{} is out of bounds\nwanted {min} to {max}", quoted(text))))
                    }
                    None => Err(E::custom(format!(
                        "{} is not a time\nwanted a whole number and a unit, such as 500ms, 10s, 5m or 1h",
                        quoted(text)
                    ))),
                }
            }
        }

        deserializer.deserialize_str(WithUnit)
    }
}

impl<const MIN: u64, const MAX: u64> Serialize for Time<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&time_text(self.0))
    }
}

impl<const MIN: u64, const MAX: u64> JsonSchema for Time<MIN, MAX> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Time".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[0-9]+(ms|s|m|h|d)$" })
    }
}

/// An amount of memory: `256Mi`, or a number of bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory(pub(super) u64);

const MIN_MEMORY: u64 = 4 << 20;
const MAX_MEMORY: u64 = 1 << 50;

impl Memory {
    fn checked<E: Error>(bytes: Option<u64>, given: &str) -> Result<Self, E> {
        match bytes {
            Some(bytes @ MIN_MEMORY..=MAX_MEMORY) => Ok(Self(bytes)),
            Some(_) => Err(E::custom(format!("{given} is out of bounds\nwanted 4Mi to 1024Ti"))),
            None => Err(E::custom(format!(
                "{given} is not an amount of memory\nwanted a whole number and a unit, such as 256Mi or 2Gi"
            ))),
        }
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Amount;

        impl Visitor<'_> for Amount {
            type Value = Memory;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an amount of memory such as 256Mi")
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<Memory, E> {
                Memory::checked(Some(bytes), &format!("`{bytes}`"))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Memory, E> {
                const UNITS: [(&str, u64); 8] = [
                    ("Ki", 1 << 10),
                    ("Mi", 1 << 20),
                    ("Gi", 1 << 30),
                    ("Ti", 1 << 40),
                    ("k", 1000),
                    ("M", 1_000_000),
                    ("G", 1_000_000_000),
                    ("T", 1_000_000_000_000),
                ];
                let bytes = number_and_unit(text).and_then(|(number, unit)| {
                    let (_, bytes) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
                    number.checked_mul(bytes)
                });
                Memory::checked(bytes, &quoted(text))
            }
        }

        deserializer.deserialize_any(Amount)
    }
}

impl Serialize for Memory {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl JsonSchema for Memory {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Memory".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "string", "pattern": "^[0-9]+(Ki|Mi|Gi|Ti|k|M|G|T)$" },
                { "type": "integer", "minimum": MIN_MEMORY },
            ]
        })
    }
}

/// A share of the machine's processors in thousandths: `0.5` is 500.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cpus(pub(super) u32);

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Share;

        impl Visitor<'_> for Share {
            type Value = Cpus;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of CPUs such as 0.5")
            }

            fn visit_f64<E: Error>(self, cpus: f64) -> Result<Cpus, E> {
                // Neither NaN nor infinity is in the range.
                if (0.01..=1024.0).contains(&cpus) {
                    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                    return Ok(Cpus((cpus * 1000.0).round() as u32));
                }
                Err(E::custom(format!(
                    "`{cpus}` is out of bounds\nwanted a number of CPUs from 0.01 to 1024"
                )))
            }

            fn visit_u64<E: Error>(self, cpus: u64) -> Result<Cpus, E> {
                // More than 2^32 is out of bounds whatever it is.
                self.visit_f64(u32::try_from(cpus).unwrap_or(u32::MAX).into())
            }

            fn visit_i64<E: Error>(self, cpus: i64) -> Result<Cpus, E> {
                Err(E::custom(format!(
                    "`{cpus}` is out of bounds\nwanted a number of CPUs from 0.01 to 1024"
                )))
            }
        }

        deserializer.deserialize_any(Share)
    }
}

impl Serialize for Cpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.0) / 1000.0)
    }
}

impl JsonSchema for Cpus {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Cpus".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "number", "minimum": 0.01, "maximum": 1024 })
    }
}

/// A whole number from `MIN` to `MAX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Whole<const MIN: u32, const MAX: u32>(pub(super) u32);

pub(super) type Port = Whole<1, 65_535>;

impl Port {
    pub(super) fn number(self) -> u16 {
        u16::try_from(self.0).unwrap_or(u16::MAX)
    }
}

impl<'de, const MIN: u32, const MAX: u32> Deserialize<'de> for Whole<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number<const MIN: u32, const MAX: u32>;

        impl<const MIN: u32, const MAX: u32> Visitor<'_> for Number<MIN, MAX> {
            type Value = Whole<MIN, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from {MIN} to {MAX}")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                self.visit_i128(number.into())
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
                self.visit_i128(number.into())
            }

            fn visit_i128<E: Error>(self, number: i128) -> Result<Self::Value, E> {
                match u32::try_from(number) {
                    Ok(value) if (MIN..=MAX).contains(&value) => Ok(Whole(value)),
                    _ => Err(E::custom(format!(
                        "`{number}` is out of bounds\nwanted a whole number from {MIN} to {MAX}"
                    ))),
                }
            }
        }

        deserializer.deserialize_any(Number)
    }
}

impl<const MIN: u32, const MAX: u32> Serialize for Whole<MIN, MAX> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<const MIN: u32, const MAX: u32> JsonSchema for Whole<MIN, MAX> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Whole".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": MIN, "maximum": MAX })
    }
}
