//! The site's authority and the certificates of its services, as files: made, renewed in time, rotated.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_model::event::Service;
use kiln_service::access::{Identity, Role};
use kiln_service::certificate::Certificate;
use kiln_service::config::Site;
use kiln_service::pki::{self, Authority, Issued};
use serde::Serialize;
use zeroize::Zeroizing;

use super::broker;
use super::keys::write;
use crate::failure::{Code, During as _, Failure, Outcome};

/// How this machine calls itself, whatever others call it.
const OWN_HOSTS: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

pub(crate) fn authority_key(site: &Site) -> PathBuf {
    site.paths().pki().join("authority.key")
}

/// Of the authority that is to take the place of the one there is.
pub(crate) fn next_key(site: &Site) -> PathBuf {
    site.paths().pki().join("authority.next.key")
}

pub(crate) fn failed(what: &str) -> impl FnOnce(pki::Error) -> Failure {
    move |error| {
        let code = if matches!(error, pki::Error::Host(_)) { Code::Invalid } else { Code::Failed };
        Failure::new(code, what, error).reason("pki")
    }
}

fn read(path: &Path) -> Outcome<Zeroizing<String>> {
    kiln_secret::read(path).during(format_args!("reading {}", path.display()))
}

/// Who signs the site's certificates.
pub(crate) fn authority(site: &Site) -> Outcome<Authority> {
    let path = authority_key(site);
    if !path.exists() {
        return Err(Failure::new(
            Code::Refused,
            "giving out a certificate",
            format!("the authority's key {} is not here", path.display()),
        )
        .reason("no_authority")
        .todo("do it on the machine that has it; `kiln pki init` makes one for a site that has none"));
    }
    Authority::of_key(site.name.clone(), &read(&path)?).map_err(failed("reading the authority's key"))
}

/// Who has a certificate on this machine: every service, and the broker of the site's own.
pub(crate) fn holders(site: &Site) -> Vec<Role> {
    let broker = broker::is_own(site).then_some(Role::Broker);
    Service::ALL.map(Role::from).into_iter().chain(broker).collect()
}

/// Makes the authority where there is none, and the certificates that are missing or due. A machine that was given its
/// certificates without the authority's key keeps what it was given.
pub(crate) fn ensure(site: &Site) -> Outcome<Vec<Role>> {
    let (bundle, key) = (site.paths().authority(), authority_key(site));
    if !key.exists() {
        if bundle.exists() {
            return Ok(Vec::new());
        }
        let new = Authority::new(site.name.clone()).map_err(failed("making the site's authority"))?;
        let certificate =
            new.certificate(SystemTime::now()).map_err(failed("making the site's authority"))?;
        write(&key, &new.reveal_key())?;
        write(&bundle, &certificate)?;
    } else if !bundle.exists() {
        // Killed between the two.
        let certificate = authority(site)?.certificate(SystemTime::now());
        write(&bundle, &certificate.map_err(failed("making the site's authority"))?)?;
    }
    renew(site, false)
}

/// Renews what is due, or everything. Gives those whose certificates are new.
pub(crate) fn renew(site: &Site, all: bool) -> Outcome<Vec<Role>> {
    let authority = authority(site)?;
    let mut renewed = Vec::new();
    for holder in holders(site) {
        let path = site.paths().identity(holder);
        let hosts = hosts(site, holder);
        let there = kiln_secret::read(&path).ok().and_then(|text| Certificate::of_pem(&text).ok());
        let stands = there.is_some_and(|it| {
            !it.is_due(SystemTime::now())
                && it.issuer == authority.name()
                && it.hosts.iter().collect::<BTreeSet<_>>() == hosts.iter().collect()
        });
        if all || !stands {
            let what = format!("the certificate of the {holder}");
            let identity = Identity::service(holder);
            let identity = identity.map_err(|why| Failure::failed(&what, why))?;
            let issued = issue(&authority, &identity, &hosts, site.pki.life)?;
            write(&path, &issued.reveal())?;
            renewed.push(holder);
        }
    }
    Ok(renewed)
}

pub(crate) fn issue(
    authority: &Authority,
    identity: &Identity,
    hosts: &[String],
    life: Duration,
) -> Outcome<Issued> {
    let what = format!("the certificate of {}", identity.name());
    authority.issue(identity, hosts, life, SystemTime::now()).map_err(failed(&what))
}

/// The names that a service of this machine, or its broker, answers to.
fn hosts(site: &Site, holder: Role) -> Vec<String> {
    let mut hosts: Vec<_> = OWN_HOSTS.iter().map(ToString::to_string).collect();
    let ports =
        site.listen.iter().chain(&site.metrics).filter(|(service, _)| Role::from(**service) == holder);
    let addresses = ports.map(|(_, it)| it.ip().to_canonical());
    hosts.extend(addresses.filter(|it| !it.is_unspecified()).map(|it| it.to_string()));
    if holder == Role::Broker {
        hosts.extend(site.broker_hosts());
    }
    hosts.extend(site.pki.hosts.iter().cloned());
    let mut seen = BTreeSet::new();
    hosts.retain(|host| seen.insert(host.clone()));
    hosts
}

/// How often certificates are looked at: many times in the third of a life that is left when they are due.
pub(crate) fn period(site: &Site) -> Duration {
    (site.pki.life / 30).clamp(Duration::from_millis(100), Duration::from_secs(60))
}

/// Which authorities there are, by their names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Authorities {
    pub(crate) signs: String,
    /// That is to sign.
    next: Option<String>,
    trusted: Vec<String>,
}

pub(crate) fn authorities(site: &Site) -> Outcome<Authorities> {
    let next = next_key(site);
    let next = next.exists().then(|| of_next(site)).transpose()?.map(|next| next.name());
    let trusted = of_bundle(&read(&site.paths().authority())?).into_iter().map(|it| it.subject).collect();
    Ok(Authorities { signs: authority(site)?.name(), next, trusted })
}

/// Of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Another authority is trusted from now on, and signs nothing yet.
    Prepare,
    /// It signs, and all certificates of this machine are renewed by it.
    Switch,
    /// The one that signed before is trusted no more.
    Finish,
}

fn of_next(site: &Site) -> Outcome<Authority> {
    Authority::of_key(site.name.clone(), &read(&next_key(site))?)
        .map_err(failed("reading the next authority's key"))
}

/// The authorities once a step is made. Makes the next one where there is none: it is nobody's until it is trusted.
///
/// # Errors
/// Where it is not the step's turn.
pub(crate) fn after(site: &Site, step: Step) -> Outcome<Authorities> {
    if step == Step::Prepare && !next_key(site).exists() {
        let new = Authority::new(site.name.clone()).map_err(failed("making the next authority"))?;
        write(&next_key(site), &new.reveal_key())?;
    }
    let mut it = authorities(site)?;
    match step {
        Step::Prepare => {
            // Begun again after it was cut off, it adds the same one, which is trusted once.
            it.trusted.extend(it.next.clone().filter(|next| !it.trusted.contains(next)));
        }
        Step::Switch => {
            it.signs = it.next.take().ok_or_else(|| {
                Failure::new(Code::Refused, "switching to the next authority", "there is none")
                    .reason("not_prepared")
                    .todo("kiln pki rotate, which makes one")
            })?;
        }
        Step::Finish => {
            let what = "ending the rotation";
            if it.next.is_some() {
                return Err(Failure::new(Code::Refused, what, "the next authority does not sign yet")
                    .reason("not_switched")
                    .todo("kiln pki rotate --switch"));
            }
            it.trusted.retain(|name| *name == it.signs);
            if it.trusted.is_empty() {
                let bundle = site.paths().authority();
                let why = format!("{} does not hold the certificate of {}", bundle.display(), it.signs);
                return Err(Failure::failed(what, why));
            }
        }
    }
    Ok(it)
}

/// Makes a step.
///
/// # Errors
/// As [`after`], and where a file can't be written.
pub(crate) fn rotate(site: &Site, step: Step) -> Outcome {
    let bundle = site.paths().authority();
    let before = authorities(site)?;
    let after = after(site, step)?;
    match step {
        Step::Prepare => {
            if before.trusted == after.trusted {
                return Ok(());
            }
            let certificate = of_next(site)?.certificate(SystemTime::now());
            let certificate = certificate.map_err(failed("making the next authority"))?;
            write(&bundle, &[read(&bundle)?.as_str(), &certificate].concat())
        }
        Step::Switch => {
            std::fs::rename(next_key(site), authority_key(site)).during("switching to the next authority")?;
            renew(site, true).map(drop)
        }
        Step::Finish => {
            let trusted = read(&bundle)?;
            let is_kept = |pem: &String| Certificate::of_pem(pem).is_ok_and(|it| it.subject == after.signs);
            write(&bundle, &split(&trusted).filter(is_kept).collect::<String>())
        }
    }
}

/// The certificates of a bundle.
pub(crate) fn of_bundle(pem: &str) -> Vec<Certificate> {
    split(pem).filter_map(|one| Certificate::of_pem(&one).ok()).collect()
}

fn split(pem: &str) -> impl Iterator<Item = String> {
    const END: &str = "-----END CERTIFICATE-----\n";
    pem.split_inclusive(END).map(str::to_owned).filter(|part| part.contains(END.trim_end()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::home::Home;
    use crate::site::create::{Wishes, ensure as make};

    fn site(folder: &Path, settings: &[(&str, &str)]) -> Site {
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let home = Home::new(Some(folder.join("home")), "test").unwrap();
        make(&home, &Wishes { nats_url: None, store: None, settings }).unwrap()
    }

    fn of(site: &Site, holder: impl Into<Role>) -> Certificate {
        Certificate::of_pem(&read(&site.paths().identity(holder)).unwrap()).unwrap()
    }

    #[test]
    fn a_site_has_certificates_that_stay_until_they_are_due() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path(), &[("listen.node", "10.1.2.3:7104")]);
        let first = of(&site, Service::Node);
        assert_eq!(first.uri().unwrap(), "spiffe://test/service/node");
        assert_eq!(first.hosts, ["localhost", "127.0.0.1", "::1", "10.1.2.3"]);
        for path in [authority_key(&site), site.paths().identity(Service::Node)] {
            let mode = path.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", path.display());
        }
        assert_eq!(ensure(&site).unwrap(), []);
        assert_eq!(of(&site, Service::Node).serial, first.serial);
        // Another name of the machine asks for another certificate.
        let mut renamed = site.clone();
        renamed.pki.hosts = vec!["kiln.example".to_owned()];
        assert_eq!(renew(&renamed, false).unwrap().len(), 5);
        renamed.pki.hosts = vec!["no host".to_owned()];
        assert!(renew(&renamed, false).is_err());
    }

    #[test]
    fn what_is_given_without_the_authority_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path(), &[]);
        std::fs::remove_file(authority_key(&site)).unwrap();
        std::fs::remove_file(site.paths().identity(Service::Builder)).unwrap();
        assert_eq!(ensure(&site).unwrap(), []);
        assert!(!authority_key(&site).exists());
        assert!(renew(&site, false).is_err());
    }

    #[test]
    fn authorities_take_each_others_place_with_an_overlap() {
        let folder = tempfile::tempdir().unwrap();
        let site = site(folder.path(), &[]);
        let trusted = || of_bundle(&read(&site.paths().authority()).unwrap());
        let old = authority(&site).unwrap().name();
        assert!(rotate(&site, Step::Switch).is_err());
        let prepared = after(&site, Step::Prepare).unwrap();
        assert_eq!(trusted().len(), 1, "it is only known what would be");
        rotate(&site, Step::Prepare).unwrap();
        rotate(&site, Step::Prepare).unwrap();
        assert_eq!(trusted().len(), 2);
        assert_eq!(authorities(&site).unwrap(), prepared);
        assert!(rotate(&site, Step::Finish).is_err());
        assert_eq!(of(&site, Service::Builder).issuer, old);
        rotate(&site, Step::Switch).unwrap();
        let new = authority(&site).unwrap().name();
        assert_ne!(new, old);
        assert!(holders(&site).into_iter().all(|holder| of(&site, holder).issuer == new));
        assert_eq!(trusted().len(), 2);
        rotate(&site, Step::Finish).unwrap();
        assert_eq!(trusted().into_iter().map(|it| it.subject).collect::<Vec<_>>(), [new]);
    }
}
