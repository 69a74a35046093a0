//! What a certificate says: whom it is for, where, and from when until when.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_model::name::SiteName;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

use crate::access::Identity;

/// A certificate, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The URI among its names; there is one, or it names nobody.
    uri: Result<String, String>,
    /// Host names and addresses that a server with it may have.
    pub hosts: Vec<String>,
    pub issuer: String,
    pub subject: String,
    /// In hexadecimal digits.
    pub serial: String,
    pub from: SystemTime,
    pub until: SystemTime,
}

impl Certificate {
    /// # Errors
    /// Where it is no X.509 certificate of version 3.
    pub fn read(der: &[u8]) -> Result<Self, String> {
        let (rest, found) =
            X509Certificate::from_der(der).map_err(|error| format!("it is no certificate: {error}"))?;
        if !rest.is_empty() {
            return Err("something follows the certificate".to_owned());
        }
        let names = found.subject_alternative_name().map_err(|error| format!("its names: {error}"))?;
        let mut uris = Vec::new();
        let mut hosts = Vec::new();
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            match name {
                GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                GeneralName::DNSName(host) => hosts.push((*host).to_owned()),
                GeneralName::IPAddress(bytes) => hosts.extend(address(bytes).map(|it| it.to_string())),
                _ => {}
            }
        }
        let uri = match <[String; 1]>::try_from(uris) {
            Ok([uri]) => Ok(uri),
            Err(uris) => Err(format!("it has {} URI names, and must have one", uris.len())),
        };
        Ok(Self {
            uri,
            hosts,
            issuer: found.issuer().to_string(),
            subject: found.subject().to_string(),
            serial: hex::encode(found.raw_serial()),
            from: time(found.validity().not_before.timestamp()),
            until: time(found.validity().not_after.timestamp()),
        })
    }

    /// # Errors
    /// Where the text has no certificate. Only the first one is read: it is the holder's own.
    pub fn of_pem(text: &str) -> Result<Self, String> {
        let der = CertificateDer::from_pem_slice(text.as_bytes())
            .map_err(|error| format!("there is no certificate in it: {error}"))?;
        Self::read(&der)
    }

    /// Whom it is for.
    ///
    /// # Errors
    /// Why it names nobody of this site.
    pub fn identity(&self, site: &SiteName) -> Result<Identity, String> {
        Identity::of_uri(self.uri.as_ref().map_err(Clone::clone)?, site)
    }

    /// The URI that says whom it is for, whatever the site.
    ///
    /// # Errors
    /// Where there is none, or more than one.
    pub fn uri(&self) -> Result<&str, &str> {
        self.uri.as_ref().map(String::as_str).map_err(String::as_str)
    }

    /// True in the last third of its life, and after it.
    pub fn is_due(&self, now: SystemTime) -> bool {
        let life = self.until.duration_since(self.from).unwrap_or_default();
        now + life / 3 >= self.until
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from).ok();
    v4.or_else(|| <[u8; 16]>::try_from(bytes).map(IpAddr::from).ok())
}

fn time(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}
