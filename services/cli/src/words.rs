//! Small texts that many outputs share: ages, short digests, states.

use std::time::Duration;

use comfy_table::Cell;
use jiff::{Timestamp, Unit};
use kiln_api::builder::{BuildPhase, BuildState};
use kiln_api::deployer::{Fleet, InstanceState, Rollout, RolloutState};
use kiln_api::types::{HealthState, SignalState};

use crate::screen::{bad, busy, good, plain};

pub(crate) fn timestamp(time: Option<&prost_types::Timestamp>) -> Option<Timestamp> {
    time.and_then(|time| Timestamp::new(time.seconds, time.nanos).ok())
}

/// `42s`, `3m`, `5h`, `12d`; `-` where there is no time.
pub(crate) fn age(time: Option<&prost_types::Timestamp>) -> String {
    timestamp(time)
        .map_or_else(|| "-".to_owned(), |time| span(Timestamp::now().duration_since(time).as_secs()))
}

pub(crate) fn span(seconds: i64) -> String {
    match seconds.max(0) {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7_200 => format!("{}m", s / 60),
        s @ 7_200..172_800 => format!("{}h", s / 3_600),
        s => format!("{}d", s / 86_400),
    }
}

pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => plural(usize::try_from(bytes).unwrap_or_default(), "byte"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// As long as nothing where it is not said.
pub(crate) fn duration(took: Option<&prost_types::Duration>) -> Duration {
    took.and_then(|took| Duration::try_from(*took).ok()).unwrap_or_default()
}

/// Between two moments, to a tenth of a second.
pub(crate) fn took(from: Option<&prost_types::Timestamp>, to: Option<&prost_types::Timestamp>) -> String {
    match (timestamp(from), timestamp(to)) {
        (Some(from), Some(to)) => format!("{:.1}s", to.duration_since(from).as_secs_f64().max(0.0)),
        _ => "-".to_owned(),
    }
}

/// Local time, to the second.
pub(crate) fn moment(time: Option<&prost_types::Timestamp>) -> String {
    timestamp(time).map_or_else(
        || "-".to_owned(),
        |time| {
            let zoned = time.to_zoned(jiff::tz::TimeZone::system());
            let zoned = zoned.round(Unit::Second).unwrap_or(zoned);
            zoned.strftime("%Y-%m-%d %H:%M:%S").to_string()
        },
    )
}

/// The first twelve digits, as people compare them.
pub(crate) fn short(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..12).unwrap_or(hex)
}

pub(crate) fn or_dash(text: &str) -> &str {
    if text.is_empty() { "-" } else { text }
}

pub(crate) fn release(number: u64) -> String {
    if number == 0 { "-".to_owned() } else { format!("r{number}") }
}

/// `r1 -> r2`; the first release, and one after a removal, comes from nowhere: `to r1`.
pub(crate) fn way(from: u64, to: u64) -> String {
    if from == 0 { format!("to r{to}") } else { format!("r{from} -> r{to}") }
}

/// A rollout's whole way: one that turned back on it says so.
pub(crate) fn whole_way(from: u64, to: u64, back_to: u64) -> String {
    let there = way(from, to);
    if back_to == 0 || back_to == to { there } else { format!("{there}, back to r{back_to}") }
}

/// What a rollout leaves, and what it goes back to; none while it goes forward.
pub(crate) fn back(it: &Rollout) -> Option<(u64, u64)> {
    match it.back_to {
        0 => None,
        back if back == it.to_release => Some((it.from_release, back)),
        back => Some((it.to_release, back)),
    }
}

/// A rollback of what ran, which a person asked for: that it ended as rolled back is its success, and says nothing bad of
/// the release that it goes to.
pub(crate) fn went_back_by_hand(it: &Rollout) -> bool {
    it.back_to != 0 && it.back_to == it.to_release
}

/// Whether what is wrong is the reason of a verdict, which is told beside it.
pub(crate) fn is_verdict(problem: &str, fleet: Option<&Fleet>) -> bool {
    let mut verdicts = fleet.into_iter().flat_map(|fleet| &fleet.quarantine);
    verdicts.any(|it| !it.reason.is_empty() && problem.contains(&it.reason))
}

pub(crate) fn plural(count: usize, one: &str) -> String {
    if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") }
}

pub(crate) fn build_state(state: BuildState) -> &'static str {
    match state {
        BuildState::Unspecified => "?",
        BuildState::Queued => "queued",
        BuildState::Running => "running",
        BuildState::Succeeded => "succeeded",
        BuildState::Failed => "failed",
        BuildState::Cancelled => "cancelled",
    }
}

pub(crate) fn build_phase(phase: BuildPhase) -> &'static str {
    match phase {
        BuildPhase::Unspecified => "?",
        BuildPhase::Resolve => "resolve",
        BuildPhase::Wait => "wait",
        BuildPhase::Fetch => "fetch",
        BuildPhase::Unpack => "unpack",
        BuildPhase::Configure => "configure",
        BuildPhase::Run => "run",
        BuildPhase::Hash => "hash",
        BuildPhase::Write => "write",
        BuildPhase::Describe => "describe",
        BuildPhase::Sign => "sign",
        BuildPhase::Push => "push",
        BuildPhase::Test => "test",
    }
}

pub(crate) fn rollout_state(state: RolloutState) -> &'static str {
    match state {
        RolloutState::Unspecified => "?",
        RolloutState::Running => "rolling out",
        RolloutState::Held => "held",
        RolloutState::RollingBack => "rolling back",
        RolloutState::Succeeded => "succeeded",
        RolloutState::RolledBack => "rolled back",
        RolloutState::Failed => "failed",
        RolloutState::Superseded => "superseded",
    }
}

pub(crate) fn rollout_is_under_way(state: RolloutState) -> bool {
    matches!(state, RolloutState::Running | RolloutState::Held | RolloutState::RollingBack)
}

pub(crate) fn instance_state(state: InstanceState) -> &'static str {
    match state {
        InstanceState::Unspecified => "?",
        InstanceState::Launching => "launching",
        InstanceState::Running => "running",
        InstanceState::Exited => "exited",
        InstanceState::Draining => "draining",
        InstanceState::Retired => "retired",
        InstanceState::Failed => "failed",
    }
}

pub(crate) fn health(state: HealthState) -> &'static str {
    match state {
        HealthState::Unspecified => "-",
        HealthState::Starting => "starting",
        HealthState::Healthy => "healthy",
        HealthState::Unhealthy => "unhealthy",
        HealthState::Gone => "gone",
    }
}

pub(crate) fn signal_state(state: SignalState) -> &'static str {
    match state {
        SignalState::Unspecified => "?",
        SignalState::Open => "open",
        SignalState::Waiting => "waits for approval",
        SignalState::Resolved => "resolved",
    }
}

/// A state in the colour of how good it is.
pub(crate) fn tinted(word: &str) -> Cell {
    match word {
        "stable" | "succeeded" | "healthy" | "running" | "ok" | "good" => good(word),
        "failed" | "unhealthy" | "gone" | "exited" | "rolled back" | "quarantined" | "down" => bad(word),
        "-" | "?" | "retired" | "resolved" | "superseded" | "cancelled" => plain(word),
        _ => busy(word),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        assert_eq!([span(-5), span(0), span(119)], ["0s", "0s", "119s"]);
        assert_eq!([span(120), span(7_199), span(7_200)], ["2m", "119m", "2h"]);
        assert_eq!(span(200_000), "2d");
    }

    #[test]
    fn a_way_back_is_told_from_a_way_there() {
        let rollout = |from, to, back| Rollout {
            from_release: from,
            to_release: to,
            back_to: back,
            ..Rollout::default()
        };
        let (there, turned, by_hand) = (rollout(1, 2, 0), rollout(1, 2, 1), rollout(2, 1, 1));
        assert_eq!([back(&there), back(&turned), back(&by_hand)], [None, Some((2, 1)), Some((2, 1))]);
        assert!(went_back_by_hand(&by_hand) && !went_back_by_hand(&turned) && !went_back_by_hand(&there));
        assert_eq!(
            [whole_way(0, 1, 0), whole_way(1, 2, 1), whole_way(2, 1, 1)],
            ["to r1", "r1 -> r2, back to r1", "r2 -> r1"]
        );
    }

    #[test]
    fn digests_are_cut_where_they_can_be() {
        assert_eq!(short("sha256:0123456789abcdef"), "0123456789ab");
        assert_eq!(short("abc"), "abc");
    }
}
