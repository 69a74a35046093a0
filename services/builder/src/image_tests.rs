//! An image's tests: a throwaway instance, and checks in the words of server-spec tools. The instance is retired
//! whatever becomes of them.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use kiln_api::convert::to_duration;
use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_api::engine::{
    CheckRequest, InstanceSpec, InstanceState, ListInstancesRequest, LogsRequest, RetireRequest,
};
use kiln_api::{engine, types};
use kiln_builder_core::build::{Build, State, TestResult};
use kiln_model::check::Check;
use kiln_model::definition::Definition;
use kiln_model::digest::Digest;
use kiln_model::name::{BuildId, InstanceId, NodeName};
use kiln_model::time::Millis;
use kiln_service::client::Channel;
use kiln_service::clock::Clock;
use kiln_service::{error, requests};
use kiln_store::Store;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use crate::bakery::Bakery;
use crate::builder::Builder;
use crate::logs::Writer;

/// How long an image gets to come up where its definition does not say.
const START: Duration = Duration::from_secs(30);
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two tries of a check.
const PAUSE: Duration = Duration::from_millis(200);
const CALL: Duration = Duration::from_secs(60);
/// Attempts of a build whose instance could not be launched.
const LAUNCHES: u64 = 3;
/// Of the instance, after a test failed.
const LOG_LINES: u32 = 20;

/// One build's tests.
#[derive(Debug)]
pub struct TestRun<'a> {
    pub build: &'a BuildId,
    /// Grows with each claim of the build: an instance's id is never used twice.
    pub attempt: u64,
    pub image: Digest,
    pub definition: &'a Definition,
    pub log: Writer,
    pub cancel: CancellationToken,
    pub traceparent: String,
}

/// Why tests could not be run at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestFault {
    pub problem: String,
    pub transient: bool,
}

#[async_trait]
pub trait Tester: Clone + Send + Sync + 'static {
    /// Every test of the definition with what it came to.
    async fn test(&self, run: TestRun<'_>) -> Result<Vec<TestResult>, TestFault>;
}

/// Tests on the engine that a server is to run on.
#[derive(Debug, Clone)]
pub struct EngineTester {
    nodes: BTreeMap<NodeName, EngineServiceClient<Channel>>,
}

impl EngineTester {
    pub fn new(nodes: BTreeMap<NodeName, Channel>) -> Self {
        let clients = nodes.into_iter().map(|(name, channel)| (name, EngineServiceClient::new(channel)));
        Self { nodes: clients.collect() }
    }

    /// On the node that every site has.
    pub fn local(channel: Channel) -> Self {
        Self::new(BTreeMap::from([(NodeName::local(), channel)]))
    }

    /// Retires test instances that no running build owns, and says how many those were: a build whose process was killed
    /// leaves one, and may never come to its tests again.
    ///
    /// # Errors
    /// In words, where the engine or the store is away.
    pub async fn retire_leftovers<S: Store, K: Bakery, C: Clock>(
        &self,
        builder: &Builder<S, K, C>,
    ) -> Result<usize, String> {
        let mut retired = 0;
        let mut away = Vec::new();
        for (node, client) in &self.nodes {
            match retire_leftovers_of(client, builder).await {
                Ok(count) => retired += count,
                Err(problem) => away.push(format!("node {node}: {problem}")),
            }
        }
        if away.is_empty() { Ok(retired) } else { Err(away.join("; ")) }
    }
}

async fn retire_leftovers_of<S: Store, K: Bakery, C: Clock>(
    client: &EngineServiceClient<Channel>,
    builder: &Builder<S, K, C>,
) -> Result<usize, String> {
    // Instances first: one that is launched after this look is not in it, and its build runs at the later one.
    let instances = test_instances(client).await.map_err(|fault| fault.problem)?;
    let mut retired = 0;
    for id in instances {
        let build = BuildId { server: id.server.clone(), number: id.attempt };
        let build = match builder.documents.build(&build).await {
            Ok(build) => build.map(|read| read.value),
            Err(error) => {
                tracing::error!(instance = %id, %error, "its build can't be read, and it stays");
                continue;
            }
        };
        let owns = |build: &Build| {
            matches!(build.state, State::Running { .. }) && build.token == u64::from(id.ordinal)
        };
        if !build.as_ref().is_some_and(owns) {
            tracing::warn!(instance = %id, "is left over from a build that does not run, and is retired");
            let mut instance = Instance { client: client.clone(), id };
            instance.retire().await.map_err(|fault| fault.problem)?;
            retired += 1;
        }
    }
    Ok(retired)
}

/// Those of image tests that are there.
async fn test_instances(client: &EngineServiceClient<Channel>) -> Result<Vec<InstanceId>, TestFault> {
    let mut found = Vec::new();
    let mut token = String::new();
    loop {
        let request = ListInstancesRequest { server: String::new(), page_size: 500, page_token: token };
        let page = client.clone().list_instances(call(request)).await;
        let page = page.map_err(|status| fault("listing instances", &status))?.into_inner();
        let is_there = |instance: &engine::Instance| {
            !matches!(instance.state(), InstanceState::Retiring | InstanceState::Retired)
        };
        let specs = page.instances.into_iter().filter(is_there).filter_map(|instance| instance.spec);
        let tests = specs.filter(|spec| spec.role() == types::Role::Test);
        found.extend(tests.filter_map(|spec| spec.id.parse().ok()));
        if page.next_page_token.is_empty() {
            return Ok(found);
        }
        token = page.next_page_token;
    }
}

fn fault(what: &str, status: &Status) -> TestFault {
    let transient = matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Cancelled
            | Code::ResourceExhausted
            | Code::Unknown
    );
    TestFault { problem: format!("{what}: {}", error::describe(status)), transient }
}

fn call<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL);
    request
}

#[async_trait]
impl Tester for EngineTester {
    async fn test(&self, run: TestRun<'_>) -> Result<Vec<TestResult>, TestFault> {
        if run.definition.image.tests.is_empty() {
            run.log.line("no tests are defined");
            return Ok(Vec::new());
        }
        let node = run.definition.run.node();
        let client = self.nodes.get(&node).ok_or_else(|| TestFault {
            problem: format!("there is no node `{node}` under `[nodes]` in site.toml"),
            transient: false,
        })?;
        let mut instance = Instance { client: client.clone(), id: instance_id(&run, run.attempt) };
        // An attempt that was cut off left its instance.
        for earlier in 1..run.attempt {
            Instance { client: client.clone(), id: instance_id(&run, earlier) }.retire().await?;
        }
        run.log.line(&format!("testing in {}", instance.id));
        let tested = tokio::select! {
            biased;
            tested = instance.test(&run) => tested,
            () = run.cancel.cancelled() => {
                Err(TestFault { problem: "the build was cancelled".to_owned(), transient: true })
            }
        };
        if !matches!(&tested, Ok(results) if results.iter().all(|result| result.passed)) {
            instance.show_log(&run.log).await;
        }
        let retired = instance.retire().await;
        let results = tested?;
        // An instance that is left over is found by the next attempt, so it must come to one.
        retired?;
        Ok(results)
    }
}

fn instance_id(run: &TestRun<'_>, attempt: u64) -> InstanceId {
    InstanceId {
        server: run.build.server.clone(),
        release: 0,
        ordinal: u32::try_from(attempt).unwrap_or(u32::MAX),
        attempt: run.build.number,
    }
}

struct Instance {
    client: EngineServiceClient<Channel>,
    id: InstanceId,
}

impl Instance {
    async fn test(&mut self, run: &TestRun<'_>) -> Result<Vec<TestResult>, TestFault> {
        self.launch(run).await?;
        let start =
            run.definition.run.health.as_ref().map_or(START, |health| health.start.as_duration().max(START));
        let deadline = Instant::now() + start;
        let mut results = Vec::new();
        // What must not be in the log is looked for when the others have had the instance do something.
        let (last, first): (Vec<_>, Vec<_>) =
            run.definition.image.tests.iter().partition(|check| check.is_of_the_whole_log());
        for check in first.into_iter().chain(last) {
            let name = name(check);
            let began = Instant::now();
            let result = self.check(check, deadline).await?;
            let word = if result.passed { "passed" } else { "FAILED" };
            run.log.line(&format!("test {name}: {word}: {}", result.detail));
            let took = Millis::from(began.elapsed());
            results.push(TestResult { name, passed: result.passed, detail: result.detail, took });
        }
        Ok(results)
    }

    async fn launch(&mut self, run: &TestRun<'_>) -> Result<(), TestFault> {
        let mut spec = run.definition.run.clone();
        // Nobody is sent to it: it answers on its own address alone.
        spec.ports.clear();
        spec.replicas = 1;
        spec.health = None;
        let InstanceId { server, release, ordinal, attempt } = &self.id;
        let spec = InstanceSpec {
            id: self.id.to_string(),
            server: server.to_string(),
            release: *release,
            ordinal: *ordinal,
            attempt: *attempt,
            role: types::Role::Test.into(),
            image_digest: run.image.to_string(),
            run: Some(spec.into()),
        };
        let request = engine::LaunchRequest {
            request_id: requests::new_id(),
            spec: Some(spec),
            generation: 0,
            traceparent: run.traceparent.clone(),
        };
        let launched = self.client.launch(call(request)).await;
        let launched = launched.map_err(|status| fault("launching the instance", &status))?.into_inner();
        let instance = launched.instance.unwrap_or_default();
        match instance.state() {
            InstanceState::Failed => {
                // The image may be at fault, or the machine at this moment: the machine gets a second and a third chance.
                let problem = format!("the instance could not be launched: {}", instance.detail);
                Err(TestFault { problem, transient: run.attempt < LAUNCHES })
            }
            _ => Ok(()),
        }
    }

    /// Tries a check until it passes, the time to come up is over, or the instance has ended.
    async fn check(&mut self, check: &Check, deadline: Instant) -> Result<types::CheckResult, TestFault> {
        loop {
            let request = CheckRequest {
                id: self.id.to_string(),
                check: Some(check.clone().into()),
                timeout: Some(to_duration(Millis::from(CHECK_TIMEOUT))),
            };
            let answer = self.client.check(call(request)).await;
            let answer = answer.map_err(|status| fault("checking the instance", &status))?.into_inner();
            let mut result = answer.result.unwrap_or_default();
            if result.passed || !check.comes_up() || Instant::now() >= deadline {
                return Ok(result);
            }
            if let Some(ended) = self.ended().await? {
                result.detail = format!("{}; the instance {ended}", result.detail);
                return Ok(result);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// How the instance ended, if it did.
    async fn ended(&mut self) -> Result<Option<String>, TestFault> {
        let mut token = String::new();
        loop {
            let server = self.id.server.to_string();
            let request = ListInstancesRequest { server, page_size: 500, page_token: token };
            let page = self.client.list_instances(call(request)).await;
            let page = page.map_err(|status| fault("looking at the instance", &status))?.into_inner();
            let id = self.id.to_string();
            let is_it =
                |instance: &&engine::Instance| instance.spec.as_ref().is_some_and(|spec| spec.id == id);
            if let Some(instance) = page.instances.iter().find(is_it) {
                let ended = matches!(instance.state(), InstanceState::Exited | InstanceState::Failed);
                return Ok(ended.then(|| match instance.exit_code {
                    Some(code) => format!("ended with exit code {code}"),
                    None => format!("ended: {}", instance.detail),
                }));
            }
            if page.next_page_token.is_empty() {
                return Ok(None);
            }
            token = page.next_page_token;
        }
    }

    async fn show_log(&mut self, log: &Writer) {
        let request = LogsRequest { id: self.id.to_string(), tail: LOG_LINES, follow: false };
        let Ok(answer) = self.client.logs(call(request)).await else { return };
        let mut lines = answer.into_inner();
        while let Ok(Some(line)) = lines.message().await {
            log.line(&format!("{} {}: {}", self.id, line.stream, String::from_utf8_lossy(&line.line)));
        }
    }

    async fn retire(&mut self) -> Result<(), TestFault> {
        let request = RetireRequest {
            request_id: requests::new_id(),
            id: self.id.to_string(),
            server: self.id.server.to_string(),
            generation: 0,
            drain: Some(to_duration(Millis(0))),
            traceparent: kiln_service::trace::current(),
        };
        match self.client.retire(call(request)).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(fault("retiring the instance", &status)),
        }
    }
}

fn name(check: &Check) -> String {
    match check {
        Check::Http(http) => format!("http :{}{}", http.port, http.path),
        Check::Tcp(tcp) => format!("tcp :{}", tcp.port),
        Check::Command(command) => format!("command {}", command.run.lines().next().unwrap_or_default()),
        Check::File(file) => format!("file {}", file.path),
        Check::Package(package) => format!("package {}", package.name),
        Check::User(user) => format!("user {}", user.name),
        Check::Port(port) => format!("port {}/{}", port.port, port.protocol.as_str()),
        Check::Process(process) => format!("process {}", process.name),
        Check::Log(log) => format!("log {}", log.contains.lines().next().unwrap_or_default()),
    }
}
