//! How many builds a minute one, two and four builders get done that share a store in PostgreSQL, where each build takes a
//! second: what sharing costs, and nothing else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use kiln_api::builder::builder_service_server::BuilderService as _;
use kiln_api::builder::{ApplyRequest, BuildState, FolderSource, ListBuildsRequest, apply_request};
use kiln_builder::bake::{BakeError, BakeRun, BakedImage, Resolution, ResolveRequest};
use kiln_builder::bakery::Bakery;
use kiln_builder::builder::Builder;
use kiln_builder::collect::Collector;
use kiln_builder::context::Contexts;
use kiln_builder::describe::{About, Provenance};
use kiln_builder::grpc::Api;
use kiln_builder::image_tests::{TestFault, TestRun, Tester};
use kiln_builder::logs::Logs;
use kiln_builder::reconcile;
use kiln_builder::repositories::Mirrors;
use kiln_builder::sources::Sources;
use kiln_builder::store::Documents;
use kiln_builder::workers::{self, WorkerOptions};
use kiln_builder_core::build::TestResult;
use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_model::lock::{BUILDER_FORMAT, Lock, LockedBase};
use kiln_model::revision::PackageVersions;
use kiln_service::access::Caller;
use kiln_service::clock::SystemClock;
use kiln_service::config::Signing;
use kiln_service::members::{Member, Members};
use kiln_service::requests::new_id;
use kiln_store::{Database, Place, SqlStore};
use kiln_test_postgres::Server;
use kiln_tests::Result;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Request;

use crate::median;

const ROUNDS: usize = 3;
const BUILDERS: [usize; 3] = [1, 2, 4];
/// Whole turns of all places of all builders.
const BUILDS: usize = 96;
/// Builds at once of one builder.
const WORKERS: usize = 2;
const A_BUILD: Duration = Duration::from_secs(1);
/// Of four builders to one; four times as many at best.
const LEAST_RATIO: f64 = 3.5;
const LIMIT: Duration = Duration::from_secs(300);

/// Bakes nothing, in a second.
#[derive(Clone)]
struct Pretender;

#[async_trait]
impl Bakery for Pretender {
    async fn resolve(&self, request: ResolveRequest<'_>) -> std::result::Result<Resolution, BakeError> {
        let image = &request.definition.image;
        let lock = Lock {
            format: BUILDER_FORMAT,
            architecture: "amd64".to_owned(),
            base: LockedBase::Scratch,
            steps: Vec::new(),
            env: image.env.clone(),
            user: image.user.clone(),
            command: image.command.clone(),
            timestamp: request.timestamp,
        };
        Ok(Resolution { lock, security: PackageVersions::new(), release_files: None })
    }

    async fn bake(&self, _: &Lock, run: BakeRun) -> std::result::Result<BakedImage, BakeError> {
        tokio::time::sleep(A_BUILD).await;
        let digest = Digest::of(run.build.to_string().as_bytes());
        Ok(BakedImage { digest, layers: Vec::new(), steps: Vec::new() })
    }

    async fn sign(&self, _: Digest, _: &Provenance) -> std::result::Result<String, BakeError> {
        Ok("key".to_owned())
    }

    async fn describe(&self, _: Digest, _: &About) -> std::result::Result<(), BakeError> {
        Ok(())
    }

    async fn share(&self, _: Digest) -> std::result::Result<bool, BakeError> {
        Ok(false)
    }
}

#[derive(Clone)]
struct NoTests;

#[async_trait]
impl Tester for NoTests {
    async fn test(&self, _: TestRun<'_>) -> std::result::Result<Vec<TestResult>, TestFault> {
        Ok(Vec::new())
    }
}

pub(crate) async fn run() -> Result<serde_json::Value> {
    let server = Server::start(&[])?;
    let mut taken: [Vec<Duration>; BUILDERS.len()] = Default::default();
    for round in 0..ROUNDS {
        for (builders, taken) in BUILDERS.into_iter().zip(&mut taken) {
            let url = server.database(&format!("round_{round}_of_{builders}"))?;
            let took = once(&url, builders).await?;
            eprintln!("{builders} builders: {BUILDS} builds in {:.3} s", took.as_secs_f64());
            taken.push(took);
        }
    }
    let per_minute = taken.each_ref().map(|taken| (BUILDS as f64 * 60.0 / median(taken)).round());
    let [one, two, four] = per_minute;
    Ok(serde_json::json!({
        "name": "replicas",
        "builds_per_minute": { "1": one, "2": two, "4": four },
        "ratio": (four / one * 100.0).round() / 100.0,
        "least_ratio": LEAST_RATIO,
        "rounds": ROUNDS,
    }))
}

/// From the start of the builders to the end of the last build.
async fn once(url: &str, count: usize) -> Result<Duration> {
    let folder = tempfile::tempdir()?;
    let mut builders = Vec::new();
    for number in 0..count {
        builders.push(builder(url, &folder.path().join(number.to_string())).await?);
    }
    let first = builders.first().ok_or("there is no builder")?.clone();
    let signing = Signing::with_one_key("signing.key".into(), "signing.pub".into());
    let images = ImageStore::open(&folder.path().join("images"))?;
    let (_, never_heard) = watch::channel(None);
    let collector = Collector::new(first.clone(), images.clone(), never_heard, A_BUILD);
    let api = Api::new(first, images, signing, collector);
    let source = Some(apply_request::Source::Folder(servers()?));
    let mut request = Request::new(ApplyRequest { request_id: new_id(), source });
    request.extensions_mut().insert(Caller::local("bench", 0));
    api.apply(request).await?;

    let (stop, stopped) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let began = Instant::now();
    for builder in builders {
        let me = Member { id: new_id(), address: String::new() };
        let store = builder.documents.store().clone();
        let (members, heart) = Members::join(store, builder.clock, me).await?;
        tasks.spawn(heart.run(stopped.clone()));
        tasks.spawn(reconcile::run(builder.clone(), members.clone(), stopped.clone()));
        let options = WorkerOptions { members, workers: WORKERS };
        tasks.spawn(workers::run(builder, NoTests, options, stopped.clone()));
    }
    loop {
        let listed = api.list_builds(Request::new(ListBuildsRequest::default())).await?.into_inner().builds;
        let done = listed.iter().filter(|build| build.state() == BuildState::Succeeded).count();
        if done == BUILDS {
            break;
        }
        if listed.len() > BUILDS || began.elapsed() > LIMIT {
            return Err(format!("{} builds, {done} done after {:?}", listed.len(), began.elapsed()).into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let took = began.elapsed();
    stop.send_replace(true);
    while tasks.join_next().await.is_some() {}
    Ok(took)
}

async fn builder(url: &str, folder: &std::path::Path) -> Result<Builder<SqlStore, Pretender, SystemClock>> {
    std::fs::create_dir_all(folder)?;
    let seen = folder.join("store.seen");
    let database = Database { url: url.parse()?, schema: "kiln_builder".to_owned(), password: None, seen };
    let documents = Documents::new(SqlStore::open(&Place::Postgres(database)).await?);
    let contexts = Contexts::new(folder.join("contexts"));
    let mirrors = Arc::new(Mirrors::new(folder.join("sources"), None));
    Ok(Builder {
        sources: Sources::new(documents.clone(), contexts, mirrors),
        documents,
        bakery: Pretender,
        logs: Logs::open(folder.join("logs"))?,
        clock: SystemClock::new(),
    })
}

/// As many servers as builds, no two with the same image.
fn servers() -> Result<FolderSource> {
    let mut tar = tar::Builder::new(Vec::new());
    for number in 0..BUILDS {
        let yaml = format!(
            "apiVersion: kiln/v1\nname: server-{number}\nimage:\n  from: scratch\n  env: {{ N: \"{number}\" }}\n  command: [/run]\n"
        );
        let mut header = tar::Header::new_gnu();
        header.set_size(yaml.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("server-{number}/server.yaml"), yaml.as_bytes())?;
    }
    Ok(FolderSource { archive: tar.into_inner()?, origin: "bench".to_owned() })
}
