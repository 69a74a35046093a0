//! Messages of the protocol as JSON: fields by their names in `proto/`, enum values without their prefix, times in
//! RFC 3339, durations in seconds, every field present. So the JSON is as stable as the protocol.

use base64::Engine as _;
use kiln_api::FILE_DESCRIPTOR_SET;
use prost::Message;
use prost_reflect::{Cardinality, DescriptorPool, DynamicMessage, Kind, ReflectMessage as _, Value as Field};
use serde_json::{Map, Value};

use crate::failure::{Failure, Outcome};

/// `kind` is the message's full name: `kiln.deployer.v1.Fleet`.
pub(crate) fn of(kind: &str, message: &impl Message) -> Outcome<Value> {
    decode(kind, &message.encode_to_vec())
}

pub(crate) fn list<'a, M: Message + 'a>(
    kind: &str,
    messages: impl IntoIterator<Item = &'a M>,
) -> Outcome<Vec<Value>> {
    messages.into_iter().map(|message| of(kind, message)).collect()
}

/// As [`of`], from a message's bytes.
pub(crate) fn decode(kind: &str, bytes: &[u8]) -> Outcome<Value> {
    let problem = |why: String| Failure::failed(format!("reading a message {kind}"), why);
    let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).map_err(|error| problem(error.to_string()))?;
    let descriptor = pool.get_message_by_name(kind).ok_or_else(|| problem("no such message".to_owned()))?;
    let message = DynamicMessage::decode(descriptor, bytes).map_err(|error| problem(error.to_string()))?;
    Ok(message_value(&message))
}

fn message_value(message: &DynamicMessage) -> Value {
    match message.descriptor().full_name() {
        "google.protobuf.Timestamp" => {
            let (seconds, nanos) = parts(message);
            return jiff::Timestamp::new(seconds, nanos)
                .map_or(Value::Null, |time| Value::String(time.to_string()));
        }
        "google.protobuf.Duration" => {
            let (seconds, nanos) = parts(message);
            return serde_json::json!(seconds as f64 + f64::from(nanos) / 1e9);
        }
        _ => {}
    }
    let mut object = Map::new();
    for field in message.descriptor().fields() {
        if field.containing_oneof().is_some() && !message.has_field(&field) {
            // Of a choice only what was chosen is shown; an `optional` that is unset is null.
            if field.field_descriptor_proto().proto3_optional() {
                object.insert(field.name().to_owned(), Value::Null);
            }
            continue;
        }
        let absent = matches!(field.kind(), Kind::Message(_))
            && field.cardinality() != Cardinality::Repeated
            && !message.has_field(&field);
        let value = if absent { Value::Null } else { field_value(&message.get_field(&field), &field.kind()) };
        object.insert(field.name().to_owned(), value);
    }
    Value::Object(object)
}

fn parts(message: &DynamicMessage) -> (i64, i32) {
    let seconds = message.get_field_by_name("seconds").and_then(|value| value.as_i64()).unwrap_or_default();
    let nanos = message.get_field_by_name("nanos").and_then(|value| value.as_i32()).unwrap_or_default();
    (seconds, nanos)
}

fn field_value(value: &Field, kind: &Kind) -> Value {
    match value {
        Field::Bool(it) => Value::from(*it),
        Field::I32(it) => Value::from(*it),
        Field::I64(it) => Value::from(*it),
        Field::U32(it) => Value::from(*it),
        Field::U64(it) => Value::from(*it),
        Field::F32(it) => Value::from(*it),
        Field::F64(it) => Value::from(*it),
        Field::String(it) => Value::from(it.as_str()),
        Field::Bytes(it) => Value::from(base64::engine::general_purpose::STANDARD.encode(it)),
        Field::EnumNumber(number) => enum_word(kind, *number),
        Field::Message(it) => message_value(it),
        Field::List(items) => items.iter().map(|item| field_value(item, kind)).collect(),
        Field::Map(entries) => {
            let value_kind = match kind {
                Kind::Message(entry) if entry.is_map_entry() => entry.map_entry_value_field().kind(),
                other => other.clone(),
            };
            entries
                .iter()
                .map(|(key, item)| {
                    (key.as_str().unwrap_or_default().to_owned(), field_value(item, &value_kind))
                })
                .collect::<std::collections::BTreeMap<_, _>>()
                .into_iter()
                .collect::<Map<_, _>>()
                .into()
        }
    }
}

/// `BUILD_STATE_SUCCEEDED` of `BuildState` is `succeeded`.
fn enum_word(kind: &Kind, number: i32) -> Value {
    let Kind::Enum(descriptor) = kind else { return Value::from(number) };
    let Some(value) = descriptor.get_value(number) else { return Value::from(number) };
    let mut prefix = String::new();
    for letter in descriptor.name().chars() {
        if letter.is_ascii_uppercase() && !prefix.is_empty() {
            prefix.push('_');
        }
        prefix.push(letter.to_ascii_uppercase());
    }
    prefix.push('_');
    Value::from(value.name().strip_prefix(&prefix).unwrap_or(value.name()).to_lowercase())
}

#[cfg(test)]
mod tests {
    use kiln_api::{deployer, types};

    use super::*;

    #[test]
    fn messages_become_json_with_every_field_in_plain_words() {
        let rollout = deployer::Rollout {
            id: "web-r2".to_owned(),
            state: deployer::RolloutState::RolledBack.into(),
            started: Some(prost_types::Timestamp { seconds: 0, nanos: 500_000_000 }),
            last_checks: vec![types::CheckResult {
                took: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
                ..Default::default()
            }],
            ..Default::default()
        };
        let value = of("kiln.deployer.v1.Rollout", &rollout).unwrap();
        assert_eq!(value["state"], "rolled_back");
        assert_eq!(value["started"], "1970-01-01T00:00:00.5Z");
        assert_eq!(value["last_checks"][0]["took"], 1.5);
        assert_eq!(value["to_release"], 0);
        assert!(value["exit_code"].is_null() && value["cause"].is_null());
        assert_eq!(value.as_object().unwrap().len(), 17);
    }

    #[test]
    fn maps_keep_their_keys_and_a_choice_shows_what_was_chosen() {
        let run = types::RunSpec {
            env: [("SITE".to_owned(), "x".to_owned())].into(),
            rollout: Some(types::RolloutPolicy {
                strategy: Some(types::rollout_policy::Strategy::Rolling(types::RollingPolicy {
                    max_surge: 1,
                    max_unavailable: 0,
                })),
                ..Default::default()
            }),
            ..Default::default()
        };
        let value = of("kiln.types.v1.RunSpec", &run).unwrap();
        assert_eq!(value["env"], serde_json::json!({"SITE": "x"}));
        assert_eq!(value["rollout"]["rolling"]["max_surge"], 1);
        let check = types::Check { kind: Some(types::check::Kind::Tcp(types::TcpCheck { port: 80 })) };
        assert_eq!(of("kiln.types.v1.Check", &check).unwrap(), serde_json::json!({"tcp": {"port": 80}}));
    }
}
