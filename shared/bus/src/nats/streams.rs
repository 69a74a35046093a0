//! The settings of the streams, and whether the broker has them so.

use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use kiln_model::name::SiteName;
use serde::Serialize;

use super::NatsBus;
use crate::Error;
use crate::subjects::Stream;

const MIB: i64 = 1 << 20;
const DAY: Duration = Duration::from_secs(24 * 3600);
/// A relay that died after a publish and before its mark publishes again when it is back; later ones are told apart by
/// `ce-id` and the watermarks.
const DUPLICATES: Duration = Duration::from_secs(600);

fn wanted(stream: Stream, site: &SiteName, replicas: usize) -> Config {
    let (max_bytes, max_age, largest) = match stream {
        // As long as the outbox keeps them.
        Stream::Events => (256 * MIB, 7 * DAY, MIB),
        Stream::Reports => (32 * MIB, DAY, MIB),
        // What it buries, and why.
        Stream::DeadLetters => (32 * MIB, 30 * DAY, 2 * MIB),
    };
    Config {
        name: stream.name(site),
        subjects: vec![stream.subjects(site)],
        retention: RetentionPolicy::Limits,
        storage: StorageType::File,
        discard: DiscardPolicy::Old,
        max_bytes,
        max_age,
        max_messages: -1,
        max_messages_per_subject: -1,
        max_consumers: -1,
        max_message_size: i32::try_from(largest).unwrap_or(i32::MAX),
        duplicate_window: DUPLICATES,
        deny_delete: true,
        deny_purge: true,
        num_replicas: replicas,
        ..Config::default()
    }
}

/// A broker drops settings that it does not know, so what it says it has is compared. Names those that differ, of all
/// that were asked for.
pub(super) fn compare<C: Serialize>(wanted: &C, found: &C) -> Result<(), String> {
    let settings = |config: &C| serde_json::to_value(config).map_err(|error| error.to_string());
    let (wanted, found) = (settings(wanted)?, settings(found)?);
    let wanted = wanted.as_object().into_iter().flatten();
    let names: Vec<_> =
        wanted.filter(|(name, value)| found.get(name) != Some(value)).map(|it| it.0.as_str()).collect();
    if names.is_empty() { Ok(()) } else { Err(names.join(", ")) }
}

fn judge(bus: &NatsBus, wanted: &Config, found: &Config) -> Result<(), Error> {
    compare(wanted, found).map_err(|names| Error::Unsuitable {
        place: bus.inner.url.clone(),
        reason: format!(
            "stream {} has other settings than asked for: {names}; `kiln up` brings them back",
            wanted.name
        ),
    })
}

pub(super) async fn ensure(bus: &NatsBus, stream: Stream) -> Result<(), Error> {
    let wanted = wanted(stream, &bus.inner.site, bus.inner.replicas);
    let made = bus.inner.context.create_or_update_stream(wanted.clone()).await;
    let info = made.map_err(|error| bus.unavailable("make a stream", &error))?;
    bus.check_version()?;
    judge(bus, &wanted, &info.config)
}

/// The stream as it is, which must be as wanted.
pub(super) async fn bind(
    bus: &NatsBus,
    stream: Stream,
) -> Result<async_nats::jetstream::stream::Stream, Error> {
    let wanted = wanted(stream, &bus.inner.site, bus.inner.replicas);
    let found = bus.inner.context.get_stream(&wanted.name).await;
    let found = found.map_err(|error| bus.unavailable("bind to a stream", &error))?;
    judge(bus, &wanted, &found.cached_info().config)?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_that_the_broker_dropped_is_named() {
        let wanted = wanted(Stream::Events, &"home".parse().unwrap(), 3);
        assert_eq!(compare(&wanted, &wanted), Ok(()));
        let serde_json::Value::Object(settings) = serde_json::to_value(&wanted).unwrap() else { panic!() };
        assert!(settings.len() > 12, "{settings:?}");
        for name in settings.keys() {
            let mut found = settings.clone();
            found.remove(name);
            assert_eq!(compare(&settings, &found), Err(name.clone()));
        }
        let found = Config { deny_purge: false, num_replicas: 1, ..wanted.clone() };
        assert_eq!(compare(&wanted, &found), Err("deny_purge, num_replicas".to_owned()));
    }
}
