//! What is in an image, for people and for other tools.

mod installed;
mod licences;
mod provenance;
mod sbom;

use kiln_image::{ImageStore, Part, Signer, Stack};
use kiln_model::digest::Digest;

pub(crate) use self::installed::Installed;
pub use self::provenance::Provenance;
use crate::bake::BakeError;
use crate::bake::system::System;

/// The artifact type of an image's list of contents, and its media type: CycloneDX as JSON.
pub(crate) const SBOM: &str = "application/vnd.cyclonedx+json";

/// The artifact type of where an image comes from, and its media type: an in-toto statement in a DSSE envelope.
pub(crate) const PROVENANCE: &str = "application/vnd.in-toto.provenance+dsse";

/// Of one `copyright` file.
const COPYRIGHT_LIMIT: u64 = 4 << 20;

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
    of_system(&System::of_stack(&images.stack(image)?)?, image)
}

fn of_system(system: &System, image: &Digest) -> Result<Vec<Installed>, BakeError> {
    let status = String::from_utf8_lossy(system.status.as_deref().unwrap_or_default());
    installed::parse(&status)
        .map_err(|why| BakeError::Package { package: format!("of image {}", image.short()), why })
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
    for installed in of_system(&system, image)? {
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

/// What a package says of its licences. One whose file is longer than any is says nothing.
fn copyright(stack: &Stack, package: &str) -> Result<Option<String>, BakeError> {
    let path = format!("usr/share/doc/{package}/copyright");
    let content = match stack.read_through_links(path.as_bytes(), COPYRIGHT_LIMIT) {
        Err(kiln_image::Error::Malformed { .. }) => None,
        read => read?,
    };
    Ok(content.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}
