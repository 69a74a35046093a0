//! The check of a server's certificate: of this site, for this host, and of the service that was asked for.

use std::sync::Arc;

use kiln_model::name::SiteName;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::{DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

use crate::access::Role;
use crate::certificate::Certificate;

/// Adds to the usual check that the certificate is one of the service. The monitor's would be good for its own host
/// too: it must not pass for a node there.
#[derive(Debug)]
pub(super) struct Expect {
    usual: Arc<WebPkiServerVerifier>,
    site: SiteName,
    service: Role,
}

impl Expect {
    pub(super) fn new(
        roots: RootCertStore,
        provider: Arc<CryptoProvider>,
        site: SiteName,
        service: Role,
    ) -> Result<Self, String> {
        let usual = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self { usual, site, service })
    }
}

impl ServerCertVerifier for Expect {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        stapled: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.usual.verify_server_cert(certificate, others, name, stapled, now)?;
        let identity = Certificate::read(certificate).and_then(|read| read.identity(&self.site));
        match identity {
            Ok(identity) if identity.role() == self.service => Ok(verified),
            Ok(identity) => {
                Err(Error::General(format!("{} answers where the {} should", identity.name(), self.service)))
            }
            Err(why) => Err(Error::General(format!("the server's certificate names nobody: {why}"))),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.usual.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.usual.supported_verify_schemes()
    }
}
