//! A site's authority, and the certificates that it gives out. Nothing here reads or writes a file.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use kiln_model::name::SiteName;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

use crate::access::Identity;

/// Ten years: it is replaced by hand, with an overlap.
pub const AUTHORITY_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Clocks of two machines differ by less.
const SKEW: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the authority's key can't be used: {0}")]
    Key(String),
    #[error("`{0}` is neither a host name nor an address")]
    Host(String),
    #[error("making the certificate failed: {0}")]
    Failed(String),
}

impl From<rcgen::Error> for Error {
    fn from(error: rcgen::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Who vouches for the certificates of one site: its key, and the name that follows from site and key, so that two
/// authorities of a site have different ones.
pub struct Authority {
    site: SiteName,
    key: KeyPair,
}

impl Drop for Authority {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// A certificate with its key. Both are one text, so that a file of it is replaced as a whole.
pub struct Issued {
    pub certificate: String,
    key: Zeroizing<String>,
}

impl Issued {
    /// PEM: the certificate, then its key.
    pub fn reveal(&self) -> Zeroizing<String> {
        Zeroizing::new([self.certificate.as_str(), self.key.as_str()].concat())
    }
}

impl Authority {
    /// A new one.
    ///
    /// # Errors
    /// Where there is no randomness.
    pub fn new(site: SiteName) -> Result<Self, Error> {
        let key =
            KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| Error::Key(error.to_string()))?;
        Ok(Self { site, key })
    }

    /// The one with this key, as [`Authority::reveal_key`] gave it.
    ///
    /// # Errors
    /// Where it is no key.
    pub fn of_key(site: SiteName, pem: &str) -> Result<Self, Error> {
        let key = KeyPair::from_pem(pem).map_err(|error| Error::Key(error.to_string()))?;
        Ok(Self { site, key })
    }

    /// PKCS #8, in PEM.
    pub fn reveal_key(&self) -> Zeroizing<String> {
        Zeroizing::new(self.key.serialize_pem())
    }

    /// As it stands in what it gives out: `CN=kiln home 1a2b3c4d`.
    pub fn name(&self) -> String {
        format!("CN={}", self.common_name())
    }

    fn common_name(&self) -> String {
        let digest = Sha256::digest(self.key.public_key_raw());
        format!("kiln {} {}", self.site, hex::encode(&digest[..4]))
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, self.common_name());
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    /// Its own certificate in PEM, for those who are to trust it.
    ///
    /// # Errors
    /// Where it can't be signed.
    pub fn certificate(&self, now: SystemTime) -> Result<String, Error> {
        let mut params = self.params();
        params.not_before = (now - SKEW).into();
        params.not_after = (now + AUTHORITY_LIFE).into();
        Ok(params.self_signed(&self.key)?.pem())
    }

    /// A certificate with a key of its own. One of a service serves and calls, one of a person only calls.
    ///
    /// # Errors
    /// [`Error::Host`] for what is no host.
    pub fn issue(
        &self,
        identity: &Identity,
        hosts: &[String],
        life: Duration,
        now: SystemTime,
    ) -> Result<Issued, Error> {
        let mut key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, identity.name());
        params.subject_alt_names = vec![SanType::URI(identity.uri(&self.site).try_into()?)];
        for host in hosts {
            params.subject_alt_names.push(san(host)?);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if !identity.role().is_person() {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.use_authority_key_identifier_extension = true;
        // No longer back than it is good for: a third of a life must not lie in the past.
        params.not_before = (now - SKEW.min(life / 10)).into();
        params.not_after = (now + life).into();
        let issuer = Issuer::new(self.params(), &self.key);
        let certificate = params.signed_by(&key, &issuer)?.pem();
        let pem = Zeroizing::new(key.serialize_pem());
        key.zeroize();
        Ok(Issued { certificate, key: pem })
    }
}

fn san(host: &str) -> Result<SanType, Error> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
    if host.is_empty() || host.len() > 253 || !host.bytes().all(good) {
        return Err(Error::Host(host.to_owned()));
    }
    Ok(SanType::DnsName(host.to_owned().try_into().map_err(|_| Error::Host(host.to_owned()))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::Role;
    use crate::certificate::Certificate;

    #[test]
    fn a_certificate_says_whom_where_and_how_long() {
        let site: SiteName = "home".parse().unwrap();
        let authority = Authority::new(site.clone()).unwrap();
        let same = Authority::of_key(site.clone(), &authority.reveal_key()).unwrap();
        assert_eq!(authority.name(), same.name());
        let now = SystemTime::now();
        let identity = Identity::service(Role::Builder).unwrap();
        let hosts = ["kiln.example".to_owned(), "10.0.0.5".to_owned(), "::1".to_owned()];
        let life = Duration::from_secs(3000);
        let issued = same.issue(&identity, &hosts, life, now).unwrap();
        let read = Certificate::of_pem(&issued.reveal()).unwrap();
        assert_eq!(read.identity(&site).unwrap(), identity);
        assert_eq!((&read.hosts[..], &read.issuer), (&hosts[..], &authority.name()));
        assert!(read.identity(&"other".parse().unwrap()).is_err());
        let at = |seconds| now + Duration::from_secs(seconds);
        assert!(!read.is_due(at(1900)) && read.is_due(at(2000)) && read.is_due(at(9999)));
        for bad in ["", "a b", "http://x", "*.example", "x/y"] {
            assert!(
                matches!(same.issue(&identity, &[bad.to_owned()], life, now), Err(Error::Host(_))),
                "{bad}"
            );
        }
    }
}
