//! Both ends of a client's handshake, as the files say at its moment.

use std::sync::Arc;

use tokio_rustls::rustls::client::ResolvesClientCert;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{DigitallySignedStruct, Error, SignatureScheme};

use super::expect::Expect;
use super::{TlsFiles, authorities, own, provider};
use crate::access::Role;
use crate::reloaded::Reloaded;

#[derive(Debug)]
pub(super) struct Latest(Reloaded<Ends>);

struct Ends {
    expected: Expect,
    shown: Arc<CertifiedKey>,
}

impl Latest {
    /// # Errors
    /// Names the file that can't be read or used.
    pub(super) fn new(files: &TlsFiles) -> Result<Self, String> {
        let site = files.site.clone();
        let ends = Reloaded::new(files.paths(), move |paths| {
            let [authority, identity] = paths else {
                return Err("the broker takes nobody without a certificate".to_owned());
            };
            let expected = Expect::new(authorities(authority)?, provider(), site.clone(), Role::Broker)?;
            let (chain, key) = own(identity)?;
            let shown = CertifiedKey::from_der(chain, key, &provider())
                .map_err(|error| format!("{} can't be used: {error}", identity.display()))?;
            Ok(Ends { expected, shown: Arc::new(shown) })
        });
        ends.map(Self)
    }
}

impl ResolvesClientCert for Latest {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.get().shown))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ServerCertVerifier for Latest {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.0.get().expected.verify_server_cert(certificate, others, name, stapled, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.get().expected.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.get().expected.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.get().expected.supported_verify_schemes()
    }
}
