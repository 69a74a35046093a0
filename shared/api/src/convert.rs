//! Between messages and the model. What comes in over the wire is not trusted: an unknown enum value, a missing message
//! or a text that is not the name it should be is an error that names the field.

mod cause;
mod check;
mod list;
mod revision;
mod run;
mod signal;

use std::fmt::Display;
use std::str::FromStr;

use jiff::Timestamp;
use kiln_model::time::{Age, Millis, Now};

pub use list::ListRequest;

/// A message that has no place in the model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct Invalid {
    /// Path inside the message: `run.health.check`.
    pub field: String,
    pub reason: String,
}

impl Invalid {
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// The same, seen from the message that has the wrong one in `field`.
    #[must_use]
    pub fn within(self, field: &str) -> Self {
        Self { field: format!("{field}.{}", self.field), reason: self.reason }
    }
}

/// Converts a nested message that must be there.
///
/// # Errors
/// [`Invalid`] where it is missing or wrong.
pub fn required<P, M: TryFrom<P, Error = Invalid>>(field: &str, message: Option<P>) -> Result<M, Invalid> {
    optional(field, message)?.ok_or_else(|| Invalid::new(field, "is missing"))
}

/// Converts a nested message that may be left out.
///
/// # Errors
/// [`Invalid`] where it is there and wrong.
pub fn optional<P, M: TryFrom<P, Error = Invalid>>(
    field: &str,
    message: Option<P>,
) -> Result<Option<M>, Invalid> {
    message.map(|message| M::try_from(message).map_err(|invalid| invalid.within(field))).transpose()
}

/// Reads a name, id or digest.
///
/// # Errors
/// [`Invalid`] where the text is not one.
pub fn text<T: FromStr<Err: Display>>(field: &str, text: &str) -> Result<T, Invalid> {
    text.parse().map_err(|error: T::Err| Invalid::new(field, error.to_string()))
}

/// Reads a name, id or digest; empty for none.
///
/// # Errors
/// [`Invalid`] where the text is neither empty nor one.
pub fn optional_text<T: FromStr<Err: Display>>(field: &str, given: &str) -> Result<Option<T>, Invalid> {
    if given.is_empty() { Ok(None) } else { text(field, given).map(Some) }
}

/// Reads an enum's number, first as one of the protocol's values, then as one of the model's.
///
/// # Errors
/// [`Invalid`] for a number that this program does not know, and for `UNSPECIFIED`.
pub fn enumeration<P, M>(field: &str, number: i32) -> Result<M, Invalid>
where
    P: TryFrom<i32>,
    M: TryFrom<P, Error = Invalid>,
{
    let value = P::try_from(number).map_err(|_| {
        Invalid::new(field, format!("has the value {number}, which this version does not know"))
    })?;
    M::try_from(value).map_err(|invalid| Invalid::new(field, invalid.reason))
}

pub fn to_timestamp(time: Timestamp) -> prost_types::Timestamp {
    // The protocol counts nanoseconds forward from the second, jiff away from the epoch.
    let nanos = time.as_nanosecond();
    let seconds = i64::try_from(nanos.div_euclid(1_000_000_000)).unwrap_or_default();
    let rest = i32::try_from(nanos.rem_euclid(1_000_000_000)).unwrap_or_default();
    prost_types::Timestamp { seconds, nanos: rest }
}

/// # Errors
/// [`Invalid`] where it is missing, or outside the years that exist.
pub fn from_timestamp(field: &str, time: Option<prost_types::Timestamp>) -> Result<Timestamp, Invalid> {
    let time = time.ok_or_else(|| Invalid::new(field, "is missing"))?;
    if !(0..1_000_000_000).contains(&time.nanos) {
        return Err(Invalid::new(field, format!("has {} nanoseconds, wanted 0 to 999999999", time.nanos)));
    }
    Timestamp::new(time.seconds, time.nanos).map_err(|error| Invalid::new(field, error.to_string()))
}

/// # Errors
/// [`Invalid`] where it is there, and outside the years that exist.
pub fn from_optional_timestamp(
    field: &str,
    time: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, Invalid> {
    time.map(|time| from_timestamp(field, Some(time))).transpose()
}

/// How old something is that another process saw at `time`: what that says of it by a clock that nobody sets, or longer ago by
/// the wall clocks, where it was long on its way.
///
/// # Errors
/// It is told to be of less than no age.
pub fn to_age(
    field: &str,
    told: Option<prost_types::Duration>,
    time: Timestamp,
    now: Now,
) -> Result<Age, Invalid> {
    let seen = Age::since(time, now);
    let Some(told) = told else { return Ok(seen) };
    let told = from_duration(field, Some(told))?.as_duration();
    Ok(Age::new(if seen.is_unknown() { told } else { told.max(seen.at(now)) }, now))
}

pub fn to_duration(duration: Millis) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.0 / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.0 % 1000).unwrap_or_default() * 1_000_000,
    }
}

/// What is finer than a millisecond is dropped.
///
/// # Errors
/// [`Invalid`] where it is missing or negative.
pub fn from_duration(field: &str, duration: Option<prost_types::Duration>) -> Result<Millis, Invalid> {
    let duration = duration.ok_or_else(|| Invalid::new(field, "is missing"))?;
    let wrong = || Invalid::new(field, "is negative or too long");
    let seconds = u64::try_from(duration.seconds).map_err(|_| wrong())?;
    let millis = u64::try_from(duration.nanos).map_err(|_| wrong())? / 1_000_000;
    seconds.checked_mul(1000).and_then(|ms| ms.checked_add(millis)).map(Millis).ok_or_else(wrong)
}

fn port(field: &str, number: u32) -> Result<u16, Invalid> {
    match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Invalid::new(field, format!("is {number}, wanted a port from 1 to 65535"))),
    }
}

/// The protocol writes "none" as the empty text.
fn non_empty(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests;
