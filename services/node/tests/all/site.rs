//! A site that a test makes and takes away, and the tiny image that runs on it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePublicKey;
use kiln_api::engine::engine_service_client::EngineServiceClient;
use kiln_api::engine::{
    Backend, CheckRequest, Instance, InstanceSpec, InstanceState, LaunchRequest, ListInstancesRequest,
    Listener, RetireRequest, Route, RouteRequest,
};
use kiln_api::types::{self, CheckResult, Limits, Role, RollingPolicy, RolloutPolicy, RunSpec};
use kiln_image::{ImageStore, Layer, NewImage, Packer, Whiteouts};
use kiln_service::client::{self, Channel};
use kiln_service::config::{NatsFile, Site, SiteFile};
use kiln_service::requests::new_id;
use tonic::Status;

pub(crate) const SERVER: &str = "web";
const CREATED: &str = "2026-01-01T00:00:00Z";

pub(crate) struct TestSite {
    pub(crate) home: tempfile::TempDir,
    pub(crate) site: Site,
    node: Option<Child>,
}

/// Not the same for two tests that run at once, nor for one that ran before and was killed.
fn unique() -> [u8; 4] {
    rand::random()
}

/// Each test is a process of its own, so no two that run at once have the same; nor do two sites of one test.
fn own_subnet() -> String {
    static SITES: AtomicU32 = AtomicU32::new(0);
    let (process, site) = (std::process::id(), SITES.fetch_add(1, Ordering::Relaxed));
    format!("10.{}.{}.0/24", 128 + ((process >> 8) + 31 * site) % 96, process & 255)
}

impl TestSite {
    /// A site whose node answers.
    pub(crate) async fn start() -> Self {
        let mut site = Self::make();
        site.start_node();
        site.ready().await;
        site
    }

    pub(crate) fn make() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes namespaces and mounts: run it as root"
        );
        let home = tempfile::Builder::new().prefix("node-test-").tempdir().unwrap();
        let id = unique();
        let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let file = SiteFile {
            name: "test".to_owned(),
            subnet: own_subnet(),
            bridge: format!("kiln-{}", &hex[..6]),
            id: hex,
            log: "debug,h2=info,hyper=info,tower=info,sqlx=info".to_owned(),
            nats: NatsFile { url: "nats://127.0.0.1:1".to_owned(), replicas: 1 },
            store: None,
            otlp: None,
            metrics: Default::default(),
            listen: Default::default(),
            peers: Default::default(),
            nodes: Default::default(),
            registry: None,
            pki: Default::default(),
            poll: kiln_service::config::PollFile { resync: "1s".to_owned(), ..Default::default() },
            builder: kiln_service::config::BuilderFile::default(),
            signing: Default::default(),
            secrets: Default::default(),
            credentials: Default::default(),
        };
        std::fs::write(home.path().join("site.toml"), toml::to_string(&file).unwrap()).unwrap();
        for dir in ["run", "keys", "images", "node", "logs"] {
            std::fs::create_dir(home.path().join(dir)).unwrap();
        }
        let site = Site::load(home.path()).unwrap();
        Self { home, site, node: None }
    }

    fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln-node"));
        command.arg("--home").arg(self.home.path()).env_remove("KILN_HOME");
        command
    }

    pub(crate) fn start_node(&mut self) {
        let log =
            std::fs::File::options().create(true).append(true).open(self.home.path().join("logs/node.log"));
        self.node = Some(self.program().stderr(log.unwrap()).stdout(Stdio::null()).spawn().unwrap());
    }

    pub(crate) async fn ready(&self) {
        let until = Instant::now() + Duration::from_secs(30);
        while self.client().list_instances(ListInstancesRequest::default()).await.is_err() {
            assert!(Instant::now() < until, "the node does not answer: {}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join("logs/node.log")).unwrap_or_default()
    }

    /// SIGKILL, as the worst that can happen to it.
    pub(crate) fn kill_node(&mut self) {
        if let Some(mut node) = self.node.take() {
            node.kill().unwrap();
            node.wait().unwrap();
        }
    }

    /// The node's process has ended by itself, and said that something is wrong.
    pub(crate) fn node_failed(&mut self) -> bool {
        let ended = self.node.as_mut().and_then(|node| node.try_wait().unwrap());
        ended.is_some_and(|status| !status.success())
    }

    pub(crate) fn client(&self) -> EngineServiceClient<Channel> {
        EngineServiceClient::new(client::channel(&self.home.path().join("run/node.sock")))
    }

    pub(crate) fn leftovers(&self) -> Vec<String> {
        let output = self.program().arg("--leftovers").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect()
    }

    /// Takes the site off the machine and makes sure that nothing is left.
    pub(crate) fn purge(&mut self) {
        self.kill_node();
        let output = self.program().arg("--purge").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(self.leftovers(), Vec::<String>::new());
    }

    pub(crate) fn images(&self) -> ImageStore {
        ImageStore::open(&self.site.paths().images()).unwrap()
    }

    /// The tests' image, signed by the site's key. `command` is what its instances run.
    pub(crate) fn image(&self, user: &str, command: &[&str]) -> String {
        let store = self.images();
        let digest = unsigned_image(&store, self.home.path(), user, command);
        let key = SigningKey::from_bytes(&rand::random());
        let public =
            key.verifying_key().to_public_key_pem(ed25519_dalek::pkcs8::spki::der::pem::LineEnding::LF);
        std::fs::write(self.site.paths().signing_pub(), public.unwrap()).unwrap();
        store.sign(&digest.parse().unwrap(), &key.into()).unwrap();
        digest
    }

    pub(crate) fn server_image(&self) -> String {
        self.image("root", &["/bin/server"])
    }

    pub(crate) async fn launch(&self, request: LaunchRequest) -> Result<Instance, Status> {
        self.client().launch(request).await.map(|answer| answer.into_inner().instance.unwrap())
    }

    /// Launches and waits for the first answer.
    pub(crate) async fn serving(&self, image: &str, attempt: u64) -> Instance {
        let instance = self.launch(request(spec(image, attempt))).await.unwrap();
        assert_eq!(instance.state(), InstanceState::Running, "{}", instance.detail);
        let address = SocketAddr::new(instance.address.parse().unwrap(), 80);
        wait_for("the first answer", || get(address, "/").is_ok()).await;
        instance
    }

    pub(crate) async fn retire(&self, id: &str, drain: Duration) -> Result<Instance, Status> {
        self.retire_by(self.client(), id, drain).await
    }

    pub(crate) fn retire_by(
        &self,
        mut client: EngineServiceClient<Channel>,
        id: &str,
        drain: Duration,
    ) -> impl Future<Output = Result<Instance, Status>> + Send + use<> {
        let request = RetireRequest {
            request_id: new_id(),
            id: id.to_owned(),
            server: SERVER.to_owned(),
            generation: 1,
            drain: Some(drain.try_into().unwrap()),
            traceparent: String::new(),
        };
        async move { client.retire(request).await.map(|answer| answer.into_inner().instance.unwrap()) }
    }

    /// True where the edge was so already.
    pub(crate) async fn route(&self, listen: u16, instances: &[&str]) -> Result<bool, Status> {
        self.route_by(self.client(), listen, instances).await
    }

    pub(crate) fn route_by(
        &self,
        mut client: EngineServiceClient<Channel>,
        listen: u16,
        instances: &[&str],
    ) -> impl Future<Output = Result<bool, Status>> + Send + use<> {
        let backends =
            instances.iter().map(|id| Backend { instance: (*id).to_owned(), target: 80 }).collect();
        let listeners = vec![Listener { listen: listen.into(), backends }];
        let request = RouteRequest {
            request_id: new_id(),
            server: SERVER.to_owned(),
            generation: 1,
            listeners,
            traceparent: String::new(),
        };
        async move { client.route(request).await.map(|answer| answer.into_inner().unchanged) }
    }

    pub(crate) async fn list(&self) -> (Vec<Instance>, Vec<Route>) {
        let answer =
            self.client().list_instances(ListInstancesRequest::default()).await.unwrap().into_inner();
        (answer.instances, answer.routes)
    }

    pub(crate) async fn state(&self, id: &str) -> InstanceState {
        let (instances, _) = self.list().await;
        let found = instances.iter().find(|instance| instance.spec.as_ref().unwrap().id == id);
        found.map_or(InstanceState::Unspecified, Instance::state)
    }

    pub(crate) async fn wait_state(&self, id: &str, state: InstanceState) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.state(id).await != state {
            assert!(
                Instant::now() < until,
                "{id} is {:?}, wanted {state:?}: {}",
                self.state(id).await,
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Its state when no launch of it is under way any more.
    pub(crate) async fn settled(&self, id: &str) -> InstanceState {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match self.state(id).await {
                InstanceState::Launching => assert!(Instant::now() < until, "{id} stays: {}", self.log()),
                state => return state,
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn check(&self, id: &str, check: types::check::Kind) -> CheckResult {
        let check = Some(types::Check { kind: Some(check) });
        let timeout = Some(Duration::from_secs(5).try_into().unwrap());
        let request = CheckRequest { id: id.to_owned(), check, timeout };
        self.client().check(request).await.unwrap().into_inner().result.unwrap()
    }

    pub(crate) async fn command(&self, id: &str, run: &str, stdout: &str) -> CheckResult {
        let (run, stdout) = (run.to_owned(), stdout.to_owned());
        self.check(id, types::check::Kind::Command(types::CommandCheck { run, status: 0, stdout })).await
    }
}

impl Drop for TestSite {
    fn drop(&mut self) {
        self.kill_node();
        let purged = self.program().arg("--purge").output();
        if !purged.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("the site {} could not be purged: {purged:?}", self.site.id);
        }
        if std::thread::panicking() {
            eprintln!("log of the node:\n{}", self.log());
        }
    }
}

fn folder(at: &Path, mode: u32, uid: u32) {
    std::fs::create_dir_all(at).unwrap();
    std::fs::set_permissions(at, PermissionsExt::from_mode(mode)).unwrap();
    chown(at, Some(uid), Some(uid)).unwrap();
}

fn file(at: &Path, content: &str, mode: u32, uid: u32) {
    std::fs::write(at, content).unwrap();
    std::fs::set_permissions(at, PermissionsExt::from_mode(mode)).unwrap();
    chown(at, Some(uid), Some(uid)).unwrap();
}

fn compiled(dir: &Path) -> PathBuf {
    let (source, program) = (dir.join("instance.c"), dir.join("instance"));
    std::fs::write(&source, include_str!("instance.c")).unwrap();
    let gcc = Command::new("gcc").args(["-static", "-O1", "-o"]).arg(&program).arg(&source).output().unwrap();
    assert!(gcc.status.success(), "{}", String::from_utf8_lossy(&gcc.stderr));
    program
}

pub(crate) fn unsigned_image(store: &ImageStore, dir: &Path, user: &str, command: &[&str]) -> String {
    let tree = dir.join("tree");
    let _ = std::fs::remove_dir_all(&tree);
    for path in ["", "bin", "etc", "var", "run"] {
        folder(&tree.join(path), 0o755, 0);
    }
    folder(&tree.join("var/data"), 0o750, 33);
    file(&tree.join("var/data/seed"), "seed\n", 0o640, 33);
    std::os::unix::fs::symlink("/var/data", tree.join("data")).unwrap();
    file(&tree.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nwww:x:33:33::/var/data:/bin/sh\n", 0o644, 0);
    file(&tree.join("etc/group"), "root:x:0:\nwww:x:33:\n", 0o644, 0);
    // What an image from elsewhere has there.
    std::os::unix::fs::symlink("../run/resolv.conf", tree.join("etc/resolv.conf")).unwrap();
    let program = compiled(dir);
    std::fs::copy(&program, tree.join("bin/server")).unwrap();
    std::fs::hard_link(tree.join("bin/server"), tree.join("bin/sh")).unwrap();
    let packer = Packer { whiteouts: Whiteouts::None, newest: 1_700_000_000, shift: 0 };
    let packed = packer.pack(store, &tree).unwrap();
    let layer = Layer {
        diff_id: packed.diff_id,
        size: packed.size,
        created_by: "test".to_owned(),
        created: CREATED.to_owned(),
    };
    let image = NewImage {
        architecture: "amd64".to_owned(),
        created: CREATED.to_owned(),
        env: [("FROM_IMAGE".to_owned(), "yes".to_owned())].into(),
        user: user.to_owned(),
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        labels: std::collections::BTreeMap::new(),
        layers: vec![layer],
    };
    store.put_image(&image).unwrap().to_string()
}

pub(crate) fn run_spec() -> RunSpec {
    RunSpec {
        node: String::new(),
        replicas: 1,
        ports: vec![types::Port { listen: 8080, target: 80 }],
        writable: vec!["/run".to_owned(), "/data".to_owned(), "/tmp".to_owned()],
        env: std::collections::BTreeMap::new().into_iter().collect(),
        limits: Some(Limits { memory_bytes: 64 << 20, cpu_millis: 0, pids: 200 }),
        capabilities: vec![],
        health: None,
        rollout: Some(RolloutPolicy {
            strategy: Some(types::rollout_policy::Strategy::Rolling(RollingPolicy {
                max_surge: 1,
                max_unavailable: 0,
            })),
            soak: Some(Duration::ZERO.try_into().unwrap()),
            deadline: Some(Duration::from_secs(60).try_into().unwrap()),
        }),
        drain: Some(Duration::from_secs(5).try_into().unwrap()),
    }
}

pub(crate) fn spec(image: &str, attempt: u64) -> InstanceSpec {
    InstanceSpec {
        id: format!("{SERVER}-r1-0-a{attempt}"),
        server: SERVER.to_owned(),
        release: 1,
        ordinal: 0,
        attempt,
        role: Role::Fleet.into(),
        image_digest: image.to_owned(),
        run: Some(run_spec()),
    }
}

pub(crate) fn id(attempt: u64) -> String {
    format!("{SERVER}-r1-0-a{attempt}")
}

pub(crate) fn request(spec: InstanceSpec) -> LaunchRequest {
    LaunchRequest { request_id: new_id(), spec: Some(spec), generation: 1, traceparent: String::new() }
}

/// A request with a connection of its own; the body of the answer.
pub(crate) fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") => Ok(body.to_owned()),
        _ => Err(std::io::Error::other(format!("answered `{answer}`"))),
    }
}

pub(crate) fn local(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)
}

/// A port that nothing listens on, below those that the kernel gives out by itself.
pub(crate) fn free_port() -> u16 {
    let [a, b, ..] = unique();
    20_000 + u16::from_be_bytes([a, b]) % 10_000
}

pub(crate) async fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
