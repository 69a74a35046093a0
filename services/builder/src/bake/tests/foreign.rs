//! Images that begin with one that others have made: out of a layout, and out of a real registry with a password.

use std::net::Ipv4Addr;

use kiln_service::config::Registry as Settings;
use kiln_test_servers::registry::{CREDENTIALS, PASSWORD, Registry};
use serde_json::{Value, json};

use super::*;

pub(super) const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// A site's settings for it, with credentials in a file of docker's.
pub(super) fn settings(registry: &Registry) -> (Settings, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    registry.write_credentials(file.path(), HERE, CREDENTIALS).unwrap();
    let settings = Settings {
        repository: registry.repository(HERE).parse().unwrap(),
        ca: None,
        credentials: Some(file.path().to_owned()),
        mount_from: Vec::new(),
    };
    (settings, file)
}

/// Puts an image of a layout there, as `app`.
pub(super) fn push(registry: &Registry, layout: &Path, tag: &str) {
    succeeds(
        Command::new("skopeo")
            .args(["copy", "--quiet", "--dest-tls-verify=false", "--dest-creds"])
            .arg(format!("kiln:{PASSWORD}"))
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{}/app:{tag}", registry.host(HERE))),
    );
}

/// An image of one layer for each tar, as a layout.
pub(super) fn layout(folder: &Path, layers: &[Vec<u8>], env: &[&str]) {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |content: &[u8]| {
        let digest = Digest::of(content);
        fs::write(blobs.join(digest.hex()), content).unwrap();
        (digest, content.len())
    };
    let blob = |media_type: &str, (digest, size): (Digest, usize)| -> Value {
        json!({"mediaType": media_type, "digest": digest, "size": size})
    };
    let packed: Vec<Value> = layers
        .iter()
        .map(|tar| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            std::io::Write::write_all(&mut encoder, tar).unwrap();
            blob("application/vnd.oci.image.layer.v1.tar+gzip", put(&encoder.finish().unwrap()))
        })
        .collect();
    let diff_ids: Vec<Digest> = layers.iter().map(|tar| Digest::of(tar)).collect();
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Env": env},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = blob("application/vnd.oci.image.config.v1+json", put(config.to_string().as_bytes()));
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": packed});
    let manifest = blob(MANIFEST, put(manifest.to_string().as_bytes()));
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// The tar of a folder that is made by a shell script.
pub(super) fn tar(script: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    succeeds(Command::new("sh").args(["-ec", script]).current_dir(folder.path()));
    let output = Command::new("tar").args(["-c", "--sort=name", "."]).current_dir(folder.path()).output();
    output.unwrap().stdout
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_layout_is_begun_with_and_packages_are_added() {
    let kitchen = Kitchen::new("be00000b", BakeLimits::default());
    let base = kitchen.lock("  from: { debian: bookworm }", None, None).await;
    let base = kitchen.bake(&base.lock, 1).await;
    let layer = kitchen.folder.path().join("images/blobs/sha256").join(base.layers[0].digest.hex());
    let folder = kitchen.folder.path().join("context/base");
    let more =
        tar("mkdir -p opt etc var/cache; echo new >opt/new; touch etc/.wh.motd var/cache/.wh..wh..opq");
    layout(&folder, &[fs::read(layer).unwrap(), more], &["PATH=/opt/bin:/usr/bin:/bin", "FROM=base"]);

    let begun = "  from: { image: 'oci:base' }\n  env: { PLACE: here }\n  steps:\n    - packages: [ed]\n    \
                 - run: 'test \"$FROM$PLACE\" = basehere && test \"${PATH%%:*}\" = /opt/bin'";
    let resolution = kitchen.lock(begun, None, None).await;
    let LockedBase::Image { digest, .. } = &resolution.lock.base else {
        panic!("{:?}", resolution.lock.base)
    };
    let index = read(&folder.join("index.json"));
    assert_eq!(index["manifests"][0]["digest"], digest.to_string());
    let [LockedStep::Packages { packages, .. }, _] = resolution.lock.steps.as_slice() else { panic!() };
    assert_eq!(packages.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["ed"]);
    // What it takes is kept with the lock.
    fs::remove_dir_all(&folder).unwrap();
    let image = kitchen.bake(&resolution.lock, 2).await;
    assert_eq!(kitchen.read(&image, "opt/new").unwrap(), "new\n");
    let tree = kitchen.store().layer_tree(&image.layers[0].digest).unwrap();
    assert!(
        !tree.join("etc/motd").exists() && fs::read_dir(tree.join("var/cache")).unwrap().next().is_none()
    );
    assert!(kitchen.read(&image, "var/lib/dpkg/status").unwrap().contains("Package: ed\n"));
    let config = kitchen.store().image(&image.digest).unwrap().config;
    let env = config.config().as_ref().unwrap().env().clone().unwrap();
    assert_eq!(env, ["FROM=base", "PATH=/opt/bin:/usr/bin:/bin", "PLACE=here"]);
    kitchen.assert_nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_not_what_is_said_of_them_are_refused() {
    let kitchen = Kitchen::new("be00000c", BakeLimits::default());
    let folder = kitchen.folder.path().join("context/base");
    let begun = "  from: { image: 'oci:base' }";
    let good = tar("mkdir bin; echo one >bin/one");
    let refused = async |what: &str, wanted: &str| {
        let error = match kitchen.try_lock(begun, None, None).await {
            Err(error) => error,
            Ok(resolution) => kitchen.baker.bake(&resolution.lock, kitchen.run(1)).await.unwrap_err(),
        };
        let error = error.to_string();
        assert!(error.contains(wanted), "{what}: {error}");
        kitchen.assert_nothing_is_left();
        let _ = fs::remove_dir_all(&folder);
    };
    refused("nothing", "it is not in the definition's folder").await;

    // A byte more than what it has its name of.
    for (at, wanted) in
        [(0, "has the digest"), (1, "has the digest"), (2, "something else than its name says")]
    {
        layout(&folder, std::slice::from_ref(&good), &[]);
        let path = &parts(&folder)[at];
        let more = [fs::read(path).unwrap(), b" ".to_vec()].concat();
        fs::write(path, more).unwrap();
        refused(&path.display().to_string(), wanted).await;
    }

    // Well-formed, and its parts do not fit one another.
    layout(&folder, std::slice::from_ref(&good), &[]);
    relabel(&folder, |config| config["rootfs"]["diff_ids"] = json!([Digest::of(b"other")]));
    refused("another content", "the configuration says").await;
    layout(&folder, std::slice::from_ref(&good), &[]);
    relabel(&folder, |config| config["architecture"] = json!("arm64"));
    refused("another machine", "linux/arm64").await;
    layout(&folder, &[good, tar("ln -s /etc out"), tar("mkdir out; echo x >out/passwd")], &[]);
    let resolution = kitchen.lock(begun, None, None).await;
    let image = kitchen.bake(&resolution.lock, 2).await;
    assert_eq!(kitchen.read(&image, "out/passwd").unwrap(), "x\n", "a folder takes the place of a link");
    std::os::unix::fs::symlink("/etc", kitchen.folder.path().join("context/link")).unwrap();
    let error = kitchen.try_lock("  from: { image: 'oci:link' }", None, None).await.unwrap_err().to_string();
    assert!(error.contains("leads out of the definition's folder"), "{error}");
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn blob(folder: &Path, descriptor: &Value) -> PathBuf {
    folder.join("blobs").join(descriptor["digest"].as_str().unwrap().replace(':', "/"))
}

/// Where manifest, configuration and lowest layer of a layout's image lie.
fn parts(folder: &Path) -> [PathBuf; 3] {
    let manifest = blob(folder, &read(&folder.join("index.json"))["manifests"][0]);
    let content = read(&manifest);
    [manifest, blob(folder, &content["config"]), blob(folder, &content["layers"][0])]
}

/// Changes the configuration of a layout's image, and all digests with it.
fn relabel(folder: &Path, change: impl FnOnce(&mut Value)) {
    let put = |value: &Value, descriptor: &mut Value| {
        let text = value.to_string();
        descriptor["digest"] = json!(Digest::of(text.as_bytes()));
        descriptor["size"] = json!(text.len());
        fs::write(blob(folder, descriptor), text).unwrap();
    };
    let [manifest, config, _] = parts(folder);
    let (mut index, mut manifest, mut config) =
        (read(&folder.join("index.json")), read(&manifest), read(&config));
    change(&mut config);
    put(&config, &mut manifest["config"]);
    put(&manifest, &mut index["manifests"][0]);
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_a_registry_is_pinned_and_its_passing_failures_are_waited_out() {
    let mut registry = Registry::on_loopback().unwrap();
    let (settings, credentials) = settings(&registry);
    let host = registry.host(HERE);
    let kitchen = Kitchen::with_registry("be00000d", settings);
    registry.resume().await.unwrap();
    let local = tempfile::tempdir().unwrap();
    layout(local.path(), &[tar("mkdir etc; echo one >etc/which")], &[]);
    push(&registry, local.path(), "1");

    let begun = format!("  from: {{ image: '{host}/app:1' }}");
    let one = kitchen.lock(&begun, None, None).await.lock;
    // The tag moves on before the image was brought here.
    let local = tempfile::tempdir().unwrap();
    layout(local.path(), &[tar("mkdir etc; echo two >etc/which")], &[]);
    push(&registry, local.path(), "1");
    let image = kitchen.bake(&one, 1).await;
    assert_eq!(kitchen.read(&image, "etc/which").unwrap(), "one\n");
    let pinned = kitchen.lock(&begun, None, Some(&one)).await;
    assert_eq!((pinned.lock == one, pinned.release_files), (true, None));
    let two = kitchen.lock(&begun, None, None).await.lock;
    assert_ne!(two.key().unwrap(), one.key().unwrap());

    // It is away for a moment.
    registry.kill().unwrap();
    let (baked, ()) = tokio::join!(kitchen.bake(&two, 2), async {
        tokio::time::sleep(Duration::from_millis(1500)).await;
        registry.resume().await.unwrap();
    });
    assert_eq!(kitchen.read(&baked, "etc/which").unwrap(), "two\n");
    let log = kitchen.log.lock().unwrap().join("\n");
    assert!(log.contains("again in 1 s") && !log.contains(PASSWORD) && !log.contains(CREDENTIALS), "{log}");

    // What is not there, and who may not, is said at once, and the next build works.
    let missing = begun.replace("app:1", "app:2");
    let error = kitchen.try_lock(&missing, None, None).await.unwrap_err();
    assert!(error.is_transient() && error.to_string().contains("app:2"), "{error}");
    registry.write_credentials(credentials.path(), HERE, "a2lsbjp3cm9uZw==").unwrap();
    let error = kitchen.try_lock(&begun, None, None).await.unwrap_err().to_string();
    assert!(error.contains("unauthorized") || error.contains("authentication required"), "{error}");
    registry.write_credentials(credentials.path(), HERE, CREDENTIALS).unwrap();
    assert_eq!(kitchen.lock(&begun, None, None).await.lock, two);
    kitchen.assert_nothing_is_left();
}
