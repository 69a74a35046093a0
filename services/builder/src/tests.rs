//! The loops on a real store, with a bakery and tests that are made up: what is committed, what a crash leaves, and what
//! another service's word leads to.

#![expect(clippy::large_futures, reason = "a test's future lives once")]

mod collecting;
mod contended;
mod recorded;
mod replays;
mod testing;
mod unreadable;
mod working;
mod world;

use std::time::Duration;

use jiff::Timestamp;
use kiln_api::builder::builder_service_server::BuilderService as _;
use kiln_api::builder::plan_response::Item;
use kiln_api::builder::{ApplyOutcome, BuildRequest, CancelBuildRequest, PlanRequest, RemoveRequest};
use kiln_api::deployer::{Fleet, Quarantine, Release};
use kiln_builder_core::build::State;
use kiln_model::cause::CauseKind;
use kiln_model::revision::RevisionContent;
use kiln_service::access::from_local;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use self::world::{Bakes, World, yaml};

#[tokio::test]
async fn what_is_applied_is_built_and_released_once() {
    let world = World::new().await;
    assert_eq!(world.apply("r1", &yaml("web", "a", 3)).await.unwrap(), ApplyOutcome::Created);
    world
        .running(async {
            let revision = world.revision("web", 1).await;
            let RevisionContent::Image(image) = revision.content else { panic!("a removal") };
            assert_eq!(image.build.to_string(), "web-b1");
            assert_eq!(image.run.replicas, 3);
            // The same call again, the same content again, and `run` alone.
            assert_eq!(world.apply("r1", &yaml("web", "a", 3)).await.unwrap(), ApplyOutcome::Created);
            assert_eq!(world.apply("r2", &yaml("web", "a", 3)).await.unwrap(), ApplyOutcome::Unchanged);
            assert_eq!(world.apply("r3", &yaml("web", "a", 5)).await.unwrap(), ApplyOutcome::Changed);
            let second = world.revision("web", 2).await;
            let RevisionContent::Image(second) = second.content else { panic!("a removal") };
            assert_eq!((second.image_digest, second.run.replicas), (image.image_digest, 5));
            assert_eq!(world.builds().await.len(), 1);
        })
        .await;
    let verbs = world.events().await;
    assert_eq!(
        verbs,
        [
            "definition.applied",
            "build.queued",
            "build.started",
            "build.succeeded",
            "revision.created",
            "definition.applied",
            "revision.created"
        ]
    );
}

#[tokio::test]
async fn what_was_applied_is_stamped_with_the_same_time_when_the_store_has_forgotten_it() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    let head = world.builder.documents.server(&"web".parse().unwrap()).await.unwrap().unwrap().value.head;
    let folder = world.builder.sources.contexts().folder(&head.digest);
    let long_ago = Timestamp::from_second(1_000_000_000).unwrap();
    std::fs::File::open(folder).unwrap().set_modified(long_ago.into()).unwrap();
    let world = world.without_its_store().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    let context = world.builder.documents.image_context(&head.image_context).await.unwrap().unwrap();
    assert_eq!(context.first_applied, long_ago);
}

#[tokio::test]
async fn the_same_call_id_with_other_content_is_refused() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    let refused = world.apply("r1", &yaml("web", "b", 3)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_faulty_definition_changes_nothing_and_names_its_place() {
    let world = World::new().await;
    let refused = world.apply("r1", "name: web\nreplicas: 3\n").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = refused.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    assert!(
        violations.iter().any(|violation| violation.field.starts_with("web/server.yaml:2:")),
        "{violations:?}"
    );
    assert!(world.server("web").await.is_none());
}

#[tokio::test]
async fn an_impossible_parent_is_refused_where_it_is_named() {
    let world = World::new().await;
    let child = |name: &str, parent: &str| {
        yaml(name, "x", 1).replace("from: scratch", &format!("from:\n    server: {parent}"))
    };
    let refused = world.apply("r1", &child("app", "nowhere")).await.unwrap_err();
    let details = refused.get_error_details();
    let violation = &details.bad_request().unwrap().field_violations[0];
    assert_eq!(violation.field, "web/server.yaml:5:13");
    assert!(violation.description.contains("there is no such server"), "{violation:?}");
    let refused = world.apply("r2", &child("app", "app")).await.unwrap_err();
    let details = refused.get_error_details();
    let violation = &details.bad_request().unwrap().field_violations[0];
    assert_eq!(violation.field, "web/server.yaml:5:13", "{violation:?}");
}

#[tokio::test]
async fn a_build_whose_process_was_killed_is_built_by_the_next_one() {
    let world = World::new().await;
    world.bakery.then(Bakes::Never);
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    // Dropped in the middle of the bake, as by SIGKILL.
    world.running(world.until_build("web-b1", |state| matches!(state, State::Running { .. }))).await;
    world.bakery.then(Bakes::Well);
    world.running(world.revision("web", 1)).await;
    let builds = world.builds().await;
    assert_eq!((builds.len(), builds[0].token), (1, 2));
}

#[tokio::test]
async fn a_running_build_can_be_cancelled_and_its_lock_built_anew() {
    let world = World::new().await;
    world.bakery.then(Bakes::Never);
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world
        .running(async {
            world.until_build("web-b1", |state| matches!(state, State::Running { .. })).await;
            let request = CancelBuildRequest { request_id: "c1".into(), build: "web-b1".into() };
            world.api().cancel_build(from_local("me", request)).await.unwrap();
            world.until_build("web-b1", |state| matches!(state, State::Cancelled { .. })).await;
            world.until_server("web", |server| server.building.is_none()).await;
            assert_eq!(world.server("web").await.unwrap().problem(), "web-b1 was cancelled by me");
            assert!(world.bakery.was_interrupted().await, "the bake was told to stop");

            world.bakery.then(Bakes::Well);
            let request =
                BuildRequest { request_id: "b1".into(), server: "web".into(), ..BuildRequest::default() };
            let answer = world.build(request).await.unwrap();
            assert_eq!(answer.build.unwrap().id, "web-b2");
            world.revision("web", 1).await;
        })
        .await;
}

#[tokio::test]
async fn a_pinned_build_without_changes_builds_nothing() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world.running(world.revision("web", 1)).await;
    world.bakery.package("nginx", "2");
    let pinned =
        BuildRequest { request_id: "b1".into(), server: "web".into(), pinned: true, ..Default::default() };
    let answer = world.build(pinned).await.unwrap();
    assert!(answer.unchanged && answer.build.is_none() && !answer.image_digest.is_empty(), "{answer:?}");

    let plan = PlanRequest { server: "web".into() };
    let items: Vec<_> = world.api().plan(Request::new(plan)).await.unwrap().into_inner().collect().await;
    let Some(Item::Plan(plan)) = items.into_iter().next_back().unwrap().unwrap().item else {
        panic!("the last item is the plan")
    };
    assert!(plan.needs_build && plan.needs_revision);
    assert_eq!((plan.packages[0].from.as_str(), plan.packages[0].to.as_str()), ("1", "2"));
    assert_eq!(world.builds().await.len(), 1, "a plan builds nothing");
}

#[tokio::test]
async fn failing_tests_fail_the_build_for_good_and_a_passing_hiccup_does_not() {
    let world = World::new().await;
    world.bakery.then(Bakes::Away);
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world
        .running(async {
            world.until_failed_once("web-b1").await;
            world.bakery.then(Bakes::Well);
            world.tester.fail("status 502, wanted 200");
            world.until_build("web-b1", |state| matches!(state, State::Failed)).await;
            world.until_server("web", |server| server.building.is_none()).await;
        })
        .await;
    let build = world.builds().await.remove(0);
    assert!(build.attempts >= 2, "{}", build.attempts);
    assert_eq!(build.problem, "1 of 1 tests failed: http: status 502, wanted 200");
    assert!(!build.tests[0].passed);
    assert_eq!(world.server("web").await.unwrap().generation, 0);
}

#[tokio::test]
async fn a_signal_is_followed_once_by_event_and_resync() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world
        .running(async {
            world.revision("web", 1).await;
            world.bakery.package("nginx", "2");
            let signal = world.signal("web", CauseKind::PackageUpdates, "release-file-2");
            for _ in 0..3 {
                world.builder.receive(&signal, "monitor-1", 7).await.unwrap();
            }
            world.peers.signals(vec![(signal.clone(), 7)]);
            world.resync().await.unwrap();
            let revision = world.revision("web", 2).await;
            let RevisionContent::Image(image) = revision.content else { panic!("a removal") };
            assert_eq!((image.cause.id, image.packages["nginx"].as_str()), (signal.id.to_string(), "2"));
            // The monitor still says so: it was followed.
            world.resync().await.unwrap();
            tokio::time::sleep(Duration::from_millis(300)).await;
        })
        .await;
    assert_eq!(world.builds().await.len(), 2);
}

#[tokio::test]
async fn a_signal_that_loses_against_others_every_time_comes_again() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world.running(world.revision("web", 1)).await;
    let signal = world.signal("web", CauseKind::PackageUpdates, "release-file-2");
    world.builder.documents.store().lose(100);
    let lost = world.builder.receive(&signal, "monitor-1", 7).await.unwrap_err();
    assert!(lost.is_conflict() && lost.is_transient(), "{lost}: the bus gives it again");
    world.peers.signals(vec![(signal.clone(), 7)]);
    assert!(world.resync().await.is_err(), "and the resync's cursor stays");
    world.builder.documents.store().lose(0);
    world.builder.receive(&signal, "monitor-1", 7).await.unwrap();
    assert!(world.server("web").await.unwrap().wanted.is_some());
}

#[tokio::test]
async fn a_document_that_can_not_be_read_holds_no_other_back() {
    let world = World::new().await;
    for name in ["web", "db"] {
        world.apply(&format!("apply-{name}"), &yaml(name, name, 1)).await.unwrap();
    }
    world
        .running(async {
            world.revision("web", 1).await;
            world.revision("db", 1).await;
        })
        .await;
    world.damage("server", "db").await;
    world.damage("build", "db-b1").await;
    world.bakery.package("nginx", "2");
    let signals =
        ["db", "web"].map(|name| (world.signal(name, CauseKind::PackageUpdates, "release-file-2"), 7));
    world.peers.signals(signals.to_vec());
    world.resync().await.unwrap();
    world.running(world.revision("web", 2)).await;
}

#[tokio::test]
async fn a_rollback_is_noted_by_the_resync_and_the_good_definition_goes_on() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "good", 3)).await.unwrap();
    world
        .running(async {
            world.revision("web", 1).await;
            world.apply("r2", &yaml("web", "bad", 3)).await.unwrap();
            let bad = world.revision("web", 2).await;
            let good = world.revision("web", 1).await;
            let RevisionContent::Image(image) = bad.content.clone() else { panic!("a removal") };
            let release = |number, revision: kiln_model::revision::Revision| Release {
                server: "web".into(),
                number,
                revision: Some(revision.into()),
                ..Release::default()
            };
            world.peers.releases(vec![release(1, good), release(2, bad)]);
            world.peers.fleets(vec![Fleet {
                server: "web".into(),
                release: 1,
                last_good: 1,
                quarantine: vec![Quarantine {
                    server: "web".into(),
                    release: 2,
                    definition_digest: image.definition_digest.to_string(),
                    reason: "never healthy".into(),
                    ..Quarantine::default()
                }],
                ..Fleet::default()
            }]);
            world.resync().await.unwrap();
            let server = world.server("web").await.unwrap();
            assert!(server.is_quarantined());
            assert_eq!(server.in_force.as_ref().unwrap().generation, 1);

            world.bakery.package("nginx", "2");
            let signal = world.signal("web", CauseKind::PackageUpdates, "release-file-2");
            world.builder.receive(&signal, "monitor-1", 1).await.unwrap();
            let fixed = world.revision("web", 3).await;
            let RevisionContent::Image(fixed) = fixed.content else { panic!("a removal") };
            assert_ne!(fixed.definition_digest, image.definition_digest);
            assert_eq!(fixed.packages["nginx"], "2");
        })
        .await;
}

#[tokio::test]
async fn a_removed_server_ends_its_build_and_comes_back_with_a_higher_generation() {
    let world = World::new().await;
    world.bakery.then(Bakes::Never);
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world
        .running(async {
            world.until_build("web-b1", |state| matches!(state, State::Running { .. })).await;
            let request = RemoveRequest { request_id: "d1".into(), server: "web".into() };
            world.api().remove(from_local("me", request)).await.unwrap();
            world.until_build("web-b1", |state| matches!(state, State::Cancelled { .. })).await;
            assert!(matches!(world.revision("web", 1).await.content, RevisionContent::Removed { .. }));
            world.bakery.then(Bakes::Well);
            assert_eq!(world.apply("r2", &yaml("web", "a", 3)).await.unwrap(), ApplyOutcome::Created);
            assert!(matches!(world.revision("web", 2).await.content, RevisionContent::Image(_)));
        })
        .await;
}

#[tokio::test]
async fn children_follow_their_parents_image() {
    let world = World::new().await;
    world.apply("r1", &yaml("base", "a", 1)).await.unwrap();
    let child = yaml("app", "x", 1).replace("from: scratch", "from: { server: base }");
    world.apply("r2", &child).await.unwrap();
    let request = RemoveRequest { request_id: "d1".into(), server: "base".into() };
    let refused = world.api().remove(from_local("me", request)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    world
        .running(async {
            world.revision("app", 1).await;
            world.apply("r3", &yaml("base", "b", 1)).await.unwrap();
            world.revision("base", 2).await;
            world.revision("app", 2).await;
        })
        .await;
    let image = |server: kiln_builder_core::server::Server| server.in_force.unwrap();
    let (base, app) = (image(world.server("base").await.unwrap()), image(world.server("app").await.unwrap()));
    assert_eq!(app.parent_image, Some(base.image));
    assert_eq!(world.builds().await.len(), 4);
}

#[tokio::test]
async fn a_watcher_gets_the_log_and_the_end() {
    use kiln_api::builder::WatchBuildRequest;
    use kiln_api::builder::watch_build_response::Item;

    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    world
        .running(async {
            world.until_build("web-b1", |_| true).await;
            let request = WatchBuildRequest { build: "web-b1".into() };
            let mut items = world.api().watch_build(Request::new(request)).await.unwrap().into_inner();
            let (mut lines, mut last) = (Vec::new(), None);
            while let Some(item) = items.next().await {
                match item.unwrap().item {
                    Some(Item::Line(line)) => lines.push(line),
                    Some(Item::Build(build)) => last = Some(build),
                    None => {}
                }
            }
            assert!(lines.iter().any(|line| line == "baking"), "{lines:?}");
            assert!(lines.iter().any(|line| line == "resolving packages"), "{lines:?}");
            assert_eq!(last.unwrap().state(), kiln_api::builder::BuildState::Succeeded);
        })
        .await;
}

#[tokio::test]
async fn a_commit_is_taken_over_and_a_deletion_only_noted() {
    let world = World::new().await;
    let repository = world.repository();
    repository.commit(&[("web/server.yaml", &yaml("web", "a", 3)), ("db/server.yaml", &yaml("db", "a", 1))]);
    world.apply_git("r1", &repository).await.unwrap();
    world
        .running(async {
            world.revision("web", 1).await;
            world.revision("db", 1).await;
            repository.commit(&[("web/server.yaml", &yaml("web", "b", 5))]);
            repository.remove("db/server.yaml");
            let inspected = world.inspect(&repository).await;
            assert_eq!(inspected.orphaned, ["db"]);
            let found = &inspected.servers[0];
            assert_ne!(found.definition_digest, found.current_digest);

            let signal = world.signal("web", CauseKind::DefinitionChanged, &found.definition_digest);
            world.builder.receive(&signal, "monitor-1", 1).await.unwrap();
            let RevisionContent::Image(image) = world.revision("web", 2).await.content else {
                panic!("a removal")
            };
            assert_eq!(image.run.replicas, 5, "image and run in one revision");
            assert_eq!(image.commit, inspected.commit);

            // A commit that is no definition leaves the good one in force, and says so.
            repository.commit(&[("web/server.yaml", "name: web\nimage: {}\n")]);
            let inspected = world.inspect(&repository).await;
            assert!(inspected.servers[0].problem.starts_with("web/server.yaml:"), "{inspected:?}");
            let server = world.server("web").await.unwrap();
            assert!(server.problem().starts_with("web/server.yaml:"));
            assert_eq!(server.generation, 2);
        })
        .await;
    let events = world.events().await;
    let count = |verb: &str| events.iter().filter(|event| *event == verb).count();
    assert_eq!((count("definition.orphaned"), count("definition.refused")), (1, 1));
    assert!(!world.server("db").await.unwrap().removed, "nothing is retired by a deletion");
}

#[tokio::test]
async fn a_server_that_moves_to_another_source_says_which_it_left() {
    let world = World::new().await;
    let repository = world.repository();
    let web = yaml("web", "a", 3);
    repository.commit(&[("web/server.yaml", &web)]);
    world.apply_git("r1", &repository).await.unwrap();
    let left = world.left("r2", &web).await.remove(0).and_then(|source| source.git);
    assert_eq!(left.map(|git| git.branch).as_deref(), Some("main"));
    assert_eq!(world.left("r3", &web).await, [None], "it stays where it is");
    assert_eq!(world.left("r4", &yaml("app", "a", 1)).await, [None], "it is new");
}
