//! What Kiln says about an image, taken by tools that know nothing of Kiln.

use ed25519_dalek::pkcs8::EncodePublicKey as _;
use kiln_image::COSIGN_SIGNATURE;
use kiln_model::cause::{Cause, CauseKind};
use serde_json::Value;

use super::*;

/// `$1` is an envelope, `$2` the key that has to have signed it.
const DSSE: &str = r#"
    type=$(jq -r .payloadType "$1")
    jq -r .payload "$1" | base64 -d >payload
    { printf 'DSSEv1 %d %s %d ' ${#type} "$type" "$(wc -c <payload)"; cat payload; } >signed
    jq -r '.signatures[0].sig' "$1" | base64 -d >signature
    openssl pkeyutl -verify -pubin -inkey "$2" -rawin -in signed -sigfile signature"#;

/// `$1` is the artifact's manifest, `$2` the key that has to have signed it, `$3` where blobs are.
const COSIGN: &str = r#"
    payload=$3/$(jq -r '.layers[0].digest' "$1" | cut -d : -f 2)
    jq -r '.layers[0].annotations["dev.cosignproject.cosign/signature"]' "$1" | base64 -d >signature
    openssl pkeyutl -verify -pubin -inkey "$2" -rawin -in "$payload" -sigfile signature
    cp "$payload" payload"#;

pub(super) async fn others_check_what_is_said_of_it(kitchen: &Kitchen, image: &BakedImage, lock: &Lock) {
    let begun = Timestamp::from_second(1_790_000_000).unwrap();
    let made = Provenance {
        build: "web-b1".parse().unwrap(),
        lock: lock.clone(),
        lock_key: lock.key().unwrap(),
        definition: Digest::of(b"definition"),
        commit: "0123456789abcdef0123456789abcdef01234567".to_owned(),
        cause: Cause {
            kind: CauseKind::Manual,
            id: "asked-1".to_owned(),
            summary: "asked for".to_owned(),
            actor: "ann".to_owned(),
            time: begun,
            traceparent: String::new(),
        },
        begun,
        ended: begun,
    };
    let id = kitchen.baker.sign(image.digest, &made).await.unwrap();
    let store = kitchen.store();
    let trusted = SigningKey::from_bytes(&[7; 32]).verifying_key();
    let verified = store.verify(&image.digest, &[trusted], 1, Thoroughness::Blobs).unwrap();
    assert_eq!(verified.first().unwrap().to_string(), id);

    let statement = payload_of(
        kitchen,
        DSSE,
        &store.attached(&image.digest, describe::PROVENANCE, 1 << 20).unwrap().unwrap(),
    );
    assert_eq!(statement["subject"][0]["digest"]["sha256"], image.digest.hex());
    assert_eq!(statement["predicateType"], "https://slsa.dev/provenance/v1");
    let inputs = statement["predicate"]["buildDefinition"]["resolvedDependencies"].as_array().unwrap();
    let packages = inputs.iter().filter(|it| it["name"].as_str().unwrap().ends_with(".deb")).count();
    assert_eq!(packages, lock.packages().len());
    assert!(inputs.iter().any(|it| it["name"] == "/etc/motd" && it["digest"]["sha256"] == Digest::of(b"web in here").hex()));

    let referrers = store.referrers_of(&image.digest).unwrap();
    let cosign = referrers.iter().find(|it| it.artifact_type == COSIGN_SIGNATURE).unwrap();
    let payload = payload_of(kitchen, COSIGN, &fs::read(blobs(kitchen).join(cosign.digest.hex())).unwrap());
    assert_eq!(payload["critical"]["image"]["docker-manifest-digest"], image.digest.to_string());

    // Signed again, by the same key and of the same build: nothing more is said.
    kitchen.baker.sign(image.digest, &made).await.unwrap();
    assert_eq!(store.referrers_of(&image.digest).unwrap().len(), referrers.len());

    let sbom = store.attached(&image.digest, describe::SBOM, 64 << 20).unwrap().unwrap();
    let file = kitchen.folder.path().join("sbom.json");
    fs::write(&file, &sbom).unwrap();
    let validated = Command::new("cyclonedx-validate").arg(&file).output().expect("tests/tools.sh brings it");
    assert!(validated.status.success(), "{}", String::from_utf8_lossy(&validated.stderr));
    let sbom: Value = serde_json::from_slice(&sbom).unwrap();
    let components = sbom["components"].as_array().unwrap();
    let listed: BTreeSet<_> = components
        .iter()
        .filter(|it| it["type"] == "library")
        .map(|it| (it["name"].as_str().unwrap().to_owned(), it["version"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(listed, lock.packages().into_iter().collect());
    let without: Vec<_> =
        components.iter().filter(|it| it["type"] == "library" && it.get("licenses").is_none()).collect();
    assert!(without.len() * 10 < listed.len(), "no licence is told of {without:?}");
}

fn blobs(kitchen: &Kitchen) -> PathBuf {
    kitchen.folder.path().join("images/blobs/sha256")
}

/// What was signed, once openssl has found the signature good.
fn payload_of(kitchen: &Kitchen, script: &str, signed: &[u8]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("said"), signed).unwrap();
    let key = SigningKey::from_bytes(&[7; 32]).verifying_key().to_public_key_pem(Default::default()).unwrap();
    fs::write(folder.path().join("key"), key).unwrap();
    let checked = Command::new("sh")
        .args(["-euc", script, "sh", "said", "key"])
        .arg(blobs(kitchen))
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    serde_json::from_slice(&fs::read(folder.path().join("payload")).unwrap()).unwrap()
}
