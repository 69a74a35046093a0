//! Calls whose answer was lost: the same call gets the same answer, whatever the world has become.

use kiln_api::builder::BuildRequest;
use kiln_builder_core::build::State;

use super::world::{Bakes, World, yaml};

#[tokio::test]
async fn a_build_that_is_asked_for_again_is_the_one_that_is_under_way() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world.running(world.revision("web", 1)).await;
    world.bakery.package("nginx", "2");
    world.bakery.then(Bakes::Never);
    let build = || BuildRequest { request_id: "b1".into(), server: "web".into(), ..BuildRequest::default() };
    let first = world.build(build()).await.unwrap();
    world.running(world.until_build("web-b2", |state| matches!(state, State::Running { .. }))).await;
    let resolved = world.bakery.resolved();
    let again = world.build(build()).await.unwrap();
    assert_eq!(again, first);
    assert_eq!(world.bakery.resolved(), resolved, "nothing is asked of the archives");
}

#[tokio::test]
async fn an_apply_that_comes_again_is_answered_with_git_away() {
    let world = World::new().await;
    let repository = world.repository();
    repository.commit(&[("web/server.yaml", &yaml("web", "a", 3))]);
    world.apply_git("r1", &repository).await.unwrap();
    repository.goes_away();
    world.apply_git("r1", &repository).await.unwrap();
    let refused = world.apply_git("r2", &repository).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused}");
}
