//! What a registry could answer: nothing of it is believed, and what fails in passing is tried again.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey as _;
use kiln_image::{ImageStore, Signer};
use kiln_model::digest::Digest;
use kiln_model::repository::Repository;
use kiln_registry::Registry;
use kiln_service::config;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

mod made;

/// Answers what it was told to, whoever asks.
struct Fake {
    answers: Mutex<BTreeMap<String, Vec<u8>>>,
    /// Requests that are answered with 503 first.
    busy: AtomicU32,
    asked: AtomicU32,
}

async fn serve(fake: Arc<Fake>, stream: TcpStream) {
    let mut stream = BufReader::new(stream);
    let (mut first, mut line) = (String::new(), String::new());
    let _ = stream.read_line(&mut first).await;
    while stream.read_line(&mut line).await.is_ok_and(|read| read > 2) {
        line.clear();
    }
    let path = first.split(' ').nth(1).unwrap_or_default().trim_start_matches("/v2/kiln/").to_owned();
    // The first question is whether one has to log in.
    let is_real = path != "/v2/";
    fake.asked.fetch_add(is_real.into(), Ordering::SeqCst);
    let busy = is_real
        && fake.busy.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
    let found = fake.answers.lock().unwrap().get(&path).cloned();
    let (status, body) = match found {
        _ if busy => ("503 Service Unavailable", b"busy".to_vec()),
        Some(body) => ("200 OK", body),
        None if !is_real => ("200 OK", b"{}".to_vec()),
        None => ("404 Not Found", b"{}".to_vec()),
    };
    let media_type = match path.contains("manifests/sha256-") {
        true => "application/vnd.oci.image.index.v1+json",
        false => "application/vnd.oci.image.manifest.v1+json",
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(&body).await;
    let _ = stream.shutdown().await;
}

/// A registry that has one signed image, and a store that does not.
struct World {
    folder: tempfile::TempDir,
    fake: Arc<Fake>,
    registry: Registry,
    image: Digest,
    layer: Digest,
    signature: Digest,
}

fn signed(store: &ImageStore, content: &[u8], folder: &Path) -> Digest {
    let image = made::image(store, &[content]);
    let key = SigningKey::from_bytes(&[7; 32]).to_pkcs8_pem(Default::default()).unwrap();
    std::fs::write(folder.join("key"), key.as_bytes()).unwrap();
    store.sign(&image, &Signer::file(&folder.join("key")).unwrap()).unwrap();
    image
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let theirs = ImageStore::open(&folder.path().join("theirs")).unwrap();
        let image = signed(&theirs, &[0; 1024], folder.path());
        let signature = theirs.signatures_of(&image).unwrap()[0];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let fake = Arc::new(Fake { answers: Mutex::default(), busy: 0.into(), asked: 0.into() });
        let serving = fake.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(serving.clone(), stream));
            }
        });
        let settings = config::Registry {
            repository: Repository { host: address.to_string(), path: "kiln".to_owned() },
            ca: None,
            credentials: None,
            mount_from: Vec::new(),
        };
        let registry = Registry::new(&settings).unwrap();
        let layer = theirs.image(&image).unwrap().layers[0].diff_id;
        let world = Self { folder, fake, registry, image, layer, signature };
        for manifest in [image, signature] {
            world.answer(&format!("manifests/{manifest}"), &world.theirs(&manifest));
            for (blob, _) in theirs.parts_of(&manifest).unwrap() {
                world.answer(&format!("blobs/{blob}"), &world.theirs(&blob));
            }
        }
        world.name(&[signature]);
        world
    }

    fn theirs(&self, blob: &Digest) -> Vec<u8> {
        std::fs::read(self.folder.path().join("theirs/blobs/sha256").join(blob.hex())).unwrap()
    }

    fn answer(&self, path: &str, content: &[u8]) {
        self.fake.answers.lock().unwrap().insert(path.to_owned(), content.to_vec());
    }

    /// The index of the image's signatures.
    fn name(&self, signatures: &[Digest]) {
        let entries: Vec<_> =
            signatures.iter().map(|digest| json!({ "digest": digest, "size": 1 })).collect();
        let index = json!({ "schemaVersion": 2, "manifests": entries }).to_string();
        self.answer(&format!("manifests/sha256-{}", self.image.hex()), index.as_bytes());
    }

    /// Into a store that is empty; gives it with what became of it.
    async fn pull(&self) -> (ImageStore, Result<(), String>) {
        let ours = self.folder.path().join("ours");
        let _ = std::fs::remove_dir_all(&ours);
        let ours = ImageStore::open(&ours).unwrap();
        let pulled = self.registry.pull(&ours, &self.image).await;
        (ours, pulled.map_err(|error| error.to_string()))
    }

    async fn is_refused(&self, why: &str) {
        let (ours, pulled) = self.pull().await;
        let error = pulled.unwrap_err();
        assert!(error.contains(why), "{error}");
        assert_eq!(ours.images().unwrap(), [], "nothing is named that is not whole");
    }
}

#[tokio::test]
async fn an_image_comes_with_its_signatures() {
    let world = World::new().await;
    let (ours, pulled) = world.pull().await;
    pulled.unwrap();
    assert_eq!(ours.images().unwrap(), [world.image]);
    assert_eq!(ours.signatures_of(&world.image).unwrap(), [world.signature]);
    assert_eq!(ours.image(&world.image).unwrap().layers[0].diff_id, world.layer);
}

#[tokio::test]
async fn nothing_that_a_registry_answers_is_believed() {
    let world = World::new().await;
    let blob = format!("blobs/{}", world.layer);
    world.answer(&blob, &[1; 1024]);
    world.is_refused("digest").await;
    world.answer(&blob, &[0; 1025]);
    world.is_refused("more than 1024 bytes").await;
    world.answer(&blob, &[0; 1000]);
    world.is_refused("digest").await;
    world.answer(&blob, &[0; 1024]);
    let manifest = format!("manifests/{}", world.image);
    world.answer(&manifest, &world.theirs(&world.signature));
    world.is_refused("igest").await;
    world.answer(&manifest, &world.theirs(&world.image));
    // Names another image for a signature, and a signature of another image.
    world.name(&[world.image]);
    world.is_refused("is not about image").await;
    let theirs = ImageStore::open(&world.folder.path().join("theirs")).unwrap();
    let other = signed(&theirs, &[0; 2048], world.folder.path());
    let of_other = theirs.signatures_of(&other).unwrap()[0];
    world.answer(&format!("manifests/{of_other}"), &world.theirs(&of_other));
    for (part, _) in theirs.parts_of(&of_other).unwrap() {
        world.answer(&format!("blobs/{part}"), &world.theirs(&part));
    }
    world.name(&[of_other]);
    world.is_refused("is not about image").await;
    world.name(&[world.signature]);
    world.pull().await.1.unwrap();
}

#[tokio::test]
async fn what_fails_in_passing_is_tried_again_and_what_is_not_there_is_not() {
    let world = World::new().await;
    world.fake.busy.store(1, Ordering::SeqCst);
    world.pull().await.1.unwrap();
    world.fake.answers.lock().unwrap().clear();
    let asked = world.fake.asked.load(Ordering::SeqCst);
    let error = world.pull().await.1.unwrap_err();
    assert!(error.starts_with(&format!("pull {} at 127.0.0.1:", world.image)), "{error}");
    assert_eq!(world.fake.asked.load(Ordering::SeqCst), asked + 1);
}

#[tokio::test]
async fn a_signature_that_came_later_is_brought_to_an_image_that_is_here() {
    let world = World::new().await;
    let (ours, pulled) = world.pull().await;
    pulled.unwrap();
    let theirs = ImageStore::open(&world.folder.path().join("theirs")).unwrap();
    let key = SigningKey::from_bytes(&[8; 32]).to_pkcs8_pem(Default::default()).unwrap();
    std::fs::write(world.folder.path().join("next"), key.as_bytes()).unwrap();
    theirs.sign(&world.image, &Signer::file(&world.folder.path().join("next")).unwrap()).unwrap();
    let both = theirs.signatures_of(&world.image).unwrap();
    for signature in &both {
        world.answer(&format!("manifests/{signature}"), &world.theirs(signature));
        for (part, _) in theirs.parts_of(signature).unwrap() {
            world.answer(&format!("blobs/{part}"), &world.theirs(&part));
        }
    }
    world.name(&both);
    world.registry.pull(&ours, &world.image).await.unwrap();
    assert_eq!((ours.signatures_of(&world.image).unwrap(), both.len()), (both, 2));
}
