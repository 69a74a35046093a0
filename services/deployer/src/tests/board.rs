//! What the monitor and the node say, in whatever order it comes.

use kiln_api::convert::{to_duration, to_timestamp};
use kiln_api::{engine, monitor, types};
use kiln_deployer_core::{Backend, Listener, SeenState, View};
use kiln_model::name::NodeName;
use kiln_model::signal::HealthState;
use kiln_model::time::{Millis, Now};

use super::*;
use crate::Listing;
use crate::board::{Board, How};

const ID: &str = "web-r1-0-a1";

/// The monitor said that an instance is in a state, at a document's version and a second of its clock; gives what is
/// known then, and how old it is a second later. Each time is a minute after the one before, by the steady clock.
fn hear(
    board: &Board,
    minute: u64,
    how: How,
    version: u64,
    second: i64,
    state: HealthState,
) -> (HealthState, Duration) {
    // This machine's clock is the monitor's.
    hear_at(board, minute, second, how, version, second, state)
}

/// The same, where this machine's clock shows `wall`.
fn hear_at(
    board: &Board,
    minute: u64,
    wall: i64,
    how: How,
    version: u64,
    second: i64,
    state: HealthState,
) -> (HealthState, Duration) {
    let at = Duration::from_secs(60 * minute);
    let health = monitor::Health {
        instance: ID.to_owned(),
        server: "web".to_owned(),
        release: 1,
        state: types::HealthState::from(state).into(),
        observed: Some(to_timestamp(Timestamp::from_second(second).unwrap())),
        version,
        ..monitor::Health::default()
    };
    let now = |monotonic| Now { wall: Timestamp::from_second(wall).unwrap(), monotonic };
    board.health(health, how, now(at)).unwrap();
    let later = now(at + Duration::from_secs(1));
    let view = view(board, &[], later);
    let told = &view.health[&ID.parse::<InstanceId>().unwrap()];
    (told.state, told.age)
}

#[test]
fn the_version_says_what_is_newer_and_not_a_clock_that_was_set_back() {
    use HealthState::{Healthy, Unhealthy};
    let board = Board::default();
    let second = Duration::from_secs(1);
    assert_eq!(hear(&board, 1, How::Asked, 2, 5000, Healthy), (Healthy, second));
    // The clock is set back: a change, and a look that changed nothing.
    assert_eq!(hear(&board, 2, How::Event, 3, 1000, Unhealthy), (Unhealthy, second));
    assert_eq!(hear(&board, 3, How::Asked, 3, 900, Unhealthy), (Unhealthy, second));
    // What was on its way for long.
    assert_eq!(hear(&board, 4, How::Event, 2, 5000, Healthy).0, Unhealthy);
    assert_eq!(hear(&board, 5, How::Asked, 2, 800, Healthy).0, Unhealthy);
    // The monitor's store is new.
    assert_eq!(hear(&board, 6, How::Asked, 1, 2000, Healthy), (Healthy, second));
}

#[test]
fn what_is_heard_again_does_not_grow_younger() {
    use HealthState::Healthy;
    let board = Board::default();
    let age =
        |minute, wall, observed| hear_at(&board, minute, wall, How::Asked, 1, observed, Healthy).1.as_secs();
    assert_eq!(age(1, 5000, 5000), 1);
    assert_eq!(age(2, 5060, 5000), 61);
    // The clock is set back.
    assert_eq!(age(3, 100, 5000), 121);
    // The next look.
    assert_eq!(age(4, 160, 158), 3);
}

#[test]
fn what_is_of_a_time_to_come_ended_now_or_was_well_nobody_knows_when() {
    use HealthState::{Healthy, Unhealthy};
    let board = Board::default();
    let age =
        |minute, second, state| hear_at(&board, minute, 100, How::Event, minute, second, state).1.as_secs();
    assert!(age(1, 5000, Healthy) > 100 * 365 * 24 * 3600);
    assert_eq!(age(2, 5001, Unhealthy), 1);
}

#[test]
fn a_replica_that_tells_of_before_the_clock_was_set_back_is_not_the_newest() {
    let board = Board::default();
    let tell = |second, observed, age| {
        let now = Now { wall: Timestamp::from_second(100).unwrap(), monotonic: Duration::from_secs(second) };
        let health = monitor::Health {
            instance: ID.to_owned(),
            state: types::HealthState::Healthy.into(),
            observed: Some(to_timestamp(Timestamp::from_second(observed).unwrap())),
            version: 1,
            age: Some(to_duration(Millis::from_secs(age))),
            ..monitor::Health::default()
        };
        board.health(health, How::Asked, now).unwrap();
        view(&board, &[], now).health[&ID.parse::<InstanceId>().unwrap()].age.as_secs()
    };
    // Before the first of them, the clock showed 5000 and more.
    assert_eq!(tell(1000, 95, 5), 5);
    assert_eq!(tell(1001, 5000, 30), 6, "what is known is newer");
    assert_eq!(tell(1002, 5003, 2), 2);
}

fn instance(state: engine::InstanceState, version: u64) -> engine::Instance {
    let id: InstanceId = ID.parse().unwrap();
    engine::Instance {
        spec: Some(engine::InstanceSpec {
            id: id.to_string(),
            server: id.server.to_string(),
            release: id.release,
            ordinal: id.ordinal,
            attempt: id.attempt,
            ..engine::InstanceSpec::default()
        }),
        state: state.into(),
        version,
        ..engine::Instance::default()
    }
}

#[test]
fn what_the_node_lists_counts_although_its_store_was_restored_and_what_came_since_it_was_asked_counts_more() {
    let board = Board::default();
    let second = Duration::from_secs;
    let list = |state, version, asked, answered| {
        let listing = Listing { instances: vec![instance(state, version)], routes: Vec::new() };
        board.listing(&node("local"), listing, second(asked), second(answered));
        let view = view(&board, &["local"], now(second(answered)));
        view.engine.unwrap().get(&ID.parse().unwrap()).unwrap().state
    };
    assert_eq!(list(engine::InstanceState::Exited, 7, 1, 2), SeenState::Exited);
    assert_eq!(list(engine::InstanceState::Launching, 3, 5, 6), SeenState::Launching, "it counts anew");
    board.engine(&node("local"), instance(engine::InstanceState::Exited, 4), second(9)).unwrap();
    assert_eq!(list(engine::InstanceState::Launching, 3, 8, 10), SeenState::Exited, "the watch was faster");
}

fn now(monotonic: Duration) -> Now {
    Now { wall: Timestamp::UNIX_EPOCH, monotonic }
}

#[test]
fn what_the_node_lists_on_the_edge_is_known_until_it_lists_anew() {
    let board = Board::default();
    let backend = |instance: &str| engine::Backend { instance: instance.to_owned(), target: 80 };
    let listener = engine::Listener { listen: 8080, backends: vec![backend(ID), backend("none of ours")] };
    let route = engine::Route { server: "web".to_owned(), generation: 4, listeners: vec![listener] };
    let listed = |routes| {
        let listing = Listing { instances: Vec::new(), routes };
        board.listing(&node("local"), listing, Duration::ZERO, Duration::ZERO);
        let view = view(&board, &["local"], now(Duration::ZERO));
        (view.routed.into_values().next(), view.edge)
    };
    let backends = vec![Backend { instance: ID.parse().unwrap(), target: 80 }];
    assert_eq!(listed(vec![route]), (Some(4), vec![Listener { listen: 8080, backends }]));
    assert_eq!(listed(Vec::new()), (None, Vec::new()));
}

fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn view(board: &Board, nodes: &[&str], now: Now) -> View {
    let nodes = nodes.iter().map(|name| node(name)).collect();
    board.view(&"web".parse().unwrap(), &nodes, now, Duration::ZERO, Duration::ZERO)
}

#[test]
fn what_one_node_says_is_nothing_that_another_said() {
    let board = Board::default();
    let second = Duration::from_secs;
    let routes =
        |generation| vec![engine::Route { server: "web".to_owned(), generation, ..Default::default() }];
    let here = vec![instance(engine::InstanceState::Exited, 1)];
    board.listing(&node("local"), Listing { instances: here, routes: routes(3) }, second(1), second(2));
    board.listing(
        &node("edge-2"),
        Listing { instances: Vec::new(), routes: routes(5) },
        second(3),
        second(4),
    );
    let all = view(&board, &["local", "edge-2"], now(second(5)));
    assert_eq!(all.engine.unwrap().len(), 1);
    assert_eq!(all.routed, [(node("edge-2"), 5), (node("local"), 3)].into());
    // One that is away keeps those waiting that have something there, and nobody else.
    board.node_away(&node("edge-2"));
    assert!(view(&board, &["local"], now(second(6))).engine.is_some());
    assert!(view(&board, &["local", "edge-2"], now(second(6))).engine.is_none());
}
