//! Workers: how many builds at once, and what becomes of a place whose worker is gone.

use kiln_api::builder::builder_service_server::BuilderService as _;
use kiln_api::builder::{BuildRequest, CancelBuildRequest};
use kiln_builder_core::build::{Build, State};
use kiln_service::access::from_local;
use kiln_store::Store as _;

use super::world::{Bakes, World, yaml};

fn is_running(state: &State) -> bool {
    matches!(state, State::Running { .. })
}

async fn three_builds(world: &World) {
    for name in ["a", "b", "c"] {
        world.apply(&format!("apply-{name}"), &yaml(name, name, 1)).await.unwrap();
    }
}

async fn cancel(world: &World, build: &str) {
    let request = CancelBuildRequest { request_id: format!("cancel-{build}"), build: build.into() };
    world.api().cancel_build(from_local("me", request)).await.unwrap();
}

#[tokio::test]
async fn two_places_run_two_of_three_builds_and_a_cancelled_one_frees_its_place() {
    let world = World::new().await;
    world.bakery.then(Bakes::Never);
    three_builds(&world).await;
    world
        .running(async {
            let running = world.until_builds("two of three running", |builds| {
                let running: Vec<_> = builds.iter().filter(|build| is_running(&build.state)).collect();
                let ids: Vec<_> = running.iter().map(|build| build.id.to_string()).collect();
                (builds.len() == 3 && ids.len() == 2).then_some(ids)
            });
            let running = running.await;
            // A worker that took a third would have done so in the same turn as the second.
            world.builder.logs.writer(&running[0].parse().unwrap()).line("still two");
            let builds = world.builds().await;
            let waiting = builds.iter().find(|build| !is_running(&build.state)).unwrap();
            assert!(matches!(waiting.state, State::Queued { .. }), "{:?}", waiting.state);
            let waiting = waiting.id.to_string();

            cancel(&world, &running[0]).await;
            world.until_build(&waiting, is_running).await;
            world.until_build(&running[0], |state| matches!(state, State::Cancelled { .. })).await;
            world.until_build(&running[1], is_running).await;
        })
        .await;
    // All that is left ends.
    world.bakery.then(Bakes::Well);
    world
        .running(async {
            let ended = |builds: &[Build]| builds.iter().all(|build| build.state.has_ended()).then_some(());
            world.until_builds("all ended", ended).await;
        })
        .await;
    let succeeded = world.builds().await;
    let succeeded = succeeded.iter().filter(|build| matches!(build.state, State::Succeeded { .. }));
    assert_eq!(succeeded.count(), 2);
}

#[tokio::test]
async fn a_security_update_overtakes_builds_that_wait() {
    let world = World::new().await;
    world.apply("apply-web", &yaml("web", "one", 1)).await.unwrap();
    world.running(world.revision("web", 1)).await;
    world.bakery.then(Bakes::Never);
    three_builds(&world).await;
    world
        .running(async {
            let both_places = |builds: &[Build]| {
                let running = builds.iter().filter(|build| is_running(&build.state));
                let running: Vec<_> = running.map(|build| build.id.to_string()).collect();
                (running.len() == 2).then_some(running)
            };
            let running = world.until_builds("both places are taken", both_places).await;
            world.bakery.security_update("nginx", "2");
            world.apply("change-web", &yaml("web", "two", 1)).await.unwrap();
            let queued = |state: &State| matches!(state, State::Queued { .. });
            world.until_build("web-b2", queued).await;
            cancel(&world, &running[0]).await;
            world.until_build("web-b2", is_running).await;
            let waiting = world.builds().await.into_iter().filter(|build| queued(&build.state)).count();
            assert_eq!(waiting, 1, "the one that came before it");
        })
        .await;
}

#[tokio::test]
async fn the_third_of_three_builds_follows_when_one_of_two_ends() {
    let world = World::new().await;
    three_builds(&world).await;
    world
        .running(async {
            for name in ["a", "b", "c"] {
                world.revision(name, 1).await;
            }
        })
        .await;
}

#[tokio::test]
async fn a_worker_that_panics_gives_its_build_and_its_place_back() {
    let world = World::new().await;
    world.bakery.then(Bakes::Panics);
    three_builds(&world).await;
    world
        .running(async {
            world
                .until_builds("three interrupted", |builds| {
                    let interrupted = builds.iter().filter(|build| build.interruptions > 0);
                    (interrupted.count() == 3).then_some(())
                })
                .await;
            world.bakery.then(Bakes::Well);
            for name in ["a", "b", "c"] {
                world.revision(name, 1).await;
            }
        })
        .await;
    let mut log = world.builder.logs.reader(&"a-b1".parse().unwrap());
    assert!(log.lines().await.unwrap().iter().any(|line| line.contains("a defect of Kiln")));
}

#[tokio::test]
async fn a_stop_in_order_is_no_interruption() {
    let world = World::new().await;
    world.bakery.then(Bakes::Never);
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    for _ in 0..6 {
        world.until_stopped(world.until_build("web-b1", is_running)).await;
        let build = world.builds().await.remove(0);
        assert!(matches!(build.state, State::Queued { .. }), "{:?}", build.state);
        assert_eq!((build.interruptions, build.attempts), (0, 0));
    }
    world.bakery.then(Bakes::Well);
    world.running(world.revision("web", 1)).await;
}

#[tokio::test]
async fn a_verification_compares_with_the_image_in_force_or_says_that_it_could_not() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world.running(world.revision("web", 1)).await;
    // Its slot is free, as after a restore: what is in force is there all the same.
    let build = world.builds().await.remove(0);
    let slot = world.builder.documents.slot_holder(&build.lock_key).await.unwrap().unwrap();
    let mut edit = crate::store::Edit::new(world.builder.now());
    edit.free_slot(slot.version, &build);
    world.builder.documents.store().commit(edit.finish()).await.unwrap();
    let verify = |id: &str| BuildRequest {
        request_id: id.into(),
        server: "web".into(),
        verify: true,
        ..BuildRequest::default()
    };
    world.build(verify("v1")).await.unwrap();
    world.running(world.until_build("web-b2", |state| matches!(state, State::Succeeded { .. }))).await;

    world.bakery.then(Bakes::Otherwise);
    world.build(verify("v2")).await.unwrap();
    world.running(world.until_build("web-b3", |state| matches!(state, State::Failed))).await;
    let build = world.builds().await.remove(2);
    assert!(build.problem.contains("the same lock gave"), "{}", build.problem);
}
