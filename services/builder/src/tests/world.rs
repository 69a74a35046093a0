use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kiln_api::builder::apply_request::Source as From;
use kiln_api::builder::builder_service_server::BuilderService as _;
use kiln_api::builder::{
    ApplyOutcome, ApplyRequest, BuildOutcome, BuildRequest, FolderSource, GitSource, InspectSourceRequest,
    InspectSourceResponse, Source, build_response,
};
use kiln_api::deployer::{Fleet, Release};
use kiln_api::types;
use kiln_builder_core::build::{self, Build, State, TestResult};
use kiln_builder_core::server::Server;
use kiln_builder_core::source::Place;
use kiln_image::ImageStore;
use kiln_model::cause::CauseKind;
use kiln_model::digest::Digest;
use kiln_model::lock::{BUILDER_FORMAT, Lock, LockedBase, LockedPackage};
use kiln_model::name::ServerName;
use kiln_model::revision::Revision;
use kiln_model::signal::{Remedy, Signal, SignalId, SignalState};
use kiln_model::time::Millis;
use kiln_service::access::from_local;
use kiln_service::clock::SystemClock;
use kiln_service::config::Signing;
use kiln_service::members::Members;
use kiln_store::{Batch, Change, Store as _};
use tokio::sync::{Semaphore, watch};
use tokio_stream::StreamExt as _;
use tonic::{Request, Status};

use super::contended::Contended;
use crate::bake::{BakeError, BakeRun, BakedImage, ReleaseFile, Resolution, ResolveRequest};
use crate::bakery::Bakery;
use crate::builder::Builder;
use crate::collect::Collector;
use crate::context::Contexts;
use crate::describe::{About, Provenance};
use crate::events::Resync;
use crate::grpc::Api;
use crate::image_tests::{TestFault, TestRun, Tester};
use crate::logs::Logs;
use crate::peers::{Changes, Peers};
use crate::reconcile;
use crate::repositories::Mirrors;
use crate::sources::Sources;
use crate::store::Documents;
use crate::workers::{self, WorkerOptions};

/// Longer than anything here takes on a busy machine; reached only by a failing test.
const LIMIT: Duration = Duration::from_secs(30);

/// A definition whose image depends on `image`, and whose `run` on `replicas`.
pub(crate) fn yaml(name: &str, image: &str, replicas: u32) -> String {
    format!(
        "apiVersion: kiln/v1\nname: {name}\nimage:\n  from: scratch\n  env: {{ IMAGE: {image} }}\n  command: [serve]\nrun:\n  \
         replicas: {replicas}\nupdate:\n  debounce: 50ms\n"
    )
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bakes {
    Well,
    Never,
    /// A defect of Kiln.
    Panics,
    /// Another image than the lock gave before.
    Otherwise,
    /// The archive can't be reached.
    Away,
}

#[derive(Clone)]
pub(crate) struct FakeBakery {
    bakes: watch::Sender<Bakes>,
    packages: Arc<Mutex<BTreeMap<String, String>>>,
    /// What of them is there for security.
    security: Arc<Mutex<BTreeMap<String, String>>>,
    interrupted: watch::Sender<bool>,
    /// Plans that asked the archives.
    resolved: Arc<AtomicUsize>,
    /// What the registry has, where there is one.
    registry: Arc<Mutex<Option<Vec<Digest>>>>,
}

impl FakeBakery {
    fn new() -> Self {
        let packages = BTreeMap::from([("nginx".to_owned(), "1".to_owned())]);
        Self {
            bakes: watch::Sender::new(Bakes::Well),
            packages: Arc::new(Mutex::new(packages)),
            security: Arc::default(),
            interrupted: watch::Sender::new(false),
            resolved: Arc::default(),
            registry: Arc::default(),
        }
    }

    pub(crate) fn has_a_registry(&self) {
        *self.registry.lock().unwrap() = Some(Vec::new());
    }

    pub(crate) fn shared(&self) -> Vec<Digest> {
        self.registry.lock().unwrap().clone().unwrap_or_default()
    }

    pub(crate) fn then(&self, bakes: Bakes) {
        self.bakes.send_replace(bakes);
    }

    pub(crate) fn package(&self, name: &str, version: &str) {
        self.packages.lock().unwrap().insert(name.to_owned(), version.to_owned());
    }

    pub(crate) fn security_update(&self, name: &str, version: &str) {
        self.package(name, version);
        self.security.lock().unwrap().insert(name.to_owned(), version.to_owned());
    }

    pub(crate) fn resolved(&self) -> usize {
        self.resolved.load(Ordering::SeqCst)
    }

    pub(crate) async fn was_interrupted(&self) -> bool {
        let mut interrupted = self.interrupted.subscribe();
        tokio::time::timeout(LIMIT, interrupted.wait_for(|interrupted| *interrupted)).await.is_ok()
    }
}

#[async_trait]
impl Bakery for FakeBakery {
    async fn resolve(&self, request: ResolveRequest<'_>) -> Result<Resolution, BakeError> {
        self.resolved.fetch_add(1, Ordering::SeqCst);
        (request.log)("resolving packages");
        let locked = |(name, version): (&String, &String)| LockedPackage {
            name: name.clone(),
            version: version.clone(),
            architecture: "all".to_owned(),
            sha256: Digest::of(version.as_bytes()),
            size: 1,
        };
        let packages: Vec<_> = self.packages.lock().unwrap().iter().map(locked).collect();
        let base = match (&request.pinned, &request.parent) {
            (Some(pinned), _) => pinned.base.clone(),
            (None, Some(parent)) => LockedBase::Server { image_digest: parent.digest },
            (None, None) => {
                LockedBase::Debian { suite: "bookworm".to_owned(), variant: "minbase".to_owned(), packages }
            }
        };
        let lock = Lock {
            format: BUILDER_FORMAT,
            architecture: "amd64".to_owned(),
            base,
            steps: Vec::new(),
            env: request.definition.image.env.clone(),
            user: request.definition.image.user.clone(),
            command: request.definition.image.command.clone(),
            timestamp: request.timestamp,
        };
        let file = ReleaseFile { url: "archive".to_owned(), digest: Digest::of(b"release file") };
        let release_files = request.pinned.is_none().then(|| vec![file]);
        let security = self.security.lock().unwrap().clone();
        Ok(Resolution { lock, security, release_files })
    }

    async fn bake(&self, lock: &Lock, run: BakeRun) -> Result<BakedImage, BakeError> {
        (run.log)("baking");
        let bakes = *self.bakes.borrow();
        match bakes {
            Bakes::Well => {
                let digest = Digest::of(lock.key().unwrap().to_string().as_bytes());
                Ok(BakedImage { digest, layers: Vec::new(), steps: Vec::new() })
            }
            Bakes::Never => {
                run.cancel.cancelled().await;
                self.interrupted.send_replace(true);
                Err(BakeError::Cancelled)
            }
            Bakes::Otherwise => {
                let digest = Digest::of(b"otherwise");
                Ok(BakedImage { digest, layers: Vec::new(), steps: Vec::new() })
            }
            Bakes::Panics => panic!("a defect"),
            Bakes::Away => Err(BakeError::Archive {
                archive: "archive".to_owned(),
                why: "is away".to_owned(),
                remedy: "wait".to_owned(),
            }),
        }
    }

    async fn sign(&self, _image: Digest, _made: &Provenance) -> Result<String, BakeError> {
        Ok("key".to_owned())
    }

    async fn describe(&self, _image: Digest, _about: &About) -> Result<(), BakeError> {
        Ok(())
    }

    async fn share(&self, image: Digest) -> Result<bool, BakeError> {
        let mut registry = self.registry.lock().unwrap();
        let Some(shared) = &mut *registry else { return Ok(false) };
        shared.push(image);
        Ok(true)
    }
}

#[derive(Clone, Default)]
pub(crate) struct FakeTester {
    failure: Arc<Mutex<Option<String>>>,
    /// Tests that are under way wait for a permit, where there is somebody to give one.
    gate: Arc<Mutex<Option<Arc<Gate>>>>,
}

/// Where tests wait.
pub(crate) struct Gate {
    pub(crate) reached: Semaphore,
    pub(crate) open: Semaphore,
}

impl FakeTester {
    pub(crate) fn fail(&self, detail: &str) {
        *self.failure.lock().unwrap() = Some(detail.to_owned());
    }

    /// From here on tests pass, each when it is let through.
    pub(crate) fn pass_by_a_gate(&self) -> Arc<Gate> {
        *self.failure.lock().unwrap() = None;
        let gate = Arc::new(Gate { reached: Semaphore::new(0), open: Semaphore::new(0) });
        *self.gate.lock().unwrap() = Some(Arc::clone(&gate));
        gate
    }
}

#[async_trait]
impl Tester for FakeTester {
    async fn test(&self, _run: TestRun<'_>) -> Result<Vec<TestResult>, TestFault> {
        let gate = self.gate.lock().unwrap().clone();
        if let Some(gate) = gate {
            gate.reached.add_permits(1);
            gate.open.acquire().await.unwrap().forget();
        }
        let failure = self.failure.lock().unwrap().clone();
        let detail = failure.clone().unwrap_or_default();
        Ok(vec![TestResult { name: "http".to_owned(), passed: failure.is_none(), detail, took: Millis(0) }])
    }
}

#[derive(Clone, Default)]
pub(crate) struct FakePeers {
    signals: Arc<Mutex<Vec<types::Signal>>>,
    fleets: Arc<Mutex<Vec<Fleet>>>,
    releases: Arc<Mutex<Vec<Release>>>,
}

impl FakePeers {
    pub(crate) fn signals(&self, signals: Vec<(Signal, u64)>) {
        let messages =
            signals.into_iter().map(|(signal, version)| types::Signal { version, ..signal.into() });
        *self.signals.lock().unwrap() = messages.collect();
    }

    pub(crate) fn fleets(&self, fleets: Vec<Fleet>) {
        *self.fleets.lock().unwrap() = fleets;
    }

    pub(crate) fn releases(&self, releases: Vec<Release>) {
        *self.releases.lock().unwrap() = releases;
    }
}

fn listed<T>(items: Vec<T>) -> Changes<T> {
    let cursor = types::Cursor { epoch: "monitor-1".to_owned(), sequence: 1 };
    Changes { items, cursor: Some(cursor), full: true }
}

#[async_trait]
impl Peers for FakePeers {
    async fn signals(&self, _since: Option<types::Cursor>) -> Result<Changes<types::Signal>, Status> {
        Ok(listed(self.signals.lock().unwrap().clone()))
    }

    async fn fleets(&self, _since: Option<types::Cursor>) -> Result<Changes<Fleet>, Status> {
        Ok(listed(self.fleets.lock().unwrap().clone()))
    }

    async fn releases(&self, _server: &ServerName) -> Result<Vec<Release>, Status> {
        Ok(self.releases.lock().unwrap().clone())
    }
}

/// A builder without its loops, and what it works with.
pub(crate) struct World {
    pub(crate) builder: Builder<Contended, FakeBakery, SystemClock>,
    pub(crate) bakery: FakeBakery,
    pub(crate) tester: FakeTester,
    pub(crate) peers: FakePeers,
    folder: tempfile::TempDir,
    processes: Mutex<u32>,
}

impl World {
    pub(crate) async fn new() -> Self {
        Self::in_folder(tempfile::tempdir().unwrap()).await
    }

    /// With an empty store, and everything on disk as it was.
    pub(crate) async fn without_its_store(self) -> Self {
        Self::in_folder(self.folder).await
    }

    async fn in_folder(folder: tempfile::TempDir) -> Self {
        let documents = Documents::new(Contended::new().await);
        let contexts = Contexts::new(folder.path().join("contexts"));
        let bakery = FakeBakery::new();
        let builder = Builder {
            sources: Sources::new(
                documents.clone(),
                contexts,
                Arc::new(Mirrors::new(folder.path().join("sources"), None)),
            ),
            documents,
            bakery: bakery.clone(),
            logs: Logs::open(folder.path().join("logs")).unwrap(),
            clock: SystemClock::new(),
        };
        let (tester, peers) = (FakeTester::default(), FakePeers::default());
        Self { builder, bakery, tester, peers, folder, processes: Mutex::new(0) }
    }

    /// Does `work` while the loops run; then the process is gone, whatever it was doing.
    pub(crate) async fn running<T>(&self, work: impl Future<Output = T>) -> T {
        let owner = {
            let mut processes = self.processes.lock().unwrap();
            *processes += 1;
            format!("process-{processes}")
        };
        let members = Members::alone(&owner);
        workers::recover(&self.builder, &members).await.unwrap();
        let (_stop, stopped) = watch::channel(false);
        let options = WorkerOptions { members: members.clone(), workers: 2 };
        tokio::select! {
            done = work => done,
            () = reconcile::run(self.builder.clone(), members, stopped.clone()) => panic!("the loop ended"),
            () = workers::run(self.builder.clone(), self.tester.clone(), options, stopped.clone()) => {
                panic!("the workers ended")
            }
        }
    }

    /// Does `work` while the workers run; then they are told to stop, and end in order.
    pub(crate) async fn until_stopped<T>(&self, work: impl Future<Output = T>) -> T {
        let (stop, stopped) = watch::channel(false);
        let members = Members::alone("orderly");
        let options = WorkerOptions { members: members.clone(), workers: 2 };
        let tester = self.tester.clone();
        let reconciling = reconcile::run(self.builder.clone(), members, stopped.clone());
        let working = workers::run(self.builder.clone(), tester, options, stopped);
        let work = async {
            let done = work.await;
            stop.send_replace(true);
            done
        };
        tokio::join!(work, reconciling, working).0
    }

    pub(crate) fn images(&self) -> ImageStore {
        ImageStore::open(&self.folder.path().join("images")).unwrap()
    }

    pub(crate) fn api(&self) -> Api<Contended, FakeBakery, SystemClock> {
        let signing = Signing::with_one_key("signing.key".into(), "signing.pub".into());
        let (_, heard) = watch::channel(Some(self.builder.now()));
        let collector =
            Collector::new(self.builder.clone(), self.images(), heard, Duration::from_secs(7 * 24 * 3600));
        Api::new(self.builder.clone(), self.images(), signing, collector)
    }

    /// The outcome of a call for a build.
    pub(crate) async fn build(&self, request: BuildRequest) -> Result<BuildOutcome, Status> {
        let stream = self.api().build(from_local("me", request)).await?.into_inner();
        let items: Vec<_> = stream.collect::<Result<_, _>>().await?;
        match items.into_iter().next_back().and_then(|last| last.item) {
            Some(build_response::Item::Outcome(outcome)) => Ok(outcome),
            other => panic!("{other:?}"),
        }
    }

    fn folder(request_id: &str, yaml: &str) -> ApplyRequest {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(yaml.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, "web/server.yaml", yaml.as_bytes()).unwrap();
        let archive = tar.into_inner().unwrap();
        // Each server has a folder of its own.
        let origin = yaml.lines().find_map(|line| line.strip_prefix("name: ")).unwrap_or_default().to_owned();
        let source = Some(From::Folder(FolderSource { archive, origin }));
        ApplyRequest { request_id: request_id.to_owned(), source }
    }

    pub(crate) async fn apply(&self, request_id: &str, yaml: &str) -> Result<ApplyOutcome, Status> {
        let answer = self.api().apply(from_local("me", Self::folder(request_id, yaml))).await?.into_inner();
        Ok(answer.servers[0].outcome())
    }

    /// The sources that servers left by this apply of a folder.
    pub(crate) async fn left(&self, request_id: &str, yaml: &str) -> Vec<Option<Source>> {
        let request = Self::folder(request_id, yaml);
        let answer = self.api().apply(from_local("me", request)).await.unwrap().into_inner();
        answer.servers.into_iter().map(|server| server.left).collect()
    }

    pub(crate) async fn apply_git(&self, request_id: &str, repository: &Repository) -> Result<(), Status> {
        let source = Some(From::Git(GitSource { url: repository.url(), branch: "main".to_owned() }));
        let request = ApplyRequest { request_id: request_id.to_owned(), source };
        self.api().apply(from_local("me", request)).await.map(drop)
    }

    pub(crate) async fn inspect(&self, repository: &Repository) -> InspectSourceResponse {
        let place = Place::Git { url: repository.url(), branch: "main".to_owned() };
        let request = InspectSourceRequest { source: place.id().to_string() };
        self.api().inspect_source(Request::new(request)).await.unwrap().into_inner()
    }

    pub(crate) fn repository(&self) -> Repository {
        let work = self.folder.path().join("work");
        std::fs::create_dir(&work).unwrap();
        let repository = Repository { work };
        repository.git(&["init", "--quiet", "--initial-branch=main", "."]);
        repository
    }

    pub(crate) async fn resync(&self) -> Result<(), String> {
        Resync::new(self.builder.clone(), self.peers.clone()).run().await
    }

    pub(crate) fn signal(&self, server: &str, cause: CauseKind, fingerprint: &str) -> Signal {
        let server: ServerName = server.parse().unwrap();
        Signal {
            id: SignalId::new(&server, cause, fingerprint),
            server,
            cause,
            fingerprint: fingerprint.to_owned(),
            remedy: Remedy::Rebuild,
            evidence: vec![fingerprint.to_owned()],
            instance: None,
            state: SignalState::Open,
            since: self.builder.now(),
            raised: self.builder.now(),
            reporter: "monitor".to_owned(),
            traceparent: String::new(),
        }
    }

    pub(crate) async fn server(&self, name: &str) -> Option<Server> {
        self.builder.documents.server(&name.parse().unwrap()).await.unwrap().map(|read| read.value)
    }

    pub(crate) async fn builds(&self) -> Vec<Build> {
        let builds = self.builder.documents.all(build::KIND, "").await.unwrap();
        builds.into_iter().map(|read| read.value).collect()
    }

    pub(crate) async fn events(&self) -> Vec<String> {
        let events = self.builder.documents.store().log(0, 500).await.unwrap();
        events.iter().map(|event| format!("{}.{}", event.event.kind.entity, event.event.kind.verb)).collect()
    }

    /// What a defect or a newer program may leave.
    pub(crate) async fn damage(&self, kind: &str, id: &str) {
        let store = self.builder.documents.store();
        let expected = store.get(kind, id).await.unwrap().unwrap().version;
        let body = serde_json::json!({ "of": "another kind" });
        let put =
            Change::Put { kind: kind.to_owned(), id: id.to_owned(), expected, schema: 1, body: body.into() };
        store.commit(Batch { changes: vec![put], ..Batch::default() }).await.unwrap();
    }

    /// Waits for a commit after which `look` gives something.
    async fn until<T>(&self, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
        let mut sequence = self.builder.documents.store().sequence();
        let found = async {
            loop {
                sequence.borrow_and_update();
                if let Some(found) = look().await {
                    return found;
                }
                sequence.changed().await.unwrap();
            }
        };
        let found = tokio::time::timeout(LIMIT, found).await;
        found.unwrap_or_else(|_| panic!("there is no {what} after {LIMIT:?}"))
    }

    pub(crate) async fn revision(&self, server: &str, generation: u64) -> Revision {
        let name: ServerName = server.parse().unwrap();
        let look = async || Some(self.builder.documents.revision(&name, generation).await.unwrap()?.revision);
        self.until(&format!("revision {generation} of {server}"), look).await
    }

    pub(crate) async fn until_build(&self, id: &str, wanted: impl Fn(&State) -> bool) {
        let build = id.parse().unwrap();
        let look = async || {
            let read = self.builder.documents.build(&build).await.unwrap()?;
            wanted(&read.value.state).then_some(())
        };
        self.until(&format!("{id} in the wanted state"), look).await;
    }

    /// Waits until an attempt at a build has failed.
    pub(crate) async fn until_failed_once(&self, id: &str) {
        let build = id.parse().unwrap();
        let look = async || {
            let read = self.builder.documents.build(&build).await.unwrap()?;
            (!read.value.problem.is_empty()).then_some(())
        };
        self.until(&format!("failed attempt at {id}"), look).await;
    }

    pub(crate) async fn until_builds<T>(&self, what: &str, wanted: impl Fn(&[Build]) -> Option<T>) -> T {
        let look = async || wanted(&self.builds().await);
        self.until(what, look).await
    }

    pub(crate) async fn until_server(&self, name: &str, wanted: impl Fn(&Server) -> bool) {
        let look = async || self.server(name).await.filter(|server| wanted(server)).map(drop);
        self.until(&format!("{name} in the wanted state"), look).await;
    }
}

pub(crate) struct Repository {
    work: PathBuf,
}

impl Repository {
    /// Out of reach from here on.
    pub(crate) fn goes_away(&self) {
        std::fs::rename(&self.work, self.work.with_extension("away")).unwrap();
    }

    fn url(&self) -> String {
        self.work.to_str().unwrap().to_owned()
    }

    fn git(&self, arguments: &[&str]) {
        let status = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@t"])
            .args(arguments)
            .current_dir(&self.work)
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{arguments:?}");
    }

    pub(crate) fn commit(&self, files: &[(&str, &str)]) {
        for (path, content) in files {
            let path = self.work.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        self.git(&["add", "-A"]);
        self.git(&["commit", "--quiet", "-m", "x"]);
    }

    pub(crate) fn remove(&self, path: &str) {
        std::fs::remove_file(self.work.join(path)).unwrap();
        self.git(&["commit", "--quiet", "-a", "-m", "x"]);
    }
}
