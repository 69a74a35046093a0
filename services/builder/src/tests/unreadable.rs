//! Events that no monitor of this version sends.

use std::sync::Arc;

use kiln_api::{events, types};
use kiln_bus::{Handled, Handler as _};
use kiln_model::cause::CauseKind;
use kiln_model::digest::Digest;
use kiln_model::event::{Event, EventType, NewEvent, Service};
use prost::Message as _;

use super::world::World;
use crate::events::EventHandler;

fn needs_update(payload: Vec<u8>) -> Event {
    let event = NewEvent {
        kind: EventType::new(Service::Monitor, "server", "needs_update"),
        server: Some("web".parse().unwrap()),
        aggregate_kind: "signal".to_owned(),
        aggregate_id: "s1".to_owned(),
        aggregate_version: 1,
        payload,
        time: "2026-01-02T03:04:05Z".parse().unwrap(),
        traceparent: String::new(),
    };
    Event { id: Digest::of(&event.payload), sequence: 1, epoch: "monitor-1".to_owned(), event }
}

#[tokio::test]
async fn a_signal_that_can_not_be_read_is_refused_with_words_and_leaves_nothing() {
    let world = World::new().await;
    let handler = EventHandler::new(world.builder.clone(), Arc::default());
    let signal: types::Signal = world.signal("web", CauseKind::Reported, "1").into();
    let with = |change: fn(&mut types::Signal)| {
        let mut signal = types::Signal { version: 1, ..signal.clone() };
        change(&mut signal);
        events::NeedsUpdate { signal: Some(signal) }.encode_to_vec()
    };
    // Groups of a field that nobody knows, each in the one before.
    let nested = |depth: usize| [with(|_| ()), vec![0x7b; depth], vec![0x7c; depth]].concat();
    for (what, payload, words) in [
        ("nested deeper than 100", nested(101), "recursion limit"),
        ("nested a hundred thousand deep", nested(100_000), "recursion limit"),
        ("not UTF-8", vec![1 << 3 | 2, 4, 1 << 3 | 2, 2, 0xff, 0xfe], "UTF-8"),
        ("cut off", vec![1 << 3 | 2, 100, b'x'], "no NeedsUpdate"),
        ("an unknown remedy", with(|signal| signal.remedy = 77), "remedy"),
        ("an unknown state", with(|signal| signal.state = -1), "state"),
        ("an unknown cause", with(|signal| signal.cause = "reported\n".to_owned()), "cause"),
        ("a server with a line end", with(|signal| signal.server = "web\r\n".to_owned()), "server"),
    ] {
        let handled = handler.handle(&needs_update(payload), 1).await;
        let Handled::Failed(why) = handled else { panic!("{what}: {handled:?}") };
        assert!(why.contains(words), "{what}: {why}");
    }
    assert_eq!(world.events().await, [""; 0]);
    // What a later version may send is read over.
    assert!(matches!(handler.handle(&needs_update(nested(90)), 1).await, Handled::Done));
}
