//! A broker as `kiln up` makes it, and connections to it that try what no client of Kiln would.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use kiln_bus::User;
use kiln_service::config::Site;
use serde_json::{Value, json};

use crate::home::Home;
use crate::site::create::{Wishes, broker_config, ensure};
use crate::site::programs::nats_server;

const LONG: Duration = Duration::from_secs(30);

pub(super) struct Broker {
    pub(super) site: Site,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Broker {
    pub(super) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::new(Some(folder.path().join("home")), "home").unwrap();
        let site = ensure(&home, &Wishes::default()).unwrap();
        let child = Command::new(nats_server().unwrap())
            .arg("--config")
            .arg(broker_config(&site))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let broker = Self { site, child, _folder: folder };
        let begin = Instant::now();
        while TcpStream::connect(broker.address()).is_err() {
            assert!(begin.elapsed() < LONG, "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        broker
    }

    fn address(&self) -> &str {
        self.site.nats_url.trim_start_matches("nats://")
    }

    pub(super) fn wire(&self, user: User) -> Wire {
        let seed = std::fs::read_to_string(self.site.paths().nats_seed(user)).unwrap();
        let (wire, told) = self.open(Some(&nkeys::KeyPair::from_seed(seed.trim()).unwrap()));
        assert_eq!(told, [""; 0], "{user}");
        wire
    }

    /// A connection, and what the broker had against it.
    pub(super) fn open(&self, key: Option<&nkeys::KeyPair>) -> (Wire, Vec<String>) {
        let stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut info = String::new();
        reader.read_line(&mut info).unwrap();
        let info: Value = serde_json::from_str(info.trim_start_matches("INFO ")).unwrap();
        let mut options = json!({ "verbose": false, "headers": true, "protocol": 1 });
        if let Some(key) = key {
            let signature = key.sign(info["nonce"].as_str().unwrap().as_bytes()).unwrap();
            options["nkey"] = key.public_key().into();
            options["sig"] = URL_SAFE_NO_PAD.encode(signature).into();
        }
        let mut wire = Wire { stream, reader, heard: Vec::new() };
        let told = wire.say(&format!("CONNECT {options}\r\n"));
        (wire, told)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // A broker that is gone already is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) struct Wire {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
    /// Subjects, in their order.
    pub(super) heard: Vec<String>,
}

impl Wire {
    /// Sends words of the protocol, and gives what the broker has against them: it takes a connection's words in their
    /// order, so its answer to a ping comes after that.
    pub(super) fn say(&mut self, words: &str) -> Vec<String> {
        let mut told = Vec::new();
        // Where it has closed the connection, what it said before is there still.
        let _ = self.stream.write_all(format!("{words}PING\r\n").as_bytes());
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line).unwrap() == 0 {
                return told;
            }
            let words: Vec<_> = line.split_whitespace().collect();
            match words[0] {
                "PONG" => return told,
                "-ERR" => told.push(line.trim_end().to_owned()),
                "MSG" | "HMSG" => {
                    let length: usize = words.last().unwrap().parse().unwrap();
                    self.reader.read_exact(&mut vec![0; length + 2]).unwrap();
                    self.heard.push(words[1].to_owned());
                }
                _ => {}
            }
        }
    }

    pub(super) fn publish(&mut self, subject: &str, reply: &str, payload: &str) -> Vec<String> {
        self.say(&format!("PUB {subject} {reply} {}\r\n{payload}\r\n", payload.len()))
    }
}
