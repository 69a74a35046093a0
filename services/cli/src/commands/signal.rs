//! `kiln signal`

use clap::{Args, Subcommand};
use kiln_api::monitor::{ApproveSignalRequest, ReportSignalRequest};
use kiln_api::types::{Remedy, Signal as SignalMessage, SignalState};
use serde_json::json;

use crate::clients::{Services, request_id};
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::json;
use crate::screen::{Screen, plain};
use crate::words::{age, short, signal_state, tinted};

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct Signal {
    #[command(subcommand)]
    command: Option<SignalCommand>,
    /// The server that needs an update
    #[arg(required = true)]
    server: Option<String>,
    /// Why, in a line for people
    #[arg(required = true)]
    summary: Option<String>,
    /// Replace this instance instead of building anew
    #[arg(long, value_name = "INSTANCE")]
    replace: Option<String>,
    /// Where the report comes from, such as a scanner [default: you]
    #[arg(long, value_name = "NAME")]
    reporter: Option<String>,
    /// The reporter's own id of it; reported again it is the same signal [default: a new one]
    #[arg(long, value_name = "ID")]
    id: Option<String>,
}

#[derive(Debug, Subcommand)]
enum SignalCommand {
    /// Show the signals
    List {
        /// Those of one server
        server: Option<String>,
        /// All that is resolved, not just the last ten
        #[arg(short, long)]
        all: bool,
    },
    /// Let a signal that waits for approval act
    Approve {
        /// The signal's id, or its first digits
        id: String,
    },
}

/// Resolved signals that a list shows beside those that are open.
const SHOWN: usize = 10;

pub(crate) async fn run(it: &Signal, services: &Services, screen: Screen) -> Outcome {
    match &it.command {
        Some(SignalCommand::List { server, all }) => {
            list(server.as_deref().unwrap_or_default(), *all, services, screen).await
        }
        Some(SignalCommand::Approve { id }) => approve(id, services, screen).await,
        None => report(it, services, screen).await,
    }
}

async fn report(it: &Signal, services: &Services, screen: Screen) -> Outcome {
    let server = it.server.clone().unwrap_or_default();
    let remedy = if it.replace.is_some() { Remedy::Replace } else { Remedy::Rebuild };
    let id = request_id();
    let request = ReportSignalRequest {
        request_id: id.clone(),
        server: server.clone(),
        reporter: it.reporter.clone().unwrap_or_default(),
        id: it.id.clone().unwrap_or(id),
        summary: it.summary.clone().unwrap_or_default(),
        remedy: remedy.into(),
        instance: it.replace.clone().unwrap_or_default(),
    };
    let answer = services
        .monitor()
        .report_signal(request)
        .await
        .during(format_args!("reporting a signal for {server}"))?
        .into_inner();
    let signal =
        answer.signal.ok_or_else(|| Failure::failed("reporting a signal", "the monitor gave none back"))?;
    screen.json(&json::of("kiln.types.v1.Signal", &signal)?)?;
    screen.line(format_args!(
        "signal {} for {server} is {}",
        short(&signal.id),
        signal_state(signal.state())
    ))?;
    if signal.state() == SignalState::Waiting {
        screen.next(&[format!("kiln signal approve {}", short(&signal.id))])
    } else {
        screen.next(&[format!("kiln status {server}"), "kiln events --follow".to_owned()])
    }
}

async fn list(server: &str, all: bool, services: &Services, screen: Screen) -> Outcome {
    let mut signals = services.signals(server).await?;
    let resolved = signals.iter().filter(|it| it.state() == SignalState::Resolved).count();
    let mut too_old = if all { 0 } else { resolved.saturating_sub(SHOWN) };
    // Oldest first, so the first ones that are resolved are those to leave out.
    signals.retain(|signal| {
        let left_out = too_old > 0 && signal.state() == SignalState::Resolved;
        too_old -= usize::from(left_out);
        !left_out
    });
    screen.json(&json!({ "signals": json::list("kiln.types.v1.Signal", &signals)? }))?;
    if signals.is_empty() {
        return screen.line("No signals: nothing needs an update.");
    }
    let rows = signals
        .iter()
        .map(|it| {
            vec![
                plain(short(&it.id)),
                plain(&it.server),
                plain(&it.cause),
                tinted(signal_state(it.state())),
                plain(age(it.raised.as_ref())),
                plain(it.evidence.join("; ")),
            ]
        })
        .collect();
    screen.table(&["SIGNAL", "SERVER", "CAUSE", "STATE", "AGE", "EVIDENCE"], rows)?;
    match signals.iter().find(|it| it.state() == SignalState::Waiting) {
        Some(waiting) => screen.next(&[format!("kiln signal approve {}", short(&waiting.id))]),
        None => Ok(()),
    }
}

async fn approve(id: &str, services: &Services, screen: Screen) -> Outcome {
    let signal = find(id, &services.signals("").await?)?;
    let request = ApproveSignalRequest { request_id: request_id(), id: signal.id.clone() };
    let answer =
        services.monitor().approve_signal(request).await.during(format_args!("approving signal {id}"))?;
    let signal = answer
        .into_inner()
        .signal
        .ok_or_else(|| Failure::failed("approving a signal", "the monitor gave none back"))?;
    screen.json(&json::of("kiln.types.v1.Signal", &signal)?)?;
    screen.line(format_args!(
        "signal {} for {} is {}",
        short(&signal.id),
        signal.server,
        signal_state(signal.state())
    ))?;
    screen.next(&[format!("kiln status {}", signal.server)])
}

/// By its id or the first digits of it, as `kiln signal list` shows them.
pub(crate) fn find(text: &str, signals: &[SignalMessage]) -> Outcome<SignalMessage> {
    let digits = |id: &str| id.strip_prefix("sha256:").unwrap_or(id).to_owned();
    let wanted = digits(text);
    let mut matching = signals.iter().filter(|signal| digits(&signal.id).starts_with(&wanted));
    match (matching.next(), matching.next()) {
        (Some(signal), None) if !wanted.is_empty() => Ok(signal.clone()),
        (Some(_), _) => Err(Failure::new(Code::Refused, format!("signal {text}"), "more than one begins so")
            .reason("ambiguous")
            .todo("give more digits")),
        (None, _) => Err(Failure::new(Code::NotFound, format!("there is no signal {text}"), "")
            .todo("kiln signal list --all")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_found_by_its_first_digits_if_they_are_its_own() {
        let signal = |id: &str| SignalMessage { id: id.to_owned(), ..Default::default() };
        let signals = [signal("sha256:abc1"), signal("sha256:abd2")];
        assert_eq!(find("abc", &signals).unwrap().id, "sha256:abc1");
        assert_eq!(find("sha256:abd2", &signals).unwrap().id, "sha256:abd2");
        assert!(find("ab", &signals).unwrap_err().line().contains("more than one"));
        assert!(find("", &signals).is_err());
        assert!(find("ff", &signals).unwrap_err().is_not_found());
    }
}
