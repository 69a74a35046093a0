//! Signatures that are good, of what they were not made for.

use ed25519_dalek::VerifyingKey;
use kiln_model::digest::Digest;
use serde_json::{Value, json};

use super::KeyId;
use crate::store::tests::{image, key, store};
use crate::{ImageStore, Thoroughness};

fn public(seed: u8) -> VerifyingKey {
    key(seed).verifying_key()
}

fn refusal(store: &ImageStore, image: &Digest, trusted: &[VerifyingKey]) -> String {
    store.verify(image, trusted, 1, Thoroughness::Manifest).unwrap_err().to_string()
}

fn read(store: &ImageStore, digest: &Digest) -> Value {
    serde_json::from_slice(&store.manifest(digest).unwrap()).unwrap()
}

/// Whoever can write the store can write whatever names a signature, and sign nothing.
#[test]
fn a_good_signature_of_one_image_says_nothing_of_another() {
    let (_folder, store) = store();
    let (one, two) = (image(&store, &["one"]), image(&store, &["two"]));
    store.sign(&one, &key(1).into()).unwrap();
    let mut manifest = read(&store, &store.signatures_of(&one).unwrap()[0]);
    manifest["subject"]["digest"] = json!(two);
    manifest["subject"]["size"] = json!(store.image(&two).unwrap().size);
    let (wrapped, _) = store.put_json(&manifest).unwrap();
    store.adopt(&two, &[wrapped]).unwrap();
    assert_eq!(store.signatures_of(&two).unwrap(), [wrapped]);
    let refused = refusal(&store, &two, &[public(1)]);
    assert!(refused.contains("a good signature, but of another image"), "{refused}");
    // Nor does it keep a good one from being found.
    store.sign(&two, &key(2).into()).unwrap();
    assert!(store.verify(&two, &[public(1), public(2)], 1, Thoroughness::Manifest).is_ok());
    assert!(store.verify(&two, &[public(1), public(2)], 2, Thoroughness::Manifest).is_err());
}

#[test]
fn the_signature_of_a_key_that_was_dropped_lets_nothing_run_when_it_is_put_back() {
    let (_folder, before) = store();
    let image = image(&before, &["one"]);
    before.sign(&image, &key(1).into()).unwrap();
    let old = before.signatures_of(&image).unwrap()[0];
    before.sign(&image, &key(2).into()).unwrap();
    assert!(before.verify(&image, &[public(1), public(2)], 2, Thoroughness::Manifest).is_ok());
    assert!(before.verify(&image, &[public(2)], 1, Thoroughness::Manifest).is_ok());

    // The old one alone, as in a store of before the new key signed.
    let (_other, after) = store();
    for blob in before.blobs_of(&image).unwrap() {
        after.put_blob(&mut before.open_blob(&blob).unwrap().0, Some(&blob)).unwrap();
    }
    after.adopt(&image, &[old]).unwrap();
    assert!(after.verify(&image, &[public(1)], 1, Thoroughness::Manifest).is_ok());
    let refused = refusal(&after, &image, &[public(2)]);
    assert!(refused.contains(&format!("signed by {}", KeyId::of(&public(1)))), "{refused}");

    // Under the name of the new key.
    let mut manifest = read(&after, &old);
    let mut envelope = read(&after, &manifest["layers"][0]["digest"].as_str().unwrap().parse().unwrap());
    envelope["signatures"][0]["keyid"] = json!(KeyId::of(&public(2)).to_string());
    let (digest, size) = after.put_json(&envelope).unwrap();
    manifest["layers"][0]["digest"] = json!(digest);
    manifest["layers"][0]["size"] = json!(size);
    let (renamed, _) = after.put_json(&manifest).unwrap();
    after.adopt(&image, &[renamed]).unwrap();
    let refused = refusal(&after, &image, &[public(2)]);
    assert!(refused.contains("no signature by a trusted key"), "{refused}");
}
