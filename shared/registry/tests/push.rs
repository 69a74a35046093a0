//! Pushes to a real registry with a password: over a connection that breaks, and of what another repository has.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kiln_image::ImageStore;
use kiln_model::digest::Digest;
use kiln_registry::Registry;
use kiln_service::config;
use kiln_test_servers::registry::{CREDENTIALS, Registry as Server};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

mod made;

const LAYER: usize = 3 << 20;

/// On the way to the registry.
struct Way {
    address: SocketAddr,
    /// Bytes that it has passed on to the registry.
    sent: AtomicU64,
    /// It closes the connection that passes on more than these, once.
    breaks_after: AtomicU64,
}

impl Way {
    async fn to(server: String) -> Arc<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let way = Arc::new(Self { address, sent: 0.into(), breaks_after: u64::MAX.into() });
        let passing = Arc::clone(&way);
        tokio::spawn(async move {
            while let Ok((ours, _)) = listener.accept().await {
                let theirs = TcpStream::connect(&server).await.unwrap();
                tokio::spawn(Arc::clone(&passing).pass(ours, theirs));
            }
        });
        way
    }

    async fn pass(self: Arc<Self>, ours: TcpStream, theirs: TcpStream) {
        let ((mut from, mut to), (mut back, mut out)) = (ours.into_split(), theirs.into_split());
        let answers = tokio::spawn(async move { tokio::io::copy(&mut back, &mut to).await });
        let mut buffer = vec![0; 1 << 16];
        while let Ok(read) = from.read(&mut buffer).await {
            if read == 0 || out.write_all(&buffer[..read]).await.is_err() {
                break;
            }
            let sent = self.sent.fetch_add(read as u64, Ordering::Relaxed) + read as u64;
            if sent > self.breaks_after.load(Ordering::Relaxed) {
                self.breaks_after.store(u64::MAX, Ordering::Relaxed);
                answers.abort();
                return;
            }
        }
        drop(out);
        let _ = answers.await;
    }
}

/// Of layers that nothing else has.
fn image(store: &ImageStore, seeds: &[u8]) -> Digest {
    let layer = |seed: &u8| -> Vec<u8> { (0..LAYER).map(|at| (at % 251) as u8 ^ seed).collect() };
    let layers: Vec<_> = seeds.iter().map(layer).collect();
    made::image(store, &layers.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// A repository of the registry at the end of a way.
fn repository(way: &Way, name: &str, mount_from: &[&str], folder: &Path) -> Registry {
    let credentials = folder.join("credentials");
    let auths = serde_json::json!({ "auths": { way.address.to_string(): { "auth": CREDENTIALS } } });
    std::fs::write(&credentials, auths.to_string()).unwrap();
    let named = |name: &str| format!("{}/{name}", way.address).parse().unwrap();
    let settings = config::Registry {
        repository: named(name),
        ca: None,
        credentials: Some(credentials),
        mount_from: mount_from.iter().map(|name| named(name)).collect(),
    };
    Registry::new(&settings).unwrap()
}

async fn pulls(registry: &Registry, folder: &Path, image: &Digest) -> Result<(), kiln_registry::Error> {
    let store = ImageStore::open(folder).unwrap();
    registry.pull(&store, image).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_arrived_is_not_sent_again_after_a_break_nor_from_another_repository() {
    let mut server = Server::on_loopback().unwrap();
    server.resume().await.unwrap();
    let way = Way::to(server.host(Ipv4Addr::LOCALHOST)).await;
    let folder = tempfile::tempdir().unwrap();
    let store = ImageStore::open(&folder.path().join("ours")).unwrap();
    let sent = || way.sent.swap(0, Ordering::Relaxed);
    let layer = LAYER as u64;

    // It breaks in the middle of the second of three layers, which is sent anew with the third one.
    let one = image(&store, &[1, 2, 3]);
    let team = repository(&way, "team/kiln", &[], folder.path());
    way.breaks_after.store(layer * 3 / 2, Ordering::Relaxed);
    team.push(&store, &one).await.unwrap();
    let whole = sent();
    assert_eq!(way.breaks_after.load(Ordering::Relaxed), u64::MAX, "the connection broke");
    assert!((layer * 3..layer * 4).contains(&whole), "{whole} bytes for three layers of {layer}");

    // Another repository has two of its layers, or is not there, or may not be mounted from.
    let two = image(&store, &[1, 2, 4]);
    let other = repository(&way, "other/kiln", &["nobody/kiln", "team/kiln"], folder.path());
    other.push(&store, &two).await.unwrap();
    let mounted = sent();
    assert!((layer..layer * 3 / 2).contains(&mounted), "{mounted} bytes for one layer of {layer}");
    let alone = repository(&way, "alone/kiln", &["nobody/kiln"], folder.path());
    alone.push(&store, &two).await.unwrap();
    let all = sent();
    assert!((layer * 3..layer * 7 / 2).contains(&all), "{all} bytes for three layers of {layer}");

    for (registry, image, to) in [(&team, one, "a"), (&other, two, "b"), (&alone, two, "c")] {
        pulls(registry, &folder.path().join(to), &image).await.unwrap();
    }
    // What is there already is asked for, and nothing of it is sent.
    sent();
    team.push(&store, &one).await.unwrap();
    let again = sent();
    assert!(again < layer / 10, "{again} bytes for nothing new");
}
