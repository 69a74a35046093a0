//! Numbers of a definition, within bounds and with their units.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::node::quoted;
use crate::time::Millis;

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
