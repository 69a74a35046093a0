use proptest::prelude::*;
use serde_json::json;

use super::*;

fn descriptor(media_type: &str, content: &str) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(content.as_bytes()), "size": content.len()})
}

fn manifest() -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPES[0],
        "config": descriptor(CONFIG_TYPES[0], "config"),
        "layers": [descriptor(LAYER_TYPES[0], "one"), descriptor(LAYER_TYPES[1], "two")],
    })
}

fn index() -> Value {
    let entry = |os: &str, architecture: &str| {
        let mut entry = descriptor(MANIFEST_TYPES[0], &format!("{os}{architecture}"));
        entry["platform"] = json!({"os": os, "architecture": architecture});
        entry
    };
    json!({
        "schemaVersion": 2,
        "mediaType": INDEX_TYPES[0],
        "manifests": [entry("windows", "amd64"), entry("linux", "arm64"), entry("linux", "amd64"), entry("unknown", "unknown")],
    })
}

fn read(value: &Value) -> Result<Foreign, String> {
    foreign(value.to_string().as_bytes(), "amd64")
}

/// With something put in the place of what is there.
fn with(mut value: Value, at: &str, other: Value) -> Value {
    *value.pointer_mut(at).unwrap() = other;
    value
}

#[test]
fn a_manifest_names_configuration_and_layers() {
    let Ok(Foreign::Manifest(found)) = read(&manifest()) else { panic!("{:?}", read(&manifest())) };
    assert_eq!(found.config, Blob { digest: Digest::of(b"config"), size: 6 });
    let digests: Vec<_> = found.layers.iter().map(|layer| layer.digest).collect();
    assert_eq!(digests, [Digest::of(b"one"), Digest::of(b"two")]);
    let docker = with(manifest(), "/mediaType", json!(MANIFEST_TYPES[1]));
    let docker = with(docker, "/config/mediaType", json!(CONFIG_TYPES[1]));
    assert_eq!(
        read(&with(docker, "/layers/0/mediaType", json!(LAYER_TYPES[4]))),
        Ok(Foreign::Manifest(found.clone()))
    );
    let mut silent = manifest();
    silent.as_object_mut().unwrap().remove("mediaType");
    assert_eq!(read(&silent), Ok(Foreign::Manifest(found)));
}

#[test]
fn of_several_manifests_the_one_for_the_machine_is_taken() {
    let of = |content: &str| {
        Foreign::Index(Blob { digest: Digest::of(content.as_bytes()), size: content.len() as u64 })
    };
    assert_eq!(read(&index()), Ok(of("linuxamd64")));
    assert_eq!(foreign(index().to_string().as_bytes(), "arm64"), Ok(of("linuxarm64")));
    let why = foreign(index().to_string().as_bytes(), "s390x").unwrap_err();
    assert!(why.contains("nothing for linux/s390x") && why.contains("linux/arm64"), "{why}");
}

#[test]
fn what_could_be_read_in_two_ways_or_leads_elsewhere_is_refused() {
    let mut both = manifest();
    both["manifests"] = index()["manifests"].clone();
    let entry = |at: &str, other: Value| with(index(), &format!("/manifests/2/{at}"), other);
    let mut elsewhere = manifest();
    elsewhere["layers"][0]["urls"] = json!(["http://127.0.0.1/layer"]);
    let many = with(manifest(), "/layers", json!(vec![descriptor(LAYER_TYPES[0], "x"); LAYERS_LIMIT + 1]));
    for (what, value) in [
        ("layers and manifests", both),
        ("an index that says it is a manifest", with(index(), "/mediaType", json!(MANIFEST_TYPES[0]))),
        ("a manifest that says it is an index", with(manifest(), "/mediaType", json!(INDEX_TYPES[0]))),
        ("a type that is no text", with(manifest(), "/mediaType", json!(7))),
        ("an index in an index", entry("mediaType", json!(INDEX_TYPES[0]))),
        ("a digest that is a path", entry("digest", json!("sha256:../../etc/passwd"))),
        ("a digest in upper case", entry("digest", json!(Digest::of(b"x").to_string().to_uppercase()))),
        ("another algorithm", entry("digest", json!("sha512:00"))),
        ("a negative size", entry("size", json!(-1))),
        ("a size of too many digits", entry("size", json!(1e300))),
        ("the first version", with(manifest(), "/schemaVersion", json!(1))),
        (
            "something that is no image",
            with(manifest(), "/config/mediaType", json!("application/vnd.cncf.helm.config.v1+json")),
        ),
        ("an endless configuration", with(manifest(), "/config/size", json!(u64::MAX))),
        (
            "a layer of another kind",
            with(
                manifest(),
                "/layers/0/mediaType",
                json!("application/vnd.oci.image.layer.nondistributable.v1.tar"),
            ),
        ),
        ("a layer elsewhere", elsewhere),
        ("too many layers", many),
        ("nothing", json!({"schemaVersion": 2})),
        ("a list", json!([])),
    ] {
        assert!(read(&value).is_err(), "{what} is taken: {value}");
    }
    for text in ["", "{", &"[".repeat(100_000), r#"{"schemaVersion": 2, "layers": [], "layers": []}"#] {
        assert!(foreign(text.as_bytes(), "amd64").is_err());
    }
}

#[test]
fn a_layout_says_which_image_is_meant() {
    let mut entry = descriptor(MANIFEST_TYPES[0], "one");
    let one = json!({"schemaVersion": 2, "manifests": [entry.clone()]});
    let blob = Blob { digest: Digest::of(b"one"), size: 3 };
    assert_eq!(layout(one.to_string().as_bytes(), None), Ok(blob));
    assert!(layout(one.to_string().as_bytes(), Some("v1")).is_err());
    entry["annotations"] = json!({NAME: "v1"});
    let two = json!({"schemaVersion": 2, "manifests": [descriptor(MANIFEST_TYPES[0], "two"), entry]});
    assert_eq!(layout(two.to_string().as_bytes(), Some("v1")), Ok(blob));
    assert!(layout(two.to_string().as_bytes(), None).unwrap_err().contains("several"));
    let why = layout(two.to_string().as_bytes(), Some("v2")).unwrap_err();
    assert!(why.contains("v1"), "{why}");
    assert!(layout(br#"{"schemaVersion": 2, "manifests": []}"#, None).is_err());
}

#[test]
fn a_configuration_fits_machine_and_layers() {
    let ids = [Digest::of(b"a"), Digest::of(b"b")];
    let good = json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PATH=/usr/local/bin:/usr/bin", "EMPTY=", "TWO=a=b"], "Cmd": ["x"]},
        "rootfs": {"type": "layers", "diff_ids": ids},
    });
    let read = |value: &Value| config(value.to_string().as_bytes(), "amd64", 2);
    let found = read(&good).unwrap();
    assert_eq!(found.diff_ids, ids);
    assert_eq!(found.env["PATH"], "/usr/local/bin:/usr/bin");
    assert_eq!((found.env["EMPTY"].as_str(), found.env["TWO"].as_str()), ("", "a=b"));
    assert_eq!(read(&with(good.clone(), "/config", Value::Null)).unwrap().env, BTreeMap::new());
    for (at, other) in [
        ("/architecture", json!("arm64")),
        ("/os", json!("windows")),
        ("/rootfs/diff_ids", json!([ids[0]])),
        ("/rootfs/diff_ids/0", json!("sha256:../x")),
        ("/config/Env/0", json!("=x")),
        ("/config/Env/0", json!("x")),
        ("/config/Env/0", json!("A=\0")),
        ("/config/Env", json!("PATH=/bin")),
    ] {
        assert!(read(&with(good.clone(), at, other.clone())).is_err(), "{at} {other}");
    }
}

proptest! {
    /// Whatever bytes come, they are taken or refused.
    #[test]
    fn bytes_end_no_reader(content: Vec<u8>) {
        let _ = foreign(&content, "amd64");
        let _ = layout(&content, None);
        let _ = config(&content, "amd64", 1);
    }

    /// A good one with a part cut out, doubled or changed.
    #[test]
    fn a_changed_manifest_ends_no_reader(at in 0_usize..600, length in 0_usize..80, by: Vec<u8>) {
        for text in [manifest().to_string(), index().to_string()] {
            let mut bytes = text.into_bytes();
            let at = at.min(bytes.len());
            let end = (at + length).min(bytes.len());
            bytes.splice(at..end, by.iter().copied());
            let _ = foreign(&bytes, "amd64");
            let _ = layout(&bytes, Some("v1"));
        }
    }
}
