use std::fmt::Debug;

use jiff::Timestamp;
use kiln_model::cause::{Cause, CauseKind};
use kiln_model::check::{
    Check, CheckResult, CommandCheck, FileCheck, HttpCheck, LogCheck, PackageCheck, PortCheck, ProcessCheck,
    TcpCheck, Transport, UserCheck,
};
use kiln_model::definition::{Mode, UpdatePolicy};
use kiln_model::digest::Digest;
use kiln_model::name::{BuildId, InstanceId, ServerName};
use kiln_model::revision::{ImageRevision, Revision, RevisionContent};
use kiln_model::run::{HealthPolicy, Limits, Port, RolloutPolicy, RunSpec, Strategy as RolloutStrategy};
use kiln_model::signal::{HealthState, Remedy, Signal, SignalId, SignalState};
use kiln_model::time::Millis;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::types;

fn timestamps() -> impl Strategy<Value = Timestamp> {
    (Timestamp::MIN.as_nanosecond()..=Timestamp::MAX.as_nanosecond())
        .prop_filter_map("a timestamp", |nanos| Timestamp::from_nanosecond(nanos).ok())
}

fn millis() -> impl Strategy<Value = Millis> {
    any::<u64>().prop_map(Millis)
}

fn texts() -> impl Strategy<Value = String> {
    ".{0,20}"
}

fn some_texts() -> impl Strategy<Value = Option<String>> {
    option::of(".{1,20}")
}

fn digests() -> impl Strategy<Value = Digest> {
    any::<[u8; 32]>().prop_map(Digest::from_bytes)
}

fn servers() -> impl Strategy<Value = ServerName> {
    "[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?".prop_map(|name| name.parse().expect("a server name"))
}

fn checks() -> impl Strategy<Value = Check> {
    prop_oneof![
        (1..=u16::MAX, texts(), option::of(1..=u16::MAX), some_texts())
            .prop_map(|(port, path, status, body)| Check::Http(HttpCheck { port, path, status, body })),
        (1..=u16::MAX).prop_map(|port| Check::Tcp(TcpCheck { port })),
        (texts(), any::<i32>(), some_texts())
            .prop_map(|(run, status, stdout)| Check::Command(CommandCheck { run, status, stdout })),
        (texts(), some_texts(), some_texts(), some_texts(), any::<bool>()).prop_map(
            |(path, mode, owner, contains, absent)| Check::File(FileCheck {
                path,
                mode,
                owner,
                contains,
                absent
            })
        ),
        (texts(), some_texts(), any::<bool>())
            .prop_map(|(name, version, absent)| Check::Package(PackageCheck { name, version, absent })),
        (texts(), option::of(any::<u32>()), some_texts(), some_texts(), some_texts(), any::<bool>())
            .prop_map(|(name, uid, group, home, shell, absent)| Check::User(UserCheck {
                name,
                uid,
                group,
                home,
                shell,
                absent
            })),
        (
            1..=u16::MAX,
            select(vec![Transport::Tcp, Transport::Udp]),
            option::of(any::<std::net::IpAddr>()),
            any::<bool>()
        )
            .prop_map(|(port, protocol, address, absent)| Check::Port(PortCheck {
                port,
                protocol,
                address,
                absent
            })),
        (texts(), some_texts(), option::of(1..=u32::MAX), any::<bool>()).prop_map(
            |(name, user, count, absent)| Check::Process(ProcessCheck { name, user, count, absent })
        ),
        (texts(), any::<bool>()).prop_map(|(contains, absent)| Check::Log(LogCheck { contains, absent })),
    ]
}

fn health_policies() -> impl Strategy<Value = HealthPolicy> {
    (checks(), millis(), millis(), 1..=u32::MAX, 1..=u32::MAX, millis()).prop_map(
        |(check, interval, timeout, healthy, unhealthy, start)| HealthPolicy {
            check,
            interval,
            timeout,
            healthy,
            unhealthy,
            start,
        },
    )
}

fn rollout_policies() -> impl Strategy<Value = RolloutPolicy> {
    (1..=u32::MAX, any::<u32>(), any::<bool>(), millis(), millis()).prop_map(
        |(some, any, surge, soak, deadline)| {
            let (max_surge, max_unavailable) = if surge { (some, any) } else { (any, some) };
            RolloutPolicy {
                strategy: RolloutStrategy::Rolling { max_surge, max_unavailable },
                soak,
                deadline,
            }
        },
    )
}

fn run_specs() -> impl Strategy<Value = RunSpec> {
    let limits = (option::of(1..=u64::MAX), option::of(1..=u32::MAX), option::of(1..=u32::MAX))
        .prop_map(|(memory_bytes, cpu_millis, pids)| Limits { memory_bytes, cpu_millis, pids });
    let ports = vec((1..=u16::MAX, 1..=u16::MAX).prop_map(|(listen, target)| Port { listen, target }), 0..4);
    (
        any::<u32>(),
        ports,
        vec(texts(), 0..3),
        btree_map(texts(), texts(), 0..3),
        limits,
        vec(texts(), 0..3),
        option::of(health_policies()),
        rollout_policies(),
        millis(),
        option::of("[a-z]{1,40}"),
    )
        .prop_map(
            |(replicas, ports, writable, env, limits, capabilities, health, rollout, drain, node)| {
                let node = node.map(|name| name.parse().unwrap());
                RunSpec { node, replicas, ports, writable, env, limits, capabilities, health, rollout, drain }
            },
        )
}

fn causes() -> impl Strategy<Value = Cause> {
    (select(CauseKind::ALL.to_vec()), texts(), texts(), texts(), timestamps(), texts()).prop_map(
        |(kind, id, summary, actor, time, traceparent)| Cause { kind, id, summary, actor, time, traceparent },
    )
}

fn update_policies() -> impl Strategy<Value = UpdatePolicy> {
    let mode = || select(vec![Mode::Auto, Mode::Approve, Mode::Never]);
    (mode(), mode(), mode(), millis()).prop_map(|(definition, packages, unhealthy, debounce)| UpdatePolicy {
        definition,
        packages,
        unhealthy,
        debounce,
    })
}

fn revisions() -> impl Strategy<Value = Revision> {
    let image = (
        (digests(), digests(), digests()),
        run_specs(),
        update_policies(),
        (servers(), any::<u64>()).prop_map(|(server, number)| BuildId { server, number }),
        texts(),
        btree_map(texts(), texts(), 0..3),
        causes(),
    )
        .prop_map(
            |((definition_digest, image_digest, run_digest), run, update, build, commit, packages, cause)| {
                RevisionContent::Image(Box::new(ImageRevision {
                    definition_digest,
                    image_digest,
                    run_digest,
                    run,
                    update,
                    build,
                    commit,
                    packages,
                    cause,
                }))
            },
        );
    let content = prop_oneof![image, causes().prop_map(|cause| RevisionContent::Removed { cause })];
    (servers(), any::<u64>(), content, timestamps())
        .prop_map(|(server, generation, content, created)| Revision { server, generation, content, created })
}

fn signals() -> impl Strategy<Value = Signal> {
    let instance = (servers(), any::<u64>(), any::<u32>(), any::<u64>())
        .prop_map(|(server, release, ordinal, attempt)| InstanceId { server, release, ordinal, attempt });
    (
        (digests(), servers(), select(CauseKind::ALL.to_vec()), texts()),
        select(vec![Remedy::Rebuild, Remedy::Replace]),
        vec(texts(), 0..3),
        option::of(instance),
        select(vec![SignalState::Open, SignalState::Waiting, SignalState::Resolved]),
        (timestamps(), timestamps()),
        (texts(), texts()),
    )
        .prop_map(
            |(
                (id, server, cause, fingerprint),
                remedy,
                evidence,
                instance,
                state,
                times,
                (reporter, trace),
            )| {
                Signal {
                    id: SignalId(id),
                    server,
                    cause,
                    fingerprint,
                    remedy,
                    evidence,
                    instance,
                    state,
                    since: times.0,
                    raised: times.1,
                    reporter,
                    traceparent: trace,
                }
            },
        )
}

/// Through the wire's bytes as well, so that a field which prost would not write shows.
fn comes_back<P, M>(value: M) -> Result<(), TestCaseError>
where
    P: prost::Message + Default + From<M>,
    M: TryFrom<P, Error = Invalid> + Clone + PartialEq + Debug,
{
    let bytes = P::from(value.clone()).encode_to_vec();
    let message = P::decode(bytes.as_slice()).map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert_eq!(M::try_from(message), Ok(value));
    Ok(())
}

proptest! {
    #[test]
    fn a_check_comes_back(value in checks()) {
        comes_back::<types::Check, _>(value)?;
    }

    #[test]
    fn a_check_result_comes_back(value in (any::<bool>(), texts(), millis(), timestamps())
        .prop_map(|(passed, detail, took, time)| CheckResult { passed, detail, took, time })) {
        comes_back::<types::CheckResult, _>(value)?;
    }

    #[test]
    fn a_run_spec_comes_back(value in run_specs()) {
        comes_back::<types::RunSpec, _>(value)?;
    }

    #[test]
    fn an_update_policy_comes_back(value in update_policies()) {
        comes_back::<types::UpdatePolicy, _>(value)?;
    }

    #[test]
    fn a_cause_comes_back(value in causes()) {
        comes_back::<types::Cause, _>(value)?;
    }

    #[test]
    fn a_revision_comes_back(value in revisions()) {
        comes_back::<types::Revision, _>(value)?;
    }

    #[test]
    fn a_signal_comes_back(value in signals()) {
        comes_back::<types::Signal, _>(value)?;
    }

    #[test]
    fn a_timestamp_comes_back(value in timestamps()) {
        prop_assert_eq!(from_timestamp("time", Some(to_timestamp(value))), Ok(value));
    }

    /// Whatever bytes decode, the conversion answers and does not panic.
    #[test]
    fn any_message_is_taken_or_refused(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(message) = <types::Revision as prost::Message>::decode(bytes.as_slice()) {
            let _ = Revision::try_from(message);
        }
        if let Ok(message) = <types::Signal as prost::Message>::decode(bytes.as_slice()) {
            let _ = Signal::try_from(message);
        }
    }
}

#[test]
fn every_health_state_comes_back() {
    for state in [HealthState::Starting, HealthState::Healthy, HealthState::Unhealthy, HealthState::Gone] {
        let number = types::HealthState::from(state) as i32;
        assert_eq!(enumeration::<types::HealthState, HealthState>("state", number), Ok(state));
    }
}

#[test]
fn an_unknown_or_unspecified_enum_value_names_its_field() {
    let policy = types::UpdatePolicy { definition: 1, packages: 9, unhealthy: 1, debounce: None };
    let invalid = UpdatePolicy::try_from(policy).expect_err("9 is no mode");
    assert_eq!(invalid.to_string(), "packages: has the value 9, which this version does not know");

    let policy = types::UpdatePolicy { packages: 0, ..policy };
    assert_eq!(UpdatePolicy::try_from(policy), Err(Invalid::new("packages", "is missing")));
}

#[test]
fn a_wrong_nested_field_is_named_by_its_path() {
    let health = types::HealthPolicy {
        check: Some(types::Check { kind: Some(types::check::Kind::Tcp(types::TcpCheck { port: 70_000 })) }),
        ..types::HealthPolicy::default()
    };
    let run = types::RunSpec { health: Some(health), ..types::RunSpec::default() };
    assert_eq!(
        RunSpec::try_from(run),
        Err(Invalid::new("health.check.tcp.port", "is 70000, wanted a port from 1 to 65535"))
    );
    assert_eq!(RunSpec::try_from(types::RunSpec::default()), Err(Invalid::new("rollout", "is missing")));
    let wrong_name = types::Revision {
        server: "../web".to_owned(),
        removed: true,
        cause: Some(types::Cause {
            kind: "manual".to_owned(),
            time: Some(prost_types::Timestamp::default()),
            ..types::Cause::default()
        }),
        ..types::Revision::default()
    };
    assert_eq!(Revision::try_from(wrong_name).map_err(|invalid| invalid.field), Err("server".to_owned()));
}

#[test]
fn a_rollout_that_could_never_move_is_refused() {
    let policy = types::RolloutPolicy {
        strategy: Some(types::rollout_policy::Strategy::Rolling(types::RollingPolicy::default())),
        ..types::RolloutPolicy::default()
    };
    assert_eq!(RolloutPolicy::try_from(policy).map_err(|invalid| invalid.field), Err("rolling".to_owned()));
}

#[test]
fn durations_and_times_are_checked() {
    let duration = |seconds, nanos| Some(prost_types::Duration { seconds, nanos });
    assert_eq!(from_duration("soak", duration(1, 500_999_999)), Ok(Millis(1500)));
    for wrong in [None, duration(-1, 0), duration(0, -1), duration(i64::MAX, 0)] {
        assert_eq!(from_duration("soak", wrong).map_err(|invalid| invalid.field), Err("soak".to_owned()));
    }
    let time = |seconds, nanos| Some(prost_types::Timestamp { seconds, nanos });
    assert_eq!(from_timestamp("time", time(-1, 1)).map(|time| time.as_nanosecond()), Ok(-999_999_999));
    for wrong in [None, time(i64::MAX, 0), time(0, -1), time(0, 1_000_000_000)] {
        assert_eq!(from_timestamp("time", wrong).map_err(|invalid| invalid.field), Err("time".to_owned()));
    }
    assert_eq!(from_optional_timestamp("ended", None), Ok(None));
}

#[test]
fn a_page_has_a_size_within_bounds() {
    let wanted = |page_size| {
        ListRequest::try_from(Some(types::ListOptions { page_size, ..types::ListOptions::default() }))
            .map(|request| request.page_size)
    };
    assert_eq!(ListRequest::try_from(None).map(|request| request.page_size), Ok(100));
    assert_eq!(wanted(0), Ok(100));
    assert_eq!(wanted(500), Ok(500));
    assert_eq!(wanted(501), Err(Invalid::new("options.page_size", "is 501, wanted at most 500")));
}
