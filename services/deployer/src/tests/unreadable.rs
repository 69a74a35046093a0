//! Events that no service of this version sends.

use kiln_api::monitor;

use super::*;
use crate::tests::world::run_spec;

#[tokio::test]
async fn events_that_can_not_be_read_are_put_aside_with_words_and_hold_nothing_up() {
    let site = Site::new().await;
    site.boot(&Life::long(), NEVER);
    let good = revision(1, "first", "one", run_spec());
    let with = |change: fn(&mut types::Revision)| {
        let mut revision = good.clone();
        change(&mut revision);
        events::RevisionCreated { revision: Some(revision) }.encode_to_vec()
    };
    // Groups of a field that nobody knows, each in the one before.
    let nested = |depth: usize| [with(|_| ()), vec![0x7b; depth], vec![0x7c; depth]].concat();
    let mut signal = gone(&"web-r1-0-a1".parse().unwrap());
    signal.remedy = 77;
    let health = monitor::Health {
        instance: "web-r1-0-a1".to_owned(),
        server: "web".to_owned(),
        release: 1,
        state: 77,
        observed: Some(kiln_api::convert::to_timestamp(Timestamp::now())),
        ..monitor::Health::default()
    };
    let (signal, health) = (Some(signal), Some(health));
    let strange = [
        (Service::Builder, "revision", "created", nested(101), "recursion limit"),
        (Service::Builder, "revision", "created", nested(100_000), "recursion limit"),
        (Service::Builder, "revision", "created", vec![1 << 3 | 2, 4, 1 << 3 | 2, 2, 0xff, 0xfe], "UTF-8"),
        (Service::Builder, "revision", "created", with(|it| it.server = "web\n".to_owned()), "server"),
        (
            Service::Builder,
            "revision",
            "created",
            with(|it| it.update.as_mut().unwrap().packages = 77),
            "update.packages",
        ),
        (
            Service::Monitor,
            "server",
            "needs_update",
            events::NeedsUpdate { signal }.encode_to_vec(),
            "remedy",
        ),
        (Service::Monitor, "instance", "healthy", events::HealthChanged { health }.encode_to_vec(), "state"),
    ];
    for (number, (service, entity, verb, payload, _)) in (0..).zip(&strange) {
        let id = format!("strange {number}");
        site.tell(*service, entity, verb, &id, number, payload.clone()).await;
    }
    site.tell_revision(&good).await;
    site.until_at(1).await;
    site.until("all are put aside", || async { site.bus.dead_letters().len() == strange.len() }).await;
    let letters = site.bus.dead_letters();
    for (_, _, _, payload, words) in &strange {
        let letter = letters.iter().find(|letter| letter.payload == *payload);
        let reason = &letter.expect("it is put aside").reason;
        assert!(reason.contains(words), "{words}: {reason}");
    }
}
