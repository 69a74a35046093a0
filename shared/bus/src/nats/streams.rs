//! The settings of the streams, and whether the broker has them so.

use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use kiln_model::name::SiteName;

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

/// A broker drops settings that it does not know, so what it says it has is compared.
fn compare(wanted: &Config, found: &Config) -> Result<(), String> {
    let differs = [
        ("subjects", wanted.subjects != found.subjects),
        ("retention", wanted.retention != found.retention),
        ("storage", wanted.storage != found.storage),
        ("discard", wanted.discard != found.discard),
        ("max_bytes", wanted.max_bytes != found.max_bytes),
        ("max_age", wanted.max_age != found.max_age),
        ("max_msg_size", wanted.max_message_size != found.max_message_size),
        ("duplicate_window", wanted.duplicate_window != found.duplicate_window),
        ("num_replicas", wanted.num_replicas != found.num_replicas),
        ("deny_delete", wanted.deny_delete != found.deny_delete),
        ("deny_purge", wanted.deny_purge != found.deny_purge),
    ];
    let names: Vec<_> = differs.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect();
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
    fn a_setting_that_the_broker_dropped_is_named() {
        let wanted = wanted(Stream::Events, &"home".parse().unwrap(), 3);
        let found = Config { deny_purge: false, max_age: Duration::ZERO, ..wanted.clone() };
        assert_eq!(compare(&wanted, &wanted), Ok(()));
        assert_eq!(compare(&wanted, &found), Err("max_age, deny_purge".to_owned()));
    }
}
