//! An event on the wire: CloudEvents in binary mode, attributes in headers with the prefix `ce-`, the protobuf payload
//! as it is.

use async_nats::HeaderMap;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use kiln_model::name::SiteName;

use crate::Error;

pub(crate) const ID: &str = "ce-id";
pub(crate) const TRACEPARENT: &str = "traceparent";
/// JetStream stores a message once for each value, within its window.
pub(crate) const MESSAGE_ID: &str = "Nats-Msg-Id";
const CONTENT_TYPE: &str = "application/protobuf";

/// The message of `kiln.events.v1` that the payload of an event is.
pub fn schema(kind: &EventType) -> Option<&'static str> {
    Some(match (kind.service, kind.entity.as_str()) {
        (Service::Builder | Service::Deployer | Service::Monitor, "audit") => "kiln.events.v1.AuditSealed",
        (Service::Builder, "definition") => "kiln.events.v1.DefinitionChanged",
        (Service::Builder, "build") => "kiln.events.v1.BuildChanged",
        (Service::Builder, "plan") => "kiln.events.v1.PlanUnchanged",
        (Service::Builder, "revision") => "kiln.events.v1.RevisionCreated",
        (Service::Deployer, "release") => "kiln.events.v1.ReleaseCreated",
        (Service::Deployer, "rollout") => "kiln.events.v1.RolloutChanged",
        (Service::Deployer, "instance") => "kiln.events.v1.InstanceChanged",
        (Service::Monitor, "instance") => "kiln.events.v1.HealthChanged",
        (Service::Monitor, "server") => "kiln.events.v1.NeedsUpdate",
        _ => return None,
    })
}

/// The broker takes a MiB, headers included.
const MAX_PAYLOAD: usize = 960 << 10;

/// An event that no broker will ever take is refused before it is sent.
pub(crate) fn check_size(subject: &str, event: &Event) -> Result<(), Error> {
    let size = event.event.payload.len();
    if size <= MAX_PAYLOAD {
        return Ok(());
    }
    let reason = format!("its payload has {size} bytes, at most {MAX_PAYLOAD} can be carried");
    Err(Error::Undecodable { subject: subject.to_owned(), reason })
}

/// The headers of an event of a site.
pub fn headers(site: &SiteName, event: &Event) -> HeaderMap {
    let Event { id, sequence, epoch, event } = event;
    let mut headers = HeaderMap::new();
    let id = id.to_string();
    headers.insert("ce-specversion", "1.0");
    headers.insert(ID, id.as_str());
    headers.insert("ce-source", format!("kiln/{site}/{}", event.kind.service));
    headers.insert("ce-type", event.kind.ce_type());
    headers.insert("ce-time", event.time.to_string());
    headers.insert("ce-subject", format!("{}/{}", event.aggregate_kind, event.aggregate_id));
    headers.insert("ce-datacontenttype", CONTENT_TYPE);
    if let Some(schema) = schema(&event.kind) {
        headers.insert("ce-dataschema", schema);
    }
    headers.insert("ce-epoch", epoch.as_str());
    headers.insert("ce-sequence", sequence.to_string());
    // Of the aggregate in `ce-subject`, after the change.
    headers.insert("ce-version", event.aggregate_version.to_string());
    headers.insert("content-type", CONTENT_TYPE);
    headers.insert(MESSAGE_ID, id.as_str());
    if is_traceparent(&event.traceparent) {
        headers.insert(TRACEPARENT, event.traceparent.as_str());
    }
    headers
}

/// Whether it is `00-<trace>-<span>-<flags>`, of hexadecimal digits. It came with what another service said: one with a line
/// end is no header, and one that is too long would have the broker refuse its event for good.
fn is_traceparent(text: &str) -> bool {
    text.len() == 55 && text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit())
}

/// Reads an event of any site from the wire.
///
/// The broker lets a service publish on its own subjects only, and knows nothing of headers: what they say counts only where
/// the subject says the same.
///
/// # Errors
/// [`Error::Undecodable`] where a header is missing or wrong, or says other than the subject. The payload is not looked into.
pub fn decode(subject: &str, headers: &HeaderMap, payload: &[u8]) -> Result<Event, Error> {
    let wrong = |reason: String| Error::Undecodable { subject: subject.chars().take(200).collect(), reason };
    let get = |name: &str| {
        headers
            .get(name)
            .map(|value| value.as_str())
            .ok_or_else(|| wrong(format!("it has no header `{name}`")))
    };
    let bad = |name: &str| wrong(format!("its header `{name}` is malformed"));
    let number = |name: &str| get(name)?.parse::<u64>().map_err(|_| bad(name));
    if get("ce-specversion")? != "1.0" {
        return Err(bad("ce-specversion"));
    }
    let kind = parse_type(get("ce-type")?).ok_or_else(|| bad("ce-type"))?;
    let (aggregate_kind, aggregate_id) =
        get("ce-subject")?.split_once('/').ok_or_else(|| bad("ce-subject"))?;
    let server = match subject.rsplit('.').next() {
        None | Some("_") => None,
        Some(server) => {
            Some(server.parse().map_err(|_| wrong("its subject ends in no server name".to_owned()))?)
        }
    };
    let site: SiteName = get("ce-source")?
        .strip_prefix("kiln/")
        .and_then(|source| source.strip_suffix(kind.service.as_str())?.strip_suffix('/'))
        .and_then(|site| site.parse().ok())
        .ok_or_else(|| bad("ce-source"))?;
    if kind.subject(&site, server.as_ref()) != subject {
        return Err(wrong(format!("its headers say {} of site {site}", kind.ce_type())));
    }
    Ok(Event {
        id: get(ID)?.parse().map_err(|_| bad(ID))?,
        sequence: number("ce-sequence")?,
        epoch: get("ce-epoch")?.to_owned(),
        event: NewEvent {
            server,
            aggregate_kind: aggregate_kind.to_owned(),
            aggregate_id: aggregate_id.to_owned(),
            aggregate_version: number("ce-version")?,
            payload: payload.to_vec(),
            time: get("ce-time")?.parse().map_err(|_| bad("ce-time"))?,
            traceparent: traceparent(headers),
            kind,
        },
    })
}

/// The trace context of a message; empty where it has none.
pub(crate) fn traceparent(headers: &HeaderMap) -> String {
    headers.get(TRACEPARENT).map(|value| value.as_str().to_owned()).unwrap_or_default()
}

/// `kiln.<service>.<entity>.<verb>.v1`
fn parse_type(text: &str) -> Option<EventType> {
    let mut parts = text.strip_prefix("kiln.")?.strip_suffix(".v1")?.split('.');
    let (service, entity, verb) = (parts.next()?, parts.next()?, parts.next()?);
    let service = Service::ALL.into_iter().find(|known| known.as_str() == service)?;
    if parts.next().is_some() || entity.is_empty() || verb.is_empty() {
        return None;
    }
    Some(EventType { service, entity: entity.to_owned(), verb: verb.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_model::digest::Digest;

    fn event() -> Event {
        Event {
            id: Digest::of(b"1"),
            sequence: 42,
            epoch: "epoch".to_owned(),
            event: NewEvent {
                kind: EventType::new(Service::Builder, "build", "succeeded"),
                server: Some("web".parse().unwrap()),
                aggregate_kind: "build".to_owned(),
                aggregate_id: "web-b7".to_owned(),
                aggregate_version: 3,
                payload: vec![1, 2, 3],
                time: "2026-01-02T03:04:05.678Z".parse().unwrap(),
                traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
            },
        }
    }

    #[test]
    fn an_event_survives_the_wire() {
        let site = "home".parse().unwrap();
        for server in [Some("web".parse().unwrap()), None] {
            let mut event = event();
            event.event.server = server;
            let subject = event.event.kind.subject(&site, event.event.server.as_ref());
            let read = decode(&subject, &headers(&site, &event), &event.event.payload).unwrap();
            assert_eq!(read, event);
        }
    }

    #[test]
    fn what_is_no_trace_context_is_not_sent_as_one() {
        let site = "home".parse().unwrap();
        let good = event().event.traceparent;
        for bad in ["", "x", "00-0af7\r\nNats-Msg-Id: 1", &format!("{good}\n"), &"0".repeat(1 << 20)] {
            let mut event = event();
            event.event.traceparent = bad.to_owned();
            assert!(headers(&site, &event).get(TRACEPARENT).is_none(), "{bad:?}");
        }
        assert_eq!(traceparent(&headers(&site, &event())), good);
    }

    #[test]
    fn what_lacks_a_header_or_holds_a_wrong_one_is_undecodable() {
        let site = "home".parse().unwrap();
        let subject = "kiln.v1.home.builder.build.succeeded.web";
        let good = headers(&site, &event());
        for name in [
            "ce-specversion",
            "ce-id",
            "ce-source",
            "ce-type",
            "ce-time",
            "ce-subject",
            "ce-epoch",
            "ce-sequence",
            "ce-version",
        ] {
            let without: HeaderMap = good
                .iter()
                .filter(|(key, _)| key.to_string() != name)
                .flat_map(|(key, values)| values.iter().map(|value| (key.clone(), value.clone())))
                .collect();
            let error = decode(subject, &without, &[]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
            if name != "ce-epoch" {
                let mut wrong = good.clone();
                wrong.insert(name, "?");
                assert!(decode(subject, &wrong, &[]).is_err(), "{name}");
            }
        }
    }

    /// Who may publish as the builder is not to be taken for the monitor, another site's builder not for this one's.
    #[test]
    fn headers_that_say_other_than_the_subject_are_not_believed() {
        let good = headers(&"home".parse().unwrap(), &event());
        let subject = "kiln.v1.home.builder.build.succeeded.web";
        assert!(decode(subject, &good, &[]).is_ok());
        for (name, value) in [
            ("ce-type", "kiln.monitor.build.succeeded.v1"),
            ("ce-type", "kiln.builder.revision.succeeded.v1"),
            ("ce-type", "kiln.builder.build.failed.v1"),
            ("ce-source", "kiln/home/monitor"),
            ("ce-source", "kiln/other/builder"),
            ("ce-source", "kiln/home/x/builder"),
        ] {
            let mut wrong = good.clone();
            wrong.insert(name, value);
            assert!(
                matches!(decode(subject, &wrong, &[]), Err(Error::Undecodable { .. })),
                "{name}: {value}"
            );
        }
        for subject in [
            "kiln.v1.home.builder.build.succeeded.*",
            "kiln.v1.home.builder.build.succeeded.>",
            "kiln.v1.home.builder.build.succeeded.web.web",
            "kiln.v1.home.builder.build.succeeded.a web",
            "kiln.v1.home.builder.build.succeeded.",
            "kiln.v1.home.builder.build.succeeded",
            "kiln.v1.home.monitor.build.succeeded.web",
            "kiln.v1.other.builder.build.succeeded.web",
            "kiln..v1.home.builder.build.succeeded.web",
            "kiln.v1.home.builder.build.succeeded.web\n",
            "kiln.v1.home.builder.build.succeeded.web\r",
            "kiln.v1.home.builder.build.succeeded.web\r\nPUB x 0",
            "kiln.v1.home.builder.build.succeeded\n.web",
            "\nkiln.v1.home.builder.build.succeeded.web",
            "web",
        ] {
            assert!(matches!(decode(subject, &good, &[]), Err(Error::Undecodable { .. })), "{subject}");
        }
    }
}
