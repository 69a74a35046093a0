//! DSSE: a payload, its type, and signatures of both. Source: the DSSE specification, version 1.0.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, VerifyingKey};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::Error;
use crate::signature::KeyId;
use crate::signer::Signer;

pub(crate) const MEDIA_TYPE: &str = "application/vnd.dsse.envelope.v1+json";
/// Whoever can write the store must not be able to make verification long.
const SIGNATURES: usize = 64;

#[derive(Serialize, Deserialize)]
struct Envelope {
    #[serde(rename = "payloadType")]
    payload_type: String,
    payload: String,
    signatures: Vec<EnvelopeSignature>,
}

#[derive(Serialize, Deserialize)]
struct EnvelopeSignature {
    keyid: String,
    sig: String,
}

/// An envelope that was read; who signed it is not looked at yet.
pub(crate) struct Opened {
    /// Nobody's word until it is known who signed it.
    pub(crate) payload: Vec<u8>,
    signed: Vec<u8>,
    signatures: Vec<EnvelopeSignature>,
}

/// An envelope around a payload, signed by each of the signers.
///
/// # Errors
/// A signer does not sign.
pub(crate) fn seal(payload_type: &str, payload: &str, signers: &[Signer]) -> Result<String, Error> {
    let signed = pre_authentication_encoding(payload_type, payload.as_bytes());
    let signatures = signers.iter().map(|signer| {
        let signature = BASE64.encode(signer.sign(&signed)?.to_bytes());
        Ok(json!({"keyid": signer.id().to_string(), "sig": signature}))
    });
    let signatures = signatures.collect::<Result<Vec<_>, Error>>()?;
    let payload = BASE64.encode(payload);
    Ok(json!({"payloadType": payload_type, "payload": payload, "signatures": signatures}).to_string())
}

/// Reads an envelope of a payload of that type.
///
/// # Errors
/// Says what it is not.
pub(crate) fn read(content: &[u8], payload_type: &str) -> Result<Opened, String> {
    let envelope: Envelope = serde_json::from_slice(content).map_err(|e| format!("envelope: {e}"))?;
    if envelope.payload_type != payload_type {
        return Err(format!("the envelope's payload type is not {payload_type}"));
    }
    let payload = BASE64.decode(&envelope.payload).map_err(|e| format!("payload: {e}"))?;
    let signed = pre_authentication_encoding(payload_type, &payload);
    Ok(Opened { payload, signed, signatures: envelope.signatures })
}

impl Opened {
    /// Those of the keys that signed it.
    pub(crate) fn signers(&self, trusted: &[VerifyingKey]) -> BTreeSet<KeyId> {
        let good = self.signatures.iter().take(SIGNATURES).filter_map(|signature| {
            let bytes = BASE64.decode(&signature.sig).ok()?;
            let parsed = Signature::from_slice(&bytes).ok()?;
            trusted.iter().find(|key| key.verify_strict(&self.signed, &parsed).is_ok()).map(KeyId::of)
        });
        good.collect()
    }

    /// Whoever it says signed it, for people.
    pub(crate) fn said_signers(&self) -> String {
        let named = self.signatures.iter().take(4);
        named.map(|it| it.keyid.chars().take(64).collect::<String>()).collect::<Vec<_>>().join(", ")
    }
}

/// What is signed: type and payload with their lengths, so that neither can be taken for the other.
fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    bytes.extend_from_slice(payload);
    bytes
}
