//! Image tests against an engine that is made up: the instance is retired whatever becomes of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_api::engine::engine_service_server::{EngineService, EngineServiceServer};
use kiln_api::engine::{
    CheckRequest, CheckResponse, Instance, InstanceState, LaunchRequest, LaunchResponse,
    ListInstancesRequest, ListInstancesResponse, LogsRequest, LogsResponse, RetireRequest, RetireResponse,
    RouteRequest, RouteResponse, VerifyRequest, VerifyResponse, WatchInstancesRequest,
    WatchInstancesResponse,
};
use kiln_api::types;
use kiln_model::digest::Digest;
use kiln_model::name::BuildId;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::world::{Bakes, World, yaml};
use crate::image_tests::{EngineTester, TestFault, TestRun, Tester as _};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answers {
    Passed,
    Failed,
    /// The call does not come back.
    Never,
    Away,
}

#[derive(Clone)]
struct FakeEngine {
    instances: Arc<Mutex<BTreeMap<String, Instance>>>,
    check: Arc<Mutex<Answers>>,
    /// What an instance is when it was launched.
    launched: Arc<Mutex<InstanceState>>,
}

type Stream<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

#[tonic::async_trait]
impl EngineService for FakeEngine {
    async fn launch(&self, request: Request<LaunchRequest>) -> Result<Response<LaunchResponse>, Status> {
        let spec = request.into_inner().spec.unwrap();
        let id = spec.id.clone();
        let state = *self.launched.lock().unwrap();
        let instance = Instance {
            spec: Some(spec),
            state: state.into(),
            exit_code: (state == InstanceState::Exited).then_some(3),
            detail: "no such file".to_owned(),
            ..Instance::default()
        };
        self.instances.lock().unwrap().insert(id, instance.clone());
        Ok(Response::new(LaunchResponse { instance: Some(instance) }))
    }

    async fn retire(&self, request: Request<RetireRequest>) -> Result<Response<RetireResponse>, Status> {
        let id = request.into_inner().id;
        if let Some(instance) = self.instances.lock().unwrap().get_mut(&id) {
            instance.set_state(InstanceState::Retired);
        }
        Ok(Response::new(RetireResponse::default()))
    }

    async fn route(&self, _: Request<RouteRequest>) -> Result<Response<RouteResponse>, Status> {
        Err(Status::unimplemented("no test routes"))
    }

    async fn list_instances(
        &self,
        request: Request<ListInstancesRequest>,
    ) -> Result<Response<ListInstancesResponse>, Status> {
        let server = request.into_inner().server;
        let is_wanted = |instance: &&Instance| {
            server.is_empty() || instance.spec.as_ref().is_some_and(|spec| spec.server == server)
        };
        let instances = self.instances.lock().unwrap();
        let instances = instances.values().filter(is_wanted).cloned().collect();
        Ok(Response::new(ListInstancesResponse { instances, ..ListInstancesResponse::default() }))
    }

    type WatchInstancesStream = Stream<WatchInstancesResponse>;

    async fn watch_instances(
        &self,
        _: Request<WatchInstancesRequest>,
    ) -> Result<Response<Self::WatchInstancesStream>, Status> {
        Err(Status::unimplemented("no test watches"))
    }

    async fn check(&self, _: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let answers = *self.check.lock().unwrap();
        let result = |passed, detail: &str| types::CheckResult {
            passed,
            detail: detail.to_owned(),
            ..types::CheckResult::default()
        };
        match answers {
            Answers::Passed => Ok(Response::new(CheckResponse { result: Some(result(true, "connected")) })),
            Answers::Failed => Ok(Response::new(CheckResponse { result: Some(result(false, "refused")) })),
            Answers::Never => std::future::pending().await,
            Answers::Away => Err(Status::unavailable("the node is away")),
        }
    }

    async fn verify(&self, _: Request<VerifyRequest>) -> Result<Response<VerifyResponse>, Status> {
        Err(Status::unimplemented("no test verifies"))
    }

    type LogsStream = Stream<LogsResponse>;

    async fn logs(&self, _: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let (stream, line) = ("stderr".to_owned(), b"bind: permission denied".to_vec());
        let line = LogsResponse { time: None, stream, line };
        Ok(Response::new(tokio_stream::iter(vec![Ok(line)])))
    }
}

struct Bench {
    world: World,
    engine: FakeEngine,
    tester: EngineTester,
    _folder: tempfile::TempDir,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("node.sock");
        let engine = FakeEngine {
            instances: Arc::default(),
            check: Arc::new(Mutex::new(Answers::Passed)),
            launched: Arc::new(Mutex::new(InstanceState::Running)),
        };
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        let service = EngineServiceServer::new(engine.clone());
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        let tester = EngineTester::local(kiln_service::client::channel(&socket));
        Self { world: World::new().await, engine, tester, _folder: folder }
    }

    fn answers(&self, answers: Answers) {
        *self.engine.check.lock().unwrap() = answers;
    }

    async fn test(
        &self,
        test: &str,
        attempt: u64,
        cancel: &CancellationToken,
    ) -> Result<Vec<(String, bool, String)>, TestFault> {
        let text = yaml("web", "a", 1).replace("run:\n", &format!("  tests: [{test}]\nrun:\n"));
        let definition = kiln_model::definition::parse(text.as_bytes(), "server.yaml").unwrap();
        let build: BuildId = "web-b1".parse().unwrap();
        let run = TestRun {
            build: &build,
            attempt,
            image: Digest::of(b"image"),
            definition: &definition,
            log: self.world.builder.logs.writer(&build),
            cancel: cancel.clone(),
            traceparent: String::new(),
        };
        let results = self.tester.test(run).await?;
        Ok(results.into_iter().map(|result| (result.name, result.passed, result.detail)).collect())
    }

    fn states(&self) -> Vec<(String, InstanceState)> {
        let instances = self.engine.instances.lock().unwrap();
        instances.iter().map(|(id, instance)| (id.clone(), instance.state())).collect()
    }

    async fn log(&self) -> Vec<String> {
        self.world.builder.logs.reader(&"web-b1".parse().unwrap()).lines().await.unwrap()
    }
}

fn retired(id: &str) -> Vec<(String, InstanceState)> {
    vec![(id.to_owned(), InstanceState::Retired)]
}

const TCP: &str = "{ tcp: { port: 80 } }";
const FILE: &str = "{ file: { path: /etc/motd } }";

#[tokio::test]
async fn a_check_that_passes_and_one_that_fails_both_end_the_instance() {
    let bench = Bench::new().await;
    let never = CancellationToken::new();
    let results = bench.test(TCP, 1, &never).await.unwrap();
    assert_eq!(results, [("tcp :80".to_owned(), true, "connected".to_owned())]);
    assert_eq!(bench.states(), retired("web-r0-1-a1"));

    bench.answers(Answers::Failed);
    let results = bench.test(FILE, 2, &never).await.unwrap();
    assert_eq!(results, [("file /etc/motd".to_owned(), false, "refused".to_owned())]);
    assert!(bench.states().iter().all(|(_, state)| *state == InstanceState::Retired));
    let log = bench.log().await;
    assert!(log.iter().any(|line| line.ends_with("stderr: bind: permission denied")), "{log:?}");
}

#[tokio::test]
async fn an_instance_that_exits_fails_its_check_at_once_and_says_how() {
    let bench = Bench::new().await;
    bench.answers(Answers::Failed);
    *bench.engine.launched.lock().unwrap() = InstanceState::Exited;
    let never = CancellationToken::new();
    let tested = bench.test(TCP, 1, &never);
    // Long before the half minute that an image gets to come up.
    let results = tokio::time::timeout(Duration::from_secs(20), tested).await.unwrap().unwrap();
    assert_eq!(results[0].2, "refused; the instance ended with exit code 3");
    assert_eq!(bench.states(), retired("web-r0-1-a1"));
}

#[tokio::test]
async fn a_cancelled_test_and_one_whose_engine_is_away_leave_no_instance() {
    let bench = Bench::new().await;
    bench.answers(Answers::Never);
    let cancel = CancellationToken::new();
    let stopping = async {
        while bench.states().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel.cancel();
    };
    let (tested, ()) = tokio::join!(bench.test(TCP, 1, &cancel), stopping);
    assert!(tested.unwrap_err().transient);
    assert_eq!(bench.states(), retired("web-r0-1-a1"));

    bench.answers(Answers::Away);
    let fault = bench.test(TCP, 2, &CancellationToken::new()).await.unwrap_err();
    assert!(fault.transient && fault.problem.contains("the node is away"), "{fault:?}");
    assert!(bench.states().iter().all(|(_, state)| *state == InstanceState::Retired));
}

#[tokio::test]
async fn an_instance_that_can_not_be_launched_is_the_images_fault_the_third_time() {
    let bench = Bench::new().await;
    *bench.engine.launched.lock().unwrap() = InstanceState::Failed;
    for (attempt, transient) in [(1, true), (2, true), (3, false)] {
        let fault = bench.test(TCP, attempt, &CancellationToken::new()).await.unwrap_err();
        assert_eq!(fault.transient, transient, "{fault:?}");
        assert!(fault.problem.contains("no such file"), "{fault:?}");
    }
    assert!(bench.states().iter().all(|(_, state)| *state == InstanceState::Retired));
}

#[tokio::test]
async fn what_a_killed_builder_left_is_retired_and_what_runs_is_not() {
    let bench = Bench::new().await;
    let world = &bench.world;
    world.bakery.then(Bakes::Never);
    world.apply("r1", &yaml("web", "a", 1)).await.unwrap();
    let running =
        world.until_build("web-b1", |state| matches!(state, kiln_builder_core::build::State::Running { .. }));
    // Killed in the middle: the build is still said to run, with token 1.
    world.running(running).await;
    let put = |id: &str, role: types::Role| {
        let parsed: kiln_model::name::InstanceId = id.parse().unwrap();
        let spec = kiln_api::engine::InstanceSpec {
            id: id.to_owned(),
            server: parsed.server.to_string(),
            role: role.into(),
            ..Default::default()
        };
        let instance =
            Instance { spec: Some(spec), state: InstanceState::Running.into(), ..Instance::default() };
        bench.engine.instances.lock().unwrap().insert(id.to_owned(), instance);
    };
    put("web-r0-1-a1", types::Role::Test);
    put("web-r0-0-a1", types::Role::Test);
    put("gone-r0-1-a7", types::Role::Test);
    put("web-r3-0-a1", types::Role::Fleet);
    assert_eq!(bench.tester.retire_leftovers(&world.builder).await, Ok(2));
    let running: Vec<_> =
        bench.states().into_iter().filter(|(_, state)| *state == InstanceState::Running).collect();
    assert_eq!(running.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["web-r0-1-a1", "web-r3-0-a1"]);

    // The next process takes the build up anew.
    crate::workers::recover(&world.builder, &kiln_service::members::Members::alone("the next"))
        .await
        .unwrap();
    assert_eq!(bench.tester.retire_leftovers(&world.builder).await, Ok(1));
    assert_eq!(bench.tester.retire_leftovers(&world.builder).await, Ok(0));
}
