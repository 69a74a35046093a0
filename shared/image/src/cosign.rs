//! A signature as cosign makes and checks it, for those who verify images with other tools than Kiln's.
//! Source: cosign's specifications of signatures and of simple signing payloads.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use kiln_model::digest::Digest;
use serde_json::json;

use crate::error::Error;
use crate::referrers::Part;
use crate::signer::Signer;
use crate::store::ImageStore;

/// The artifact type of cosign's signatures.
pub const COSIGN_SIGNATURE: &str = "application/vnd.dev.cosign.artifact.sig.v1+json";
const PAYLOAD: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";

impl ImageStore {
    /// Signs an image for cosign. Signing it again with the same key changes nothing.
    pub(crate) fn sign_for_cosign(&self, image: &Digest, signer: &Signer) -> Result<(), Error> {
        let payload = json!({
            "critical": {
                // An image has many names, and is signed before it has any.
                "identity": {"docker-reference": ""},
                "image": {"docker-manifest-digest": image},
                "type": "cosign container image signature",
            },
            "optional": null,
        })
        .to_string();
        let signature = BASE64.encode(signer.sign(payload.as_bytes())?.to_bytes());
        let annotations = BTreeMap::from([(ANNOTATION.to_owned(), signature)]);
        let part = Part { media_type: PAYLOAD, content: payload.as_bytes(), annotations };
        self.attach(image, COSIGN_SIGNATURE, &part).map(drop)
    }
}
