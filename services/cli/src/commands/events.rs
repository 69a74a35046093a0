//! `kiln events`

use clap::Args;
use jiff::Timestamp;
use kiln_bus::{NatsBus, User};
use kiln_model::event::Event;
use serde_json::{Value, json};

use crate::clients::Services;
use crate::failure::{Code, Failure, Outcome};
use crate::json;
use crate::screen::{Screen, print};
use crate::words::whole_way;

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Go on until interrupted; without it the past events are shown
    #[arg(short, long)]
    follow: bool,
    /// Begin with what happened that long ago, such as 10m or 2h [default: 1h without --follow, else now]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    since: Option<jiff::SignedDuration>,
    /// Those of one server
    #[arg(long, value_name = "NAME")]
    server: Option<String>,
}

fn duration(text: &str) -> Result<jiff::SignedDuration, String> {
    text.parse().map_err(|_| "a duration is written as 30s, 10m or 2h".to_owned())
}

/// How far back the past is shown where nothing else is asked for.
const PAST: jiff::SignedDuration = jiff::SignedDuration::from_hours(1);

pub(crate) async fn run(it: &Events, services: &Services, screen: Screen) -> Outcome {
    let site = services.site("reading events")?;
    let options =
        site.nats(User::Cli).map_err(|error| Failure::new(Code::Invalid, "the broker's user cli", error))?;
    let bus = NatsBus::connect(options).await.map_err(|error| broker(&error))?;
    if !bus.connected() {
        return Err(broker(&format!("{}, at {}", bus.away(), site.nats_url)));
    }
    // Subscribed before the past is read: what happens in between comes twice, and is told once.
    let mut following = match it.follow {
        true => Some(bus.follow().await.map_err(|error| broker(&error))?),
        false => None,
    };
    let mut seen = std::collections::HashSet::new();
    let back = it.since.or((!it.follow).then_some(PAST));
    if let Some(back) = back {
        let since = Timestamp::now().saturating_sub(back).unwrap_or(Timestamp::MIN);
        for event in bus.past(since).await.map_err(|error| broker(&error))? {
            match event {
                Ok(event) => {
                    show(it, &event, screen)?;
                    seen.insert(event.id);
                }
                Err(error) => screen.progress(format_args!("not understood: {error}")),
            }
        }
    }
    let Some(following) = &mut following else {
        return if seen.is_empty() { screen.line("No events in that time.") } else { Ok(()) };
    };
    screen.progress(format_args!("following the events of {}; Ctrl-C ends it", site.name));
    while let Some(event) = following.next().await {
        match event {
            Ok(event) if seen.remove(&event.id) => {}
            Ok(event) => show(it, &event, screen)?,
            Err(error) => screen.progress(format_args!("not understood: {error}")),
        }
    }
    Err(broker(&"it closed the connection"))
}

fn broker(error: &impl std::fmt::Display) -> Failure {
    Failure::new(Code::Unavailable, "listening to the broker", error).reason("broker").todo("kiln up")
}

fn show(it: &Events, event: &Event, screen: Screen) -> Outcome {
    let server = event.event.server.as_ref().map_or("", |name| name.as_str());
    if it.server.as_deref().is_some_and(|wanted| wanted != server) {
        return Ok(());
    }
    // The payload of an event that is newer than this command is left out, and the rest told.
    let data = kiln_bus::schema(&event.event.kind)
        .and_then(|kind| json::decode(kind, &event.event.payload).ok())
        .unwrap_or_default();
    if screen.is_json() {
        return print(json!({
            "id": event.id.to_string(),
            "type": event.event.kind.ce_type(),
            "time": event.event.time.to_string(),
            "server": server,
            "subject": format!("{}/{}", event.event.aggregate_kind, event.event.aggregate_id),
            "epoch": event.epoch,
            "sequence": event.sequence,
            "version": event.event.aggregate_version,
            "traceparent": event.event.traceparent,
            "data": data,
        }));
    }
    let time = event.event.time.to_zoned(jiff::tz::TimeZone::system()).strftime("%H:%M:%S%.3f");
    let kind = &event.event.kind;
    let what = format!("{}.{}", kind.entity, kind.verb);
    print(
        format_args!("{time}  {:<9} {what:<26} {}", kind.service.as_str(), summary(&data, server))
            .to_string()
            .trim_end(),
    )
}

/// What a person wants to know first: the words that tell one event from the next.
fn summary(data: &Value, server: &str) -> String {
    let text = |path: &str| data.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let number = |path: &str| data.pointer(path).and_then(Value::as_u64).unwrap_or_default();
    let short = |digest: String| crate::words::short(&digest).to_owned();
    let first_line = |text: String| text.lines().next().unwrap_or_default().to_owned();
    let parts = match data.as_object().and_then(|it| it.keys().next()).map(String::as_str) {
        Some("build") => {
            vec![text("/build/id"), short(text("/build/image_digest")), first_line(text("/build/problem"))]
        }
        Some("revision") => vec![
            format!("{server} g{}", number("/revision/generation")),
            format!("image {}", short(text("/revision/image_digest"))),
            text("/revision/cause/summary"),
        ],
        Some("release") => vec![format!("{server} r{}", number("/release/number"))],
        Some("rollout") | Some("quarantine") => vec![
            format!(
                "{server} {}",
                whole_way(
                    number("/rollout/from_release"),
                    number("/rollout/to_release"),
                    number("/rollout/back_to")
                )
            ),
            format!("{}/{}", number("/rollout/done"), number("/rollout/total")),
            first_line(text("/rollout/problem")),
        ],
        Some("instance") => vec![text("/instance/id"), text("/instance/address"), text("/instance/detail")],
        Some("health") => vec![
            text("/health/instance"),
            data.pointer("/health/last_checks")
                .and_then(|checks| checks.as_array()?.last()?.get("detail")?.as_str())
                .unwrap_or_default()
                .to_owned(),
        ],
        Some("signal") => {
            let evidence = data.pointer("/signal/evidence").and_then(Value::as_array);
            let lines: Vec<_> = evidence.into_iter().flatten().filter_map(Value::as_str).collect();
            vec![server.to_owned(), text("/signal/cause"), lines.join("; ")]
        }
        Some("head") => vec![format!("{} records", number("/records")), short(text("/head/hash"))],
        _ => vec![server.to_owned(), text("/cause/summary"), first_line(text("/problem"))],
    };
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_told_by_what_sets_it_apart() {
        let rollout = json!({
            "rollout": { "from_release": 1, "to_release": 2, "done": 3, "total": 3, "problem": "" },
            "quarantine": null,
        });
        assert_eq!(summary(&rollout, "web"), "web r1 -> r2  3/3");
        let signal = json!({ "signal": { "cause": "gone", "evidence": ["it ended", "exit code 137"] } });
        assert_eq!(summary(&signal, "web"), "web  gone  it ended; exit code 137");
        assert_eq!(summary(&Value::Null, "web"), "web");
    }
}
