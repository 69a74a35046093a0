//! Bakes with a real archive, runc and mounts: they need root, and the packages of the host's own suite.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::EncodePrivateKey as _;
use kiln_formats::deb822;
use kiln_image::Thoroughness;
use kiln_model::definition::Reach;
use kiln_model::lock::{LockedBase, LockedStep};
use kiln_service::config::SigningKey as KeyOf;

use super::*;

mod built;
mod described;
mod emulated;
mod faults;
mod foreign;
mod provisioned;
mod reach;

struct Kitchen {
    folder: tempfile::TempDir,
    baker: Baker,
    site: SiteId,
    log: Arc<Mutex<Vec<String>>>,
}

impl Kitchen {
    fn new(site: &str, limits: BakeLimits) -> Self {
        Self::of(site, limits, None, BTreeMap::new())
    }

    fn with_registry(site: &str, registry: kiln_service::config::Registry) -> Self {
        Self::of(site, BakeLimits::default(), Some(registry), BTreeMap::new())
    }

    fn with_secrets(site: &str, secrets: BTreeMap<String, PathBuf>) -> Self {
        Self::of(site, BakeLimits::default(), None, secrets)
    }

    fn of(
        site: &str,
        limits: BakeLimits,
        registry: Option<kiln_service::config::Registry>,
        secrets: BTreeMap<String, PathBuf>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let signing_key = folder.path().join("signing.key");
        let pem = SigningKey::from_bytes(&[7; 32]).to_pkcs8_pem(Default::default()).unwrap();
        fs::write(&signing_key, pem.as_bytes()).unwrap();
        let site: SiteId = site.parse().unwrap();
        let baker = Baker::new(BakeConfig {
            site: site.clone(),
            home: folder.path().join("builder"),
            packages: folder.path().join("packages"),
            layer_cache: folder.path().join("cache"),
            images: folder.path().join("images"),
            registry,
            archive_credentials: None,
            secrets,
            signing_keys: vec![KeyOf::File(signing_key)],
            runtime: PathBuf::from("runc"),
            archives: Vec::new(),
            limits,
        })
        .unwrap();
        Self { folder, baker, site, log: Arc::default() }
    }

    fn sink(&self) -> LogSink {
        let log = Arc::clone(&self.log);
        Arc::new(move |line| log.lock().unwrap().push(line.to_owned()))
    }

    async fn lock(&self, image: &str, parent: Option<ParentImage>, pinned: Option<&Lock>) -> Resolution {
        self.try_lock(image, parent, pinned).await.unwrap()
    }

    async fn try_lock(
        &self,
        image: &str,
        parent: Option<ParentImage>,
        pinned: Option<&Lock>,
    ) -> Result<Resolution, BakeError> {
        self.resolve(image, parent, pinned, None).await
    }

    async fn resolve(
        &self,
        image: &str,
        parent: Option<ParentImage>,
        pinned: Option<&Lock>,
        current: Option<Current>,
    ) -> Result<Resolution, BakeError> {
        let context = self.folder.path().join("context");
        fs::create_dir_all(context.join("site")).unwrap();
        fs::write(context.join("site/index.html"), "Hello").unwrap();
        fs::write(context.join("motd"), "{{ name }} in {{ env.PLACE }}").unwrap();
        let text = format!("apiVersion: kiln/v1\nname: web\nimage:\n{image}\n  command: [nginx]\n");
        let definition = kiln_model::definition::parse(text.as_bytes(), "server.yaml").unwrap();
        let request = ResolveRequest {
            definition: &definition,
            context: &context,
            parent,
            timestamp: Timestamp::from_second(1_790_000_000).unwrap(),
            pinned,
            current,
            log: self.sink(),
        };
        self.baker.resolve(request).await
    }

    fn run(&self, number: u64) -> BakeRun {
        BakeRun {
            build: format!("web-b{number}").parse().unwrap(),
            log: self.sink(),
            progress: Arc::new(|_| {}),
            cancel: CancellationToken::new(),
            timings: Timings::default(),
            use_layer_cache: true,
        }
    }

    async fn bake(&self, lock: &Lock, number: u64) -> BakedImage {
        match self.baker.bake(lock, self.run(number)).await {
            Ok(image) => image,
            Err(error) => panic!("{error}\n{}", self.log.lock().unwrap().join("\n")),
        }
    }

    fn store(&self) -> ImageStore {
        ImageStore::open(&self.folder.path().join("images")).unwrap()
    }

    /// The content of a file in the topmost layer that has it.
    fn read(&self, image: &BakedImage, path: &str) -> Option<String> {
        image.layers.iter().rev().find_map(|layer| {
            let tree = self.store().layer_tree(&layer.digest).unwrap();
            fs::read_to_string(tree.join(path)).ok()
        })
    }

    /// Nothing of the site is left in mounts, cgroups, processes or /run.
    fn assert_nothing_is_left(&self) {
        let mark = format!("kiln-{}-bake", self.site);
        let folder = work::site_folder(&self.site);
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(folder.to_str().unwrap()), "{mounts}");
        assert!(!folder.exists());
        assert_eq!(sandbox::cgroups(&mark), Vec::<PathBuf>::new());
    }
}

fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

const BASE: &str = "  from: { debian: bookworm }
  env: { PLACE: here }
  steps:
    - packages: [nginx-light]
    - files:
        - { src: site/, dest: /var/www/html, owner: 'www-data:www-data' }
        - { src: motd, dest: /etc/motd, template: true }
    - run: nginx -t && echo \"$PLACE\" > /opt/place && rm -r /usr/share/doc/nginx-common";

#[tokio::test(flavor = "multi_thread")]
async fn one_lock_is_one_image_on_two_empty_stores() {
    let first = Kitchen::new("be000001", BakeLimits::default());
    let second = Kitchen::new("be000002", BakeLimits::default());
    let resolution = first.lock(BASE, None, None).await;
    let again = second.lock(BASE, None, None).await;
    assert_eq!(resolution.lock, again.lock);
    assert!(resolution.release_files.is_some_and(|files| !files.is_empty()));

    let image = first.bake(&resolution.lock, 1).await;
    let other = second.bake(&resolution.lock, 1).await;
    assert_eq!(image.digest, other.digest);
    assert_eq!(image.layers.len(), 4);
    first.assert_nothing_is_left();

    assert_eq!(first.read(&image, "var/www/html/index.html").unwrap(), "Hello");
    assert_eq!(first.read(&image, "etc/motd").unwrap(), "web in here");
    assert_eq!(first.read(&image, "opt/place").unwrap(), "here\n");
    let status = first.read(&image, "var/lib/dpkg/status").unwrap();
    let installed = deb822::parse(&status).unwrap();
    assert!(installed.iter().all(|p| p.get("Status") == Some("install ok installed")));
    let installed: BTreeSet<_> =
        installed.iter().filter_map(|p| p.get("Package").map(str::to_owned)).collect();
    assert_eq!(installed, resolution.lock.packages().into_keys().collect());

    described::others_check_what_is_said_of_it(&first, &image, &resolution.lock).await;
    other_tools_take_it(&first, &image.digest);

    // Nothing has changed, and nobody is asked.
    let pinned = first.lock(BASE, None, Some(&resolution.lock)).await;
    assert_eq!((pinned.lock == resolution.lock, pinned.release_files), (true, None));
    let cached = first.bake(&resolution.lock, 2).await;
    assert!(cached.steps.iter().all(|step| step.cached) && cached.digest == image.digest);

    a_child_adds_to_its_parent(&first, &image).await;
    a_root_file_system_as_tar_is_begun_with(&first, &image).await;
    what_never_ends_is_ended(&first, &resolution.lock).await;
}

fn other_tools_take_it(kitchen: &Kitchen, digest: &Digest) {
    let tar = kitchen.folder.path().join("image.tar");
    kitchen.store().export(digest, "web", fs::File::create(&tar).unwrap()).unwrap();
    let layout = kitchen.folder.path().join("layout");
    fs::create_dir(&layout).unwrap();
    succeeds(Command::new("tar").arg("-xf").arg(&tar).arg("-C").arg(&layout));
    let reference = format!("{}:web", layout.display());
    let copy = kitchen.folder.path().join("copy");
    succeeds(
        Command::new("skopeo")
            .args(["copy", "--insecure-policy"])
            .arg(format!("oci:{reference}"))
            .arg(format!("dir:{}", copy.display())),
    );
    let bundle = kitchen.folder.path().join("bundle");
    succeeds(Command::new("umoci").args(["unpack", "--image", &reference]).arg(&bundle));
    // The same tar is what docker loads.
    succeeds(Command::new("skopeo").arg("inspect").arg(format!("docker-archive:{}", tar.display())));
    assert!(bundle.join("rootfs/usr/sbin/nginx").is_file());
    assert!(!bundle.join("rootfs/usr/share/doc/nginx-common").exists());
}

async fn a_root_file_system_as_tar_is_begun_with(kitchen: &Kitchen, other: &BakedImage) {
    let layer = other.layers[0].digest;
    let tar = fs::read(kitchen.folder.path().join("images/blobs/sha256").join(layer.hex())).unwrap();
    let packed = zstd::encode_all(tar.as_slice(), 1).unwrap();
    let file = kitchen.folder.path().join("context/root.tar.zst");
    fs::write(&file, &packed).unwrap();
    let begun = "  from: { archive: root.tar.zst }\n  steps:\n    - packages: [ed]";
    let resolution = kitchen.lock(begun, None, None).await;
    let [LockedStep::Packages { packages, .. }] = resolution.lock.steps.as_slice() else { panic!() };
    assert_eq!(packages.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["ed"]);
    assert!(resolution.release_files.is_some_and(|files| !files.is_empty()), "of the suite that it is of");
    let image = kitchen.bake(&resolution.lock, 4).await;
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.layers[0].digest, layer, "what was sealed is sealed");
    assert!(kitchen.read(&image, "var/lib/dpkg/status").unwrap().contains("Package: ed\n"));
    let pinned = kitchen.lock(begun, None, Some(&resolution.lock)).await;
    assert_eq!((pinned.lock == resolution.lock, pinned.release_files), (true, None));
    kitchen.assert_nothing_is_left();

    // The same from an address, which is asked once.
    let digest = Digest::of(&packed);
    let (url, asked) = serve(packed);
    let at = |sha256: &Digest| format!("  from: {{ archive: '{url}', sha256: {} }}", sha256.hex());
    let wrong = kitchen.try_lock(&at(&Digest::of(b"another")), None, None).await.unwrap_err().to_string();
    assert!(wrong.contains(&url) && wrong.contains("sha256"), "{wrong}");
    fs::remove_file(kitchen.folder.path().join("builder/files").join(digest.hex())).unwrap();
    for _ in 0..2 {
        let LockedBase::Archive { digest: found, .. } =
            kitchen.lock(&at(&digest), None, None).await.lock.base
        else {
            panic!()
        };
        assert_eq!(found, digest);
    }
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 2, "once for each hash");

    fs::write(&file, b"no tar at all").unwrap();
    let plain = kitchen.lock("  from: { archive: root.tar.zst }", None, None).await;
    let wrong = kitchen.baker.bake(&plain.lock, kitchen.run(5)).await.unwrap_err().to_string();
    assert!(wrong.contains("archive") && wrong.contains("tar"), "{wrong}");
    kitchen.assert_nothing_is_left();
}

/// A server of one file, and how often it was asked for.
fn serve(content: Vec<u8>) -> (String, Arc<std::sync::atomic::AtomicUsize>) {
    use std::io::{BufRead as _, BufReader, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/root.tar.zst", listener.local_addr().unwrap());
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let head = BufReader::new(stream.try_clone().unwrap()).lines();
            head.map_while(Result::ok).take_while(|line| !line.is_empty()).for_each(drop);
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", content.len());
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&content));
        }
    });
    (url, asked)
}

async fn a_child_adds_to_its_parent(kitchen: &Kitchen, parent: &BakedImage) {
    // An overridden mode makes the second packages step dpkg's own work.
    let child = "  from: { server: base }
  steps:
    - packages: [cpio]
    - run: dpkg-statoverride --add root root 0600 /etc/motd
    - packages: [ed]";
    let debian = DebianRoot {
        suite: Some("bookworm".to_owned()),
        archives: Vec::new(),
        context: kitchen.folder.path().to_owned(),
    };
    let parent_image = ParentImage { digest: parent.digest, debian: Some(debian) };
    let resolution = kitchen.lock(child, Some(parent_image), None).await;
    let added = |at: usize| match &resolution.lock.steps[at] {
        LockedStep::Packages { packages, .. } => packages.iter().map(|p| p.name.clone()).collect::<Vec<_>>(),
        _ => Vec::new(),
    };
    assert_eq!((added(0), added(2)), (vec!["cpio".to_owned()], vec!["ed".to_owned()]));
    let image = kitchen.bake(&resolution.lock, 3).await;
    assert_eq!(image.layers.len(), parent.layers.len() + 3);
    assert_eq!(image.layers[..parent.layers.len()], parent.layers);
    let status = kitchen.read(&image, "var/lib/dpkg/status").unwrap();
    let status = deb822::parse(&status).unwrap();
    for name in ["nginx-light", "cpio", "ed"] {
        let package = status.iter().find(|p| p.get("Package") == Some(name)).unwrap();
        assert_eq!(package.get("Status"), Some("install ok installed"), "{name}");
    }
    assert!(
        kitchen.log.lock().unwrap().iter().any(|line| line.starts_with("dpkg unpacks these packages itself"))
    );
    kitchen.assert_nothing_is_left();
}

async fn what_never_ends_is_ended(kitchen: &Kitchen, base: &Lock) {
    let with = |script: &str| {
        let mut lock = base.clone();
        lock.steps.push(LockedStep::Run {
            script: script.to_owned(),
            reach: Reach::default(),
            archives: None,
        });
        lock
    };
    // Cancelled while it runs, with children of its own.
    let run = kitchen.run(4);
    let cancel = run.cancel.clone();
    let sink = Arc::clone(&run.log);
    let begun = BakeRun {
        log: Arc::new(move |line| {
            if line == "begun" {
                cancel.cancel();
            }
            sink(line);
        }),
        ..run
    };
    let result = kitchen.baker.bake(&with("sleep 1000 & echo begun; sleep 1000"), begun).await;
    assert!(matches!(result, Err(BakeError::Cancelled)), "{result:?}");
    kitchen.assert_nothing_is_left();

    // What is out of reach.
    let home = kitchen.folder.path().display();
    let key = format!("cat {home}/signing.key");
    let all = format!("ls {home} /run/kiln-bake-{}", kitchen.site);
    for (what, script) in [
        ("the network", "exec 3<>/dev/tcp/192.0.2.1/80"),
        ("the signing key", key.as_str()),
        ("the machine's folders", &all),
        ("its devices", "cat /dev/vda /dev/sda /dev/mem"),
        // CVE-2024-21626: a folder of the machine that the runtime has left open.
        (
            "a descriptor that leads out",
            "for fd in {3..20}; do [ -d /proc/self/fd/$fd/. ] && exit 0; done; exit 1",
        ),
        ("processes of others", "[ $(ls -d /proc/[0-9]* | wc -l) -gt 8 ]"),
        ("a mount", "mount -t tmpfs none /mnt"),
        ("a device", "mknod /mnt/d b 254 0"),
        ("kernel settings", "echo 1 > /proc/sys/kernel/sysrq"),
        ("a namespace", "unshare -U true"),
    ] {
        let lock = with(&format!("bash -c '{script}'"));
        let result = kitchen.baker.bake(&lock, kitchen.run(5)).await;
        assert!(matches!(result, Err(BakeError::Step { .. })), "{what}: {result:?}");
    }
    kitchen.assert_nothing_is_left();

    // What a builder that was killed left over.
    let work = work::Work::new(&kitchen.site, &"web-b6".parse().unwrap(), 1 << 20).unwrap();
    fs::write(work.path().join("x"), "x").unwrap();
    std::mem::forget(work);
    kitchen.baker.sweep().await.unwrap();
    kitchen.assert_nothing_is_left();
}

#[tokio::test]
async fn what_is_wrong_is_said_in_words() {
    let kitchen = Kitchen::new("be000003", BakeLimits::default());
    let context = kitchen.folder.path().join("context");
    fs::create_dir(&context).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", context.join("link")).unwrap();
    fs::write(context.join("template"), "{{ nothing }}").unwrap();
    let refused = async |image: &str| {
        let text = format!("apiVersion: kiln/v1\nname: web\nimage:\n{image}\n  command: [x]\n");
        let definition = kiln_model::definition::parse(text.as_bytes(), "server.yaml").unwrap();
        let request = ResolveRequest {
            definition: &definition,
            context: &context,
            parent: None,
            timestamp: Timestamp::UNIX_EPOCH,
            pinned: None,
            current: None,
            log: kitchen.sink(),
        };
        kitchen.baker.resolve(request).await.unwrap_err().to_string()
    };
    let scratch = "  from: scratch\n  steps:\n    - ";
    for (image, words) in [
        (format!("{scratch}files: [{{ src: missing, dest: /x }}]"), "not in the definition's folder"),
        (format!("{scratch}files: [{{ src: link, dest: /x }}]"), "leads out of the definition's folder"),
        (format!("{scratch}files: [{{ src: template, dest: /x, template: true }}]"), "template template:1:1"),
        ("  from: { server: base }".to_owned(), "has no image yet"),
        ("  from: { debian: nosuchsuite }".to_owned(), "have an archive for it"),
        (
            "  from: { debian: bookworm }\n  steps:\n    - packages: [no-such-package]".to_owned(),
            "Unable to locate package no-such-package",
        ),
    ] {
        let why = refused(&image).await;
        assert!(why.contains(words), "{image}: {why}");
    }
    let key = Path::new("/nowhere/signing.key");
    let config =
        BakeConfig { signing_keys: vec![KeyOf::File(key.to_owned())], ..(*kitchen.baker.config).clone() };
    assert!(Baker::new(config).is_err());
}

#[tokio::test]
async fn files_alone_make_an_image() {
    let kitchen = Kitchen::new("be000004", BakeLimits::default());
    let image = "  from: scratch\n  steps:\n    - files: [{ src: site/, dest: /srv, mode: '0600' }]";
    let resolution = kitchen.lock(image, None, None).await;
    let image = kitchen.bake(&resolution.lock, 1).await;
    assert_eq!(kitchen.read(&image, "srv/index.html").unwrap(), "Hello");
    kitchen.assert_nothing_is_left();
}

/// Each in a step on top of a base that is there, so that the bound is all that ends it.
#[tokio::test(flavor = "multi_thread")]
async fn what_takes_too_much_is_ended_within_its_bound_and_leaves_nothing() {
    let kitchen = Kitchen::new("be000005", BakeLimits::default());
    let base = kitchen.lock("  from: { debian: bookworm, variant: essential }", None, None).await.lock;
    kitchen.bake(&base, 1).await;
    let lax = BakeLimits { step: Duration::from_secs(60), ..BakeLimits::default() };
    let cases = [
        (
            "time",
            BakeLimits { step: Duration::from_secs(2), ..BakeLimits::default() },
            "sleep 1000 & sleep 1000",
            "did not end within 2 s",
        ),
        (
            "processes",
            BakeLimits { pids: 32, ..lax.clone() },
            "n=0; while [ $n -lt 200 ]; do sleep 1000 & n=$((n + 1)); done; wait",
            "fork",
        ),
        ("memory", BakeLimits { memory: 64 << 20, ..lax.clone() }, "tail /dev/zero", "137"),
        (
            "a full tree",
            BakeLimits { tree: 64 << 20, ..lax.clone() },
            "dd if=/dev/zero of=/var/full bs=1M count=500",
            "No space left",
        ),
    ];
    for (number, (what, limits, script, words)) in (2..).zip(cases) {
        let config = BakeConfig { limits, ..(*kitchen.baker.config).clone() };
        let baker = Baker::new(config).unwrap();
        let mut lock = base.clone();
        lock.steps.push(LockedStep::Run {
            script: script.to_owned(),
            reach: Reach::default(),
            archives: None,
        });
        let began = std::time::Instant::now();
        let ended = baker.bake(&lock, kitchen.run(number)).await.unwrap_err();
        assert!(matches!(ended, BakeError::Step { .. }), "{what}: {ended}");
        assert!(ended.to_string().to_lowercase().contains(&words.to_lowercase()), "{what}: {ended}");
        assert!(began.elapsed() < Duration::from_secs(50), "{what}: {:?}", began.elapsed());
        kitchen.assert_nothing_is_left();
    }

    // Of what an image may be large by, little is in the builder's memory at once.
    let mut lock = base;
    let script = "head -c 700M /dev/urandom >/var/large".to_owned();
    lock.steps.push(LockedStep::Run { script, reach: Reach::default(), archives: None });
    kitchen.bake(&lock, 7).await;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB")).unwrap();
    let peak: u64 = peak.trim().parse().unwrap();
    println!("{peak} KiB at most");
    assert!(peak < 300 << 10, "{peak} KiB");
}
