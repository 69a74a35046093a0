//! What somebody else says of a server, by a call or on the bus. The same report is one signal, however often it comes.

use kiln_api::convert::{Invalid, optional_text, text};
use kiln_api::{events, types};
use kiln_model::cause::CauseKind;
use kiln_model::name::{InstanceId, ServerName};
use kiln_model::signal::Remedy;
use kiln_monitor_core::signal::Observation;
use serde::Deserialize;

/// What an update is called for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub server: ServerName,
    pub reporter: String,
    pub id: String,
    pub summary: String,
    pub remedy: Remedy,
    pub instance: Option<InstanceId>,
    pub since: Option<jiff::Timestamp>,
}

impl Report {
    /// # Errors
    /// [`Invalid`] for a report that could not become a signal.
    pub fn read(message: events::Report) -> Result<Self, Invalid> {
        let server: ServerName = text("server", &message.server)?;
        let instance: Option<InstanceId> = optional_text("instance", &message.instance)?;
        if instance.as_ref().is_some_and(|instance| instance.server != server) {
            return Err(Invalid::new("instance", format!("is not one of `{server}`")));
        }
        let remedy = match (types::Remedy::try_from(message.remedy), &instance) {
            (Ok(types::Remedy::Rebuild), None) | (Ok(types::Remedy::Unspecified), None) => Remedy::Rebuild,
            (Ok(types::Remedy::Replace | types::Remedy::Unspecified), Some(_)) => Remedy::Replace,
            (Ok(types::Remedy::Replace), None) => {
                return Err(Invalid::new("instance", "is missing: a replacement is about one instance"));
            }
            (Ok(types::Remedy::Rebuild), Some(_)) => {
                return Err(Invalid::new("instance", "is given, but a rebuild is about the whole server"));
            }
            (Err(_), _) => {
                return Err(Invalid::new("remedy", format!("is {}, which is unknown", message.remedy)));
            }
        };
        for (field, text, most) in [
            ("reporter", &message.reporter, 200),
            ("id", &message.id, 200),
            ("summary", &message.summary, 2000),
        ] {
            // Lines of a log and of a terminal are made from them; the fingerprint parts them by a line end.
            if text.is_empty() || text.len() > most || text.chars().any(char::is_control) {
                return Err(Invalid::new(field, format!("wanted one line of 1 to {most} bytes")));
            }
        }
        let since = kiln_api::convert::from_optional_timestamp("time", message.time)?;
        let events::Report { reporter, id, summary, .. } = message;
        Ok(Self { server, reporter, id, summary, remedy, instance, since })
    }

    pub fn observation(self, generation: u64, now: jiff::Timestamp) -> Observation {
        Observation {
            cause: CauseKind::Reported,
            fingerprint: format!("{}\n{}", self.reporter, self.id),
            remedy: self.remedy,
            evidence: vec![self.summary],
            instance: self.instance,
            since: self.since.unwrap_or(now),
            reporter: self.reporter,
            server: self.server,
            generation,
        }
    }
}

/// The same message as JSON, in the manner of protobuf's own mapping.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    server: String,
    reporter: String,
    id: String,
    summary: String,
    #[serde(default)]
    remedy: Option<JsonRemedy>,
    #[serde(default)]
    instance: String,
    #[serde(default)]
    time: Option<jiff::Timestamp>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum JsonRemedy {
    #[serde(rename = "REMEDY_REBUILD", alias = "rebuild")]
    Rebuild,
    #[serde(rename = "REMEDY_REPLACE", alias = "replace")]
    Replace,
}

/// Reads what came over the bus: protobuf, or JSON.
///
/// # Errors
/// What it is not.
pub fn decode(payload: &[u8]) -> Result<Report, String> {
    const MOST: usize = 64 * 1024;
    if payload.len() > MOST {
        return Err(format!("the report has {} bytes, more than {MOST}", payload.len()));
    }
    // A protobuf message never begins so: it would be the start of a group.
    let message = if payload.trim_ascii_start().starts_with(b"{") {
        let json: Json =
            serde_json::from_slice(payload).map_err(|error| format!("not a report in JSON: {error}"))?;
        let remedy = json.remedy.map_or(types::Remedy::Unspecified, |remedy| match remedy {
            JsonRemedy::Rebuild => types::Remedy::Rebuild,
            JsonRemedy::Replace => types::Remedy::Replace,
        });
        events::Report {
            server: json.server,
            reporter: json.reporter,
            id: json.id,
            summary: json.summary,
            remedy: remedy.into(),
            instance: json.instance,
            time: json.time.map(kiln_api::convert::to_timestamp),
        }
    } else {
        prost::Message::decode(payload).map_err(|error| format!("not a report: {error}"))?
    };
    Report::read(message).map_err(|invalid| format!("not a report: {invalid}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use prost::Message;

    use super::*;

    fn message() -> events::Report {
        events::Report {
            server: "web".to_owned(),
            reporter: "scanner".to_owned(),
            id: "17".to_owned(),
            summary: "CVE-2026-1 in nginx".to_owned(),
            ..events::Report::default()
        }
    }

    #[test]
    fn protobuf_and_json_say_the_same() {
        let time: jiff::Timestamp = "2026-06-10T10:00:00Z".parse().unwrap();
        let binary = events::Report {
            remedy: types::Remedy::Replace.into(),
            instance: "web-r1-0-a1".to_owned(),
            time: Some(kiln_api::convert::to_timestamp(time)),
            ..message()
        };
        let json = br#" {"server":"web","reporter":"scanner","id":"17","summary":"CVE-2026-1 in nginx",
            "remedy":"REMEDY_REPLACE","instance":"web-r1-0-a1","time":"2026-06-10T10:00:00Z"}"#;
        assert_eq!(decode(&binary.encode_to_vec()).unwrap(), decode(json).unwrap());
        assert_eq!(decode(&message().encode_to_vec()).unwrap().remedy, Remedy::Rebuild);
        let short = br#"{"server":"web","reporter":"scanner","id":"17","summary":"x","remedy":"rebuild"}"#;
        assert_eq!(decode(short).unwrap().remedy, Remedy::Rebuild);
    }

    /// A report with groups of a field that nobody knows, each in the one before.
    fn nested(depth: usize) -> Result<Report, String> {
        let (begin, end) = (15 << 3 | 3, 15 << 3 | 4);
        decode(&[message().encode_to_vec(), vec![begin; depth], vec![end; depth]].concat())
    }

    #[test]
    fn what_is_no_report_says_why() {
        let wrong = |change: fn(&mut events::Report)| {
            let mut message = message();
            change(&mut message);
            decode(&message.encode_to_vec()).unwrap_err()
        };
        for (error, said) in [
            (wrong(|m| m.server = "../web".to_owned()), "server:"),
            (wrong(|m| m.server = "web\r\nPUB x 0".to_owned()), "server:"),
            (wrong(|m| m.reporter = "scanner\r".to_owned()), "reporter:"),
            (wrong(|m| m.instance = "web-r1-0-a1\n".to_owned()), "instance:"),
            (wrong(|m| m.reporter.clear()), "reporter:"),
            (wrong(|m| m.id = "a\nb".to_owned()), "id:"),
            (wrong(|m| m.summary = "x".repeat(2001)), "summary:"),
            (wrong(|m| m.remedy = 99), "remedy:"),
            (wrong(|m| m.remedy = types::Remedy::Replace.into()), "instance:"),
            (wrong(|m| m.instance = "db-r1-0-a1".to_owned()), "not one of `web`"),
            (decode(b"{}").unwrap_err(), "missing field `server`"),
            (decode(b"{\"server\":1}").unwrap_err(), "JSON"),
            (decode(&[0xff; 20]).unwrap_err(), "not a report"),
            (decode(&[1 << 3 | 2, 2, 0xff, 0xfe]).unwrap_err(), "UTF-8"),
            (nested(101).unwrap_err(), "recursion limit"),
            (nested(20_000).unwrap_err(), "recursion limit"),
            (decode(&vec![b' '; 1 << 20]).unwrap_err(), "more than"),
        ] {
            assert!(error.contains(said), "{said}: {error}");
        }
        assert_eq!(nested(90), decode(&message().encode_to_vec()));
        let deep = format!("{{\"server\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
        assert!(decode(deep.as_bytes()).is_err());
    }
}
