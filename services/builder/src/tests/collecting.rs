//! Holding images, and removing those that nobody needs.

use std::time::Duration;

use jiff::Timestamp;
use kiln_api::builder::builder_service_server::BuilderService as _;
use kiln_api::builder::{ApplyOutcome, BuildRequest, GetImageRequest, HoldRequest};
use kiln_builder_core::build::State;
use kiln_model::digest::Digest;
use kiln_model::revision::RevisionContent;
use kiln_service::access::from_local;
use kiln_store::Store as _;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use super::world::{World, yaml};
use crate::collect::How;
use crate::store::{Edit, IMAGE_KIND, Read, StoredImage};

/// An image as it was made two days ago.
async fn old_image(world: &World, text: &str) -> Digest {
    let digest = Digest::of(text.as_bytes());
    let stored = StoredImage {
        digest,
        server: "web".parse().unwrap(),
        lock_key: digest,
        build: "web-b9".parse().unwrap(),
        key_id: "key".to_owned(),
        packages: std::collections::BTreeMap::new(),
        created: long_ago(world),
    };
    let known = world.builder.documents.image(&digest).await.unwrap().map_or(0, |read| read.version);
    let mut edit = Edit::new(world.builder.now());
    edit.put_image(known, &stored).unwrap();
    world.builder.documents.store().commit(edit.finish()).await.unwrap();
    digest
}

fn long_ago(world: &World) -> Timestamp {
    world.builder.now().checked_sub(Duration::from_secs(2 * 24 * 3600)).unwrap()
}

async fn hold(world: &World, holder: &str, id: &str, images: &[Digest]) -> Result<(), Status> {
    let request = HoldRequest {
        request_id: id.to_owned(),
        holder: holder.to_owned(),
        image_digests: images.iter().map(ToString::to_string).collect(),
    };
    world.api().hold(from_local("deployer", request)).await.map(drop)
}

async fn is_there(world: &World, image: &Digest) -> bool {
    world.builder.documents.image(image).await.unwrap().is_some()
}

async fn collect(world: &World) -> u64 {
    let heard = Some(world.builder.now());
    world.builder.collect(&world.images(), heard, How::Remove).await.unwrap().count
}

#[tokio::test]
async fn what_nobody_holds_goes_and_every_holder_counts() {
    let world = World::new().await;
    let mut held = Vec::new();
    // More holders than one page of a listing has.
    for number in 0..510 {
        let image = old_image(&world, &format!("image {number}")).await;
        hold(&world, &format!("deployer/s{number:03}"), &format!("h{number}"), &[image]).await.unwrap();
        held.push(image);
    }
    let free = old_image(&world, "nobody's").await;
    let silent = world.builder.collect(&world.images(), None, How::Remove).await.unwrap();
    assert_eq!(silent.count, 0, "the deployer is silent");
    let looked_at = world.builder.collect(&world.images(), Some(world.builder.now()), How::Look).await;
    assert_eq!(looked_at.unwrap().count, 1);
    assert!(is_there(&world, &free).await);
    assert_eq!(collect(&world).await, 1);
    assert!(!is_there(&world, &free).await);
    for image in &held {
        assert!(is_there(&world, image).await, "{image}");
    }
    // Let go of, it goes too.
    hold(&world, "deployer/s509", "let-go", &[]).await.unwrap();
    assert_eq!(collect(&world).await, 1);
    assert!(!is_there(&world, &held[509]).await);
}

#[tokio::test]
async fn an_unknown_image_can_not_be_held_and_costs_nobody_the_others() {
    let world = World::new().await;
    let known = old_image(&world, "known").await;
    let unknown = Digest::of(b"unknown");
    let refused = hold(&world, "deployer/web", "h1", &[known, unknown]).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    let details = refused.get_error_details();
    assert_eq!(details.resource_info().unwrap().resource_name, unknown.to_string());
    assert_eq!(collect(&world).await, 0, "the known one is held");

    let request = GetImageRequest { image: unknown.to_string() };
    let refused = world.api().get_image(Request::new(request)).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused}");
    assert_eq!(refused.get_error_details().resource_info().unwrap().resource_name, unknown.to_string());
}

/// Both orders of a removal and what comes to need the image meanwhile: one of the two is refused.
#[tokio::test]
async fn an_image_that_is_needed_meanwhile_is_not_removed() {
    let world = World::new().await;
    let image = old_image(&world, "image").await;
    let found = world.builder.documents.image(&image).await.unwrap().unwrap();
    // Held after the collector found it free.
    hold(&world, "deployer/web", "h1", &[image]).await.unwrap();
    let refused = world.builder.forget_image(&found).await.unwrap_err();
    assert!(refused.is_conflict(), "{refused}");

    // And removed after somebody decided to need it.
    let mut late = Edit::new(world.builder.now());
    world.builder.need(&mut late, &image).await.unwrap();
    let found = world.builder.documents.image(&image).await.unwrap().unwrap();
    world.builder.forget_image(&found).await.unwrap();
    let refused = world.builder.documents.store().commit(late.finish()).await.unwrap_err();
    assert!(matches!(refused, kiln_store::Error::Conflict { .. }), "{refused}");
    let gone = world.builder.need(&mut Edit::new(world.builder.now()), &image).await.unwrap_err();
    assert!(gone.is_conflict() && gone.to_string().contains("was removed"), "{gone}");
}

#[tokio::test]
async fn an_image_that_comes_into_force_again_writes_its_document_and_stays() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    let first = world.running(world.revision("web", 1)).await;
    let RevisionContent::Image(first) = first.content else { panic!("a removal") };
    assert_eq!(world.apply("r2", &yaml("web", "b", 3)).await.unwrap(), ApplyOutcome::Changed);
    world.running(world.revision("web", 2)).await;
    // The collector looks now, and the older image is nobody's.
    let found = world.builder.documents.image(&first.image_digest).await.unwrap().unwrap();
    world.apply("r3", &yaml("web", "a", 3)).await.unwrap();
    let third = world.running(world.revision("web", 3)).await;
    let RevisionContent::Image(third) = third.content else { panic!("a removal") };
    assert_eq!(third.image_digest, first.image_digest);
    let refused = world.builder.forget_image(&found).await.unwrap_err();
    assert!(refused.is_conflict(), "{refused}");
}

/// It is in nobody's hands yet, and was made long ago, by a build whose tests failed.
#[tokio::test]
async fn an_image_that_a_build_comes_to_again_stays_while_it_is_tested() {
    let world = World::new().await;
    world.tester.fail("not yet");
    world.apply("r1", &yaml("web", "a", 1)).await.unwrap();
    let failed = async {
        world.until_build("web-b1", |state| *state == State::Failed).await;
        world.until_server("web", |server| server.building.is_none()).await;
    };
    world.running(failed).await;
    let all: Vec<Read<StoredImage>> = world.builder.documents.all(IMAGE_KIND, "").await.unwrap();
    let [Read { version, value }] = all.as_slice() else { panic!("{all:?}") };
    let image = value.digest;
    let mut edit = Edit::new(world.builder.now());
    edit.put_image(*version, &StoredImage { created: long_ago(&world), ..value.clone() }).unwrap();
    world.builder.documents.store().commit(edit.finish()).await.unwrap();

    let gate = world.tester.pass_by_a_gate();
    let again = BuildRequest { request_id: "b1".into(), server: "web".into(), ..BuildRequest::default() };
    let build = world.build(again).await.unwrap().build.unwrap().id;
    let tested = async {
        gate.reached.acquire().await.unwrap().forget();
        assert_eq!(collect(&world).await, 0);
        assert!(is_there(&world, &image).await);
        gate.open.add_permits(1);
        world.until_build(&build, |state| matches!(state, State::Succeeded { .. })).await;
    };
    world.running(tested).await;
}

#[tokio::test]
async fn a_lock_whose_image_was_removed_is_built_anew() {
    let world = World::new().await;
    world.apply("r1", &yaml("web", "a", 3)).await.unwrap();
    let first = world.running(world.revision("web", 1)).await;
    let RevisionContent::Image(first) = first.content else { panic!("a removal") };
    world.apply("r2", &yaml("web", "b", 3)).await.unwrap();
    world.running(world.revision("web", 2)).await;
    let mut read = world.builder.documents.image(&first.image_digest).await.unwrap().unwrap();
    read.value.created = long_ago(&world);
    let mut edit = Edit::new(world.builder.now());
    edit.put_image(read.version, &read.value).unwrap();
    world.builder.documents.store().commit(edit.finish()).await.unwrap();
    assert_eq!(collect(&world).await, 1);
    world.apply("r3", &yaml("web", "a", 3)).await.unwrap();
    world.running(world.revision("web", 3)).await;
    assert_eq!(world.builds().await.len(), 3);
    assert!(is_there(&world, &first.image_digest).await);
}

#[tokio::test]
async fn what_may_be_launched_is_in_the_registry_also_when_that_came_later() {
    let world = World::new().await;
    let [held, forgotten, elsewhere] =
        ["held", "forgotten", "elsewhere"].map(|text| Digest::of(text.as_bytes()));
    for text in ["held", "forgotten", "elsewhere"] {
        old_image(&world, text).await;
    }
    hold(&world, "deployer/web", "h1", &[held, elsewhere]).await.unwrap();
    let images = world.images();
    for (text, digest) in [("held", held), ("forgotten", forgotten)] {
        images.put_blob(&mut text.as_bytes(), Some(&digest)).unwrap();
    }
    crate::share_needed(&world.builder, &images).await.unwrap();
    assert_eq!(world.bakery.shared(), []);
    world.bakery.has_a_registry();
    crate::share_needed(&world.builder, &images).await.unwrap();
    assert_eq!(world.bakery.shared(), [held], "what lies with another builder is that one's to share");
}
