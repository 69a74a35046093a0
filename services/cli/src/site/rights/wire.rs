//! A broker as `kiln up` makes it, and connections to it that try what no client of Kiln would.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kiln_bus::User;
use kiln_model::event::Service;
use kiln_service::access::Role;
use kiln_service::config::Site;
use serde_json::{Value, json};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::home::Home;
use crate::site::broker::config_file;
use crate::site::create::{Wishes, ensure};
use crate::site::programs::nats_server;

const LONG: Duration = Duration::from_secs(30);

pub(super) struct Broker {
    pub(super) site: Site,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Broker {
    pub(super) fn start() -> Self {
        Self::start_with(|_| ())
    }

    /// One that shows the certificate of a service.
    pub(super) fn start_as(service: Service) -> Self {
        Self::start_with(|site| {
            let (from, to) = (site.paths().identity(service), site.paths().identity(Role::Broker));
            std::fs::copy(from, to).unwrap();
        })
    }

    fn start_with(prepare: impl FnOnce(&Site)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().join("home")), "home").unwrap();
        let site = ensure(&home, &Wishes::default()).unwrap();
        prepare(&site);
        let child = run(&site);
        let broker = Self { site, child, _folder: folder };
        broker.wait();
        broker
    }

    /// As after SIGKILL.
    pub(super) fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = run(&self.site);
        self.wait();
    }

    fn wait(&self) {
        let begin = Instant::now();
        while TcpStream::connect(self.address()).is_err() {
            assert!(begin.elapsed() < LONG, "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn address(&self) -> &str {
        self.site.nats_url.trim_start_matches("tls://")
    }

    pub(super) fn wire(&self, user: User) -> Wire {
        let seed = std::fs::read_to_string(self.site.paths().nats_seed(user)).unwrap();
        let (wire, told) = self.open(Some(&nkeys::KeyPair::from_seed(seed.trim()).unwrap()));
        assert_eq!(told, [""; 0], "{user}");
        wire
    }

    /// A connection without a word on it yet.
    pub(super) fn tcp(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// The handshake is done at the first word that is read.
    pub(super) fn tls(&self, config: ClientConfig) -> Tls {
        let name = ServerName::from(std::net::IpAddr::from(Ipv4Addr::LOCALHOST));
        StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), self.tcp())
    }

    /// A connection, and what the broker had against it.
    pub(super) fn open(&self, key: Option<&nkeys::KeyPair>) -> (Wire, Vec<String>) {
        let mut reader = BufReader::new(self.tls(self.site.nats(User::Cli).unwrap().tls.unwrap()));
        let mut info = String::new();
        reader.read_line(&mut info).unwrap();
        let info: Value = serde_json::from_str(info.trim_start_matches("INFO ")).unwrap();
        let mut options = json!({ "verbose": false, "headers": true, "protocol": 1 });
        if let Some(key) = key {
            let signature = key.sign(info["nonce"].as_str().unwrap().as_bytes()).unwrap();
            options["nkey"] = key.public_key().into();
            options["sig"] = URL_SAFE_NO_PAD.encode(signature).into();
        }
        let mut wire = Wire { reader, heard: Vec::new() };
        let told = wire.say(&format!("CONNECT {options}\r\n"));
        (wire, told)
    }
}

fn run(site: &Site) -> Child {
    let mut command = Command::new(nats_server().unwrap());
    command.arg("--config").arg(config_file(site)).stderr(Stdio::null()).spawn().unwrap()
}

impl Drop for Broker {
    fn drop(&mut self) {
        // A broker that is gone already is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) type Tls = StreamOwned<ClientConnection, TcpStream>;

pub(super) struct Wire {
    reader: BufReader<Tls>,
    /// Subjects, in their order.
    pub(super) heard: Vec<String>,
}

impl Wire {
    /// Sends words of the protocol, and gives what the broker has against them: it takes a connection's words in their
    /// order, so its answer to a ping comes after that.
    pub(super) fn say(&mut self, words: &str) -> Vec<String> {
        let mut told = Vec::new();
        // Where it has closed the connection, what it said before is there still.
        let _ = self.reader.get_mut().write_all(format!("{words}PING\r\n").as_bytes());
        loop {
            let line = self.line().unwrap();
            match line.split_whitespace().next() {
                None | Some("PONG") => return told,
                Some("-ERR") => told.push(line.trim_end().to_owned()),
                Some(_) => {}
            }
        }
    }

    /// Hears what comes until the connection has ended, or nothing more does.
    pub(super) fn rest(&mut self) {
        while self.line().is_ok_and(|line| !line.is_empty()) {}
    }

    /// The next line; empty where the connection has ended. What a message holds is passed over.
    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["MSG" | "HMSG", subject, .., length] = words[..] {
            self.reader.read_exact(&mut vec![0; length.parse::<usize>().unwrap() + 2])?;
            self.heard.push(subject.to_owned());
        }
        Ok(line)
    }

    pub(super) fn publish(&mut self, subject: &str, reply: &str, payload: &str) -> Vec<String> {
        self.say(&format!("PUB {subject} {reply} {}\r\n{payload}\r\n", payload.len()))
    }
}
