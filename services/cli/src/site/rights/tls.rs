//! Who gets as far as a word with the broker at all, and that certificates and authorities change while events flow.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use kiln_bus::{Bus as _, NatsBus, NatsOptions, User, interests};
use kiln_model::event::Service;
use kiln_service::access::{Identity, Role};
use kiln_service::certificate::Certificate;
use kiln_service::config::Site;
use kiln_service::pki::Authority;
use kiln_service::tls::{TlsFiles, to_broker};
use tokio::sync::{mpsc, watch};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::wire::Broker;
use super::{LONG, Tells, event};
use crate::site::pki::Step;
use crate::site::{broker, pki};

const HOUR: Duration = Duration::from_secs(3600);

/// What a client would show that has this file.
fn with(site: &Site, identity: &Path) -> ClientConfig {
    let (site, authority) = (site.name.clone(), site.paths().authority());
    to_broker(&TlsFiles { site, authority, identity: Some(identity.to_owned()) }).unwrap()
}

fn with_nothing(site: &Site) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(site.paths().authority()).unwrap()).unwrap();
    ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
}

/// The file of somebody whom an authority vouches for from a time on, for an hour.
fn issued(broker: &Broker, authority: &Authority, name: &str, from: SystemTime) -> PathBuf {
    let identity = Identity::service(Role::Builder).unwrap();
    let path = broker.site.home.join(format!("{name}.pem"));
    std::fs::write(&path, authority.issue(&identity, &[], HOUR, from).unwrap().reveal()).unwrap();
    path
}

#[test]
fn nobody_gets_a_word_without_a_certificate_of_the_site() {
    let broker = Broker::start();
    let mut silent = broker.tcp();
    let requests: [&[u8]; 3] =
        [b"CONNECT {\"verbose\":true}\r\nPING\r\n", b"GET /varz HTTP/1.1\r\nHost: x\r\n\r\n", &[0; 4096]];
    for bytes in requests {
        let mut stream = broker.tcp();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        // Closed, with nothing but an alert.
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.len() < 16 && !answer.contains(&b'\n'), "{answer:?}");
    }

    let now = SystemTime::now();
    let own = pki::authority(&broker.site).unwrap();
    let foreign = Authority::new(broker.site.name.clone()).unwrap();
    let good = issued(&broker, &own, "good", now);
    let strange = issued(&broker, &foreign, "strange", now);
    let ended = issued(&broker, &own, "ended", now - 2 * HOUR);
    let mut word = [0; 5];
    broker.tls(with(&broker.site, &good)).read_exact(&mut word).unwrap();
    assert_eq!(&word, b"INFO ");
    for (config, words) in [
        (with_nothing(&broker.site), "CertificateRequired"),
        (with(&broker.site, &strange), "UnknownCA"),
        (with(&broker.site, &ended), "CertificateExpired"),
    ] {
        let refused = broker.tls(config).read_exact(&mut word).unwrap_err().to_string();
        assert!(refused.contains(words), "{words}: {refused}");
    }

    let mut answer = Vec::new();
    let _ = silent.read_to_end(&mut answer);
    assert_eq!(answer, b"", "who waits is told nothing either");
}

/// A certificate is good for what its holder is, and no more.
#[tokio::test]
async fn no_other_service_passes_for_the_broker() {
    let broker = Broker::start_as(Service::Monitor);
    let bus = NatsBus::connect(broker.site.nats(User::Builder).unwrap()).await.unwrap();
    let refused = bus.publish(&event(Service::Builder, "build", 1)).await.unwrap_err().to_string();
    assert!(refused.contains("monitor answers where the broker should"), "{refused}");
}

/// Whoever stands in between can say that there is no TLS, and hears nothing for it.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_to_speak_tls_never_does_without() {
    let site = Broker::start();
    for scheme in ["tls", "nats"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let (told, heard) = std::sync::mpsc::channel();
        // Ends with the test, or waits for one more connection until it does.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let info = r#"INFO {"server_id":"x","version":"2.14.4","proto":1,"max_payload":1048576,"headers":true,"tls_required":false}"#;
                let _ = stream.write_all(format!("{info}\r\nPONG\r\n").as_bytes());
                let mut words = Vec::new();
                let _ = stream.read_to_end(&mut words);
                if told.send(words).is_err() {
                    return;
                }
            }
        });
        let options = NatsOptions { url, ..site.site.nats(User::Builder).unwrap() };
        let bus = NatsBus::connect(options).await.unwrap();
        assert!(!bus.connected());
        let refused = bus.publish(&event(Service::Builder, "build", 1)).await.unwrap_err().to_string();
        assert!(refused.contains("the broker is away: it speaks before the TLS handshake"), "{refused}");
        let heard = heard.recv_timeout(LONG).unwrap();
        // The first byte of a handshake.
        assert_eq!(heard.first(), Some(&0x16), "{heard:?}");
        assert!(!String::from_utf8_lossy(&heard).contains("CONNECT"));
    }
}

/// What a certificate says that a broker shows now.
fn shown(broker: &Broker) -> Certificate {
    let mut stream = broker.tls(broker.site.nats(User::Cli).unwrap().tls.unwrap());
    let mut word = [0; 5];
    stream.read_exact(&mut word).unwrap();
    Certificate::read(&stream.conn.peer_certificates().unwrap()[0]).unwrap()
}

/// As the supervisor does it.
fn tell(broker: &Broker, told: &mut broker::Told) {
    let begin = Instant::now();
    while told.tell(&broker.site).unwrap().is_none() {
        assert!(begin.elapsed() < LONG, "the broker is not told");
        std::thread::sleep(Duration::from_millis(20));
    }
    let file = std::fs::read_to_string(broker.site.paths().identity(Role::Broker)).unwrap();
    let wanted = Certificate::of_pem(&file).unwrap();
    while shown(broker).serial != wanted.serial {
        assert!(begin.elapsed() < LONG, "the broker shows its old certificate");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(told.tell(&broker.site).unwrap(), None, "once is enough");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_and_authorities_change_while_events_flow() {
    let mut broker = Broker::start();
    let site = broker.site.clone();
    NatsBus::ensure_streams(site.nats(User::Admin).unwrap()).await.unwrap();
    let bus = async |user: User| NatsBus::connect(site.nats(user).unwrap()).await.unwrap();
    let (monitor, builder) = (bus(User::Monitor).await, bus(User::Builder).await);
    let (stop, stopped) = watch::channel(false);
    let (tells, mut given) = mpsc::unbounded_channel();
    // Ends with the test.
    let (_held, never) = watch::channel(false);
    let consuming = tokio::spawn(async move {
        builder.consume("builder", interests(Service::Builder), Arc::new(Tells(tells)), never).await
    });
    let stored = Arc::new(AtomicU64::new(0));
    let publishing = tokio::spawn({
        let stored = Arc::clone(&stored);
        async move {
            while !*stopped.borrow() {
                let event = event(Service::Monitor, "server", stored.load(Ordering::Relaxed) + 1);
                // As the outbox does: until it is stored.
                match monitor.publish(&event).await {
                    Ok(()) => stored.fetch_add(1, Ordering::Relaxed),
                    Err(_) => continue,
                };
            }
        }
    });
    // Events of now, not of before.
    let flows = async || {
        let (begin, before) = (Instant::now(), stored.load(Ordering::Relaxed));
        while stored.load(Ordering::Relaxed) < before + 20 {
            assert!(begin.elapsed() < LONG, "no events flow after {before}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };

    let mut told = broker::Told::default();
    tell(&broker, &mut told);
    let old = issued(&broker, &pki::authority(&site).unwrap(), "old", SystemTime::now());
    for step in [None, Some(Step::Prepare), Some(Step::Switch), Some(Step::Finish)] {
        match step {
            None => drop(pki::renew(&site, true).unwrap()),
            Some(step) => pki::rotate(&site, step).unwrap(),
        }
        tell(&broker, &mut told);
        assert!(bus(User::Deployer).await.connected());
        flows().await;
    }
    assert_eq!(shown(&broker).issuer, pki::authority(&site).unwrap().name());
    let refused = broker.tls(with(&site, &old)).read_exact(&mut [0; 5]).unwrap_err().to_string();
    assert!(refused.contains("UnknownCA"), "{refused}");

    // Those who were there all the time come back by what is in force now.
    broker.restart();
    flows().await;
    stop.send_replace(true);
    publishing.await.unwrap();
    let count = stored.load(Ordering::Relaxed);
    let mut seen = BTreeSet::new();
    while (seen.len() as u64) < count {
        seen.insert(tokio::time::timeout(LONG, given.recv()).await.unwrap().unwrap());
    }
    consuming.abort();
}
