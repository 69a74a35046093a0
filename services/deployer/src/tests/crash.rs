//! Killed after any step, the next process goes on where it was, and nothing is left over.

use std::time::Duration;

use futures::StreamExt as _;

use super::*;
use crate::tests::world::{Behaviour, run_spec};

/// Fast enough for a process that finds its work by asking alone.
const OFTEN: Duration = Duration::from_millis(20);

/// A first release, a second one, and one that fails. The process dies after `step`; another one takes over. Gives
/// whether it came to that.
async fn live_through(step: u64) -> bool {
    let site = Site::new().await;
    site.world.behave("bad", Behaviour::Exits);
    let life = Life::of(step);
    site.boot(&life, OFTEN);
    // Whoever runs when the first one died.
    let mut death = life.death();
    let after = async {
        let died = death.wait_for(|dead| *dead).await.is_ok();
        site.boot(&Life::long(), OFTEN);
        std::future::pending::<()>().await;
        died
    };
    let story = async {
        site.world.revise(revision(1, "first", "one", run_spec()));
        site.until_at(1).await;
        site.world.revise(revision(2, "second", "two", run_spec()));
        site.until_at(2).await;
        site.world.revise(revision(3, "third", "bad", run_spec()));
        site.until("the third release", || async { site.loaded().await.fleet.next_release == 4 }).await;
        site.until_at(2).await;
        // What was committed is told in the end, once.
        site.until("the events", || async { site.store.unsent(1).await.unwrap().is_empty() }).await;
    };
    tokio::select! {
        _ = after => {}
        () = story => {}
    }
    let fleet = site.loaded().await.fleet;
    assert_eq!(fleet.quarantine.len(), 1, "step {step}");
    assert_eq!((fleet.release, fleet.last_good), (2, 2), "step {step}");
    site.assert_tidy().await;
    for (kind, times) in
        [("release.created", 3), ("rollout.started", 3), ("rollout.succeeded", 2), ("rollout.rolled_back", 1)]
    {
        assert_eq!(site.count(kind), times, "{kind} after a kill at step {step}: {:?}", site.told());
    }
    *life.death().borrow()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_after_any_step_changes_nothing() {
    let mut killed = 0;
    let runs = futures::stream::iter(1..).map(live_through);
    let mut runs = Box::pin(runs.buffered(16));
    while runs.next().await == Some(true) {
        killed += 1;
    }
    assert!(killed > 40, "the story has only {killed} steps");
}
