//! What is in an image, for people and for other tools.

mod advisories;
mod datasheet;
mod installed;
mod licences;
mod provenance;
mod sbom;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;

use flate2::read::GzDecoder;
use kiln_builder_core::build::{TestResult, package_changes};
use kiln_image::{Contents, ImageStore, Part, Signer, Stack};
use kiln_model::definition::Definition;
use kiln_model::digest::Digest;
use kiln_model::revision::PackageVersions;

use self::datasheet::{Sheet, Since};
pub(crate) use self::installed::Installed;
pub use self::provenance::Provenance;
use crate::bake::BakeError;
use crate::bake::system::System;

/// The artifact type of an image's list of contents, and its media type: CycloneDX as JSON.
pub(crate) const SBOM: &str = "application/vnd.cyclonedx+json";

/// The artifact type of where an image comes from, and its media type: an in-toto statement in a DSSE envelope.
pub(crate) const PROVENANCE: &str = "application/vnd.in-toto.provenance+dsse";

/// The artifact type of a page about an image for people, and its media type.
pub(crate) const DATASHEET: &str = "application/vnd.kiln.datasheet.v1+markdown";

/// Of one changelog, packed and not.
const CHANGELOG_LIMIT: u64 = 16 << 20;
/// Of one `copyright` file.
const COPYRIGHT_LIMIT: u64 = 4 << 20;
const PASSWD_LIMIT: u64 = 1 << 20;

/// What is known of an image beside what it holds.
#[derive(Debug, Clone)]
pub struct About {
    pub made: Provenance,
    pub definition: Definition,
    pub tests: Vec<TestResult>,
    /// The image that was in force until now, where there was one.
    pub before: Option<Digest>,
}

/// A package and what its authors allow.
struct Package {
    installed: Installed,
    licences: Vec<licences::Licence>,
}

/// The packages that dpkg knows of in an image, by name; none where it has no database.
///
/// # Errors
/// The image is not in the store, or its database can't be read.
pub(crate) fn packages(images: &ImageStore, image: &Digest) -> Result<Vec<Installed>, BakeError> {
    of_system(&System::of_stack(&images.stack(image)?)?, &format!("image {}", image.short()))
}

/// As [`packages`], of what was read from `what`.
///
/// # Errors
/// The database can't be read.
pub(crate) fn of_system(system: &System, what: &str) -> Result<Vec<Installed>, BakeError> {
    let status = String::from_utf8_lossy(system.status.as_deref().unwrap_or_default());
    installed::parse(&status).map_err(|why| BakeError::Package { package: format!("of {what}"), why })
}

/// By their names.
pub(crate) fn versions<'a>(packages: impl IntoIterator<Item = &'a Installed>) -> PackageVersions {
    packages.into_iter().map(|it| (it.name.clone(), it.version.clone())).collect()
}

/// A path or a link's target, for people.
pub(crate) fn shown(path: &[u8]) -> String {
    std::str::from_utf8(path).map_or_else(|_| path.escape_ascii().to_string(), str::to_owned)
}

/// A command line of an image's configuration, for people.
pub(crate) fn words(words: &Option<Vec<String>>) -> String {
    words.as_deref().unwrap_or_default().join(" ")
}

/// Attaches the list of its contents to an image that has none.
///
/// # Errors
/// The image is not in the store, or what dpkg says of its packages can't be read.
pub(crate) fn attach_sbom(images: &ImageStore, image: &Digest) -> Result<(), BakeError> {
    if images.referrers_of(image)?.iter().any(|it| it.artifact_type == SBOM) {
        return Ok(());
    }
    let stack = images.stack(image)?;
    let system = System::of_stack(&stack)?;
    let mut packages = Vec::new();
    for installed in of_system(&system, &format!("image {}", image.short()))? {
        let licences = copyright(&stack, &installed.name)?.map(|text| licences::parse(&text));
        packages.push(Package { installed, licences: licences.unwrap_or_default() });
    }
    let created = images.image(image)?.config.created().clone().unwrap_or_default();
    let sbom = sbom::cyclonedx(image, &created, &system, &packages).to_string();
    let part = Part { media_type: SBOM, content: sbom.as_bytes(), ..Part::default() };
    images.attach(image, SBOM, &part)?;
    Ok(())
}

/// Attaches where an image comes from to one of which that is not said yet: a later build that comes to the same bytes tells
/// nothing new of them.
///
/// # Errors
/// The image is not in the store, or a signer does not sign.
pub(crate) fn attest_provenance(
    images: &ImageStore,
    image: &Digest,
    made: &Provenance,
    signers: &[Signer],
) -> Result<(), BakeError> {
    if images.referrers_of(image)?.iter().any(|it| it.artifact_type == PROVENANCE) {
        return Ok(());
    }
    let statement = provenance::statement(image, made).to_string();
    Ok(images.attest(image, PROVENANCE, &statement, signers)?)
}

/// Attaches a page for people.
///
/// # Errors
/// The image is not in the store, or what dpkg says of its packages can't be read.
pub(crate) fn attach_datasheet(images: &ImageStore, digest: &Digest, about: &About) -> Result<(), BakeError> {
    let stack = images.stack(digest)?;
    let packages = packages(images, digest)?;
    let passwd = stack.read_through_links(b"etc/passwd", PASSWD_LIMIT)?.unwrap_or_default();
    let compared = about.before.filter(|before| before != digest).and_then(|before| {
        // It may have been collected or damaged meanwhile, which is no fault of this one.
        since(images, &before, digest, &stack, &packages)
            .inspect_err(|error| tracing::warn!(%before, %error, "the image before can't be compared with"))
            .ok()
    });
    let (contents, since) = match compared {
        Some((contents, since)) => (contents, Some(since)),
        None => (images.contents(digest)?, None),
    };
    let page = datasheet::markdown(&Sheet {
        image: &images.image(digest)?,
        digest,
        made: &about.made,
        definition: &about.definition,
        tests: &about.tests,
        packages: &packages,
        contents: &contents,
        passwd: &String::from_utf8_lossy(&passwd),
        since,
    });
    let part = Part { media_type: DATASHEET, content: page.as_bytes(), ..Part::default() };
    images.attach(digest, DATASHEET, &part)?;
    Ok(())
}

/// What an image holds, and how it differs from the one before.
fn since(
    images: &ImageStore,
    before: &Digest,
    image: &Digest,
    stack: &Stack,
    after: &[Installed],
) -> Result<(Contents, Since), BakeError> {
    let (old, contents) = images.contents_of_both(before, image)?;
    let files = old.differences(&contents)?;
    let by_name = |all: Vec<Installed>| -> BTreeMap<String, Installed> {
        all.into_iter().map(|it| (it.name.clone(), it)).collect()
    };
    let (old, new) = (by_name(packages(images, before)?), by_name(after.to_vec()));
    let changes = package_changes(&versions(old.values()), &versions(new.values()));
    let mut fixed = BTreeSet::new();
    for change in &changes {
        if let (Some(from), Some(to)) = (old.get(&change.name), new.get(&change.name)) {
            let names = advisories::fixed(&changelog(stack, &to.name)?, &from.source_version);
            fixed.extend(names.into_iter().map(|cve| (cve, to.source.clone())));
        }
    }
    let since = Since { image: *before, packages: changes, files, fixed: fixed.into_iter().collect() };
    Ok((contents, since))
}

/// Debian's own, or that of a package that is Debian's own. One that is longer than any is as good as none.
fn changelog(stack: &Stack, package: &str) -> Result<String, BakeError> {
    for name in ["changelog.Debian.gz", "changelog.gz"] {
        let path = format!("usr/share/doc/{package}/{name}");
        let packed = match stack.read_through_links(path.as_bytes(), CHANGELOG_LIMIT) {
            Err(kiln_image::Error::Malformed { .. }) | Ok(None) => continue,
            Ok(Some(packed)) => packed,
            Err(error) => return Err(error.into()),
        };
        let mut text = Vec::new();
        // What is cut or no gzip tells as much as could be read.
        let _ = GzDecoder::new(packed.as_slice()).take(CHANGELOG_LIMIT).read_to_end(&mut text);
        return Ok(String::from_utf8_lossy(&text).into_owned());
    }
    Ok(String::new())
}

/// What a package says of its licences. One whose file is longer than any is says nothing.
fn copyright(stack: &Stack, package: &str) -> Result<Option<String>, BakeError> {
    let path = format!("usr/share/doc/{package}/copyright");
    let content = match stack.read_through_links(path.as_bytes(), COPYRIGHT_LIMIT) {
        Err(kiln_image::Error::Malformed { .. }) => None,
        read => read?,
    };
    Ok(content.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}
