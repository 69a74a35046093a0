//! The list of an image's contents as CycloneDX 1.6 in JSON. The same image gives the same bytes.

use kiln_model::digest::Digest;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use super::Package;
use super::installed::Installed;
use super::licences::Licence;
use crate::bake::system::System;

/// What a package URL keeps as it is. Source: the purl specification, "Rules for each purl component".
const ENCODED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_').remove(b'~').remove(b':');

/// `created` is the image's own time, in RFC 3339.
pub(super) fn cyclonedx(image: &Digest, created: &str, system: &System, packages: &[Package]) -> Value {
    let os = Os::of(system);
    let mut components: Vec<Value> = os.iter().map(Os::component).collect();
    components.extend(packages.iter().map(|package| component(package, os.as_ref())));
    let parts: Vec<Value> = components.iter().map(|component| component["bom-ref"].clone()).collect();
    json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": serial_number(image),
        "version": 1,
        "metadata": {
            "timestamp": created,
            "tools": {"components": [
                {"type": "application", "name": "kiln", "version": env!("CARGO_PKG_VERSION")}
            ]},
            "component": {
                "type": "container",
                "bom-ref": image,
                "name": image,
                "hashes": [{"alg": "SHA-256", "content": image.hex()}],
            },
        },
        "components": components,
        "dependencies": [{"ref": image, "dependsOn": parts}],
    })
}

/// A UUID out of the digest's first bytes, of version 8: RFC 9562 leaves it to who makes it.
fn serial_number(image: &Digest) -> String {
    let hex = image.hex();
    format!("urn:uuid:{}-{}-8{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
}

struct Os {
    id: String,
    version: String,
}

impl Os {
    fn of(system: &System) -> Option<Self> {
        let id = system.os_value("ID")?;
        Some(Self { id, version: system.os_value("VERSION_ID").unwrap_or_default() })
    }

    fn component(&self) -> Value {
        let Self { id, version } = self;
        json!({"type": "operating-system", "bom-ref": format!("os:{id}-{version}"), "name": id, "version": version})
    }
}

fn component(package: &Package, os: Option<&Os>) -> Value {
    let Package { installed, licences } = package;
    let purl = purl(installed, os);
    let mut component = json!({
        "type": "library",
        "bom-ref": purl,
        "name": installed.name,
        "version": installed.version,
        "purl": purl,
        "properties": [
            {"name": "kiln:architecture", "value": installed.architecture},
            {"name": "kiln:source", "value": installed.source},
            {"name": "kiln:source_version", "value": installed.source_version},
        ],
    });
    if !licences.is_empty() {
        let licences = licences.iter().map(|licence| match licence {
            Licence::Spdx(id) => json!({"license": {"id": id}}),
            Licence::Named(name) => json!({"license": {"name": name}}),
        });
        component["licenses"] = licences.collect();
    }
    component
}

/// `pkg:deb/debian/libc-bin@2.36-9?arch=amd64&distro=debian-12&upstream=glibc%402.36-9`: scanners match advisories, which
/// are about sources, by the last part.
fn purl(installed: &Installed, os: Option<&Os>) -> String {
    let encoded = |text: &str| utf8_percent_encode(text, ENCODED).to_string();
    let namespace = os.map_or("debian", |os| os.id.as_str());
    let mut purl = format!(
        "pkg:deb/{}/{}@{}?arch={}",
        encoded(namespace),
        encoded(&installed.name),
        encoded(&installed.version),
        encoded(&installed.architecture)
    );
    if let Some(os) = os {
        purl.push_str(&format!("&distro={}", encoded(&format!("{}-{}", os.id, os.version))));
    }
    if installed.source != installed.name || installed.source_version != installed.version {
        let upstream = format!("{}@{}", installed.source, installed.source_version);
        purl.push_str(&format!("&upstream={}", encoded(&upstream)));
    }
    purl
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system() -> System {
        let os_release = b"NAME=\"Debian GNU/Linux\"\nID=debian\nVERSION_ID=\"12\"\n".to_vec();
        System { os_release: Some(os_release), status: None }
    }

    fn package(source: &str, source_version: &str) -> Package {
        let installed = Installed {
            name: "libstdc++6".to_owned(),
            architecture: "amd64".to_owned(),
            version: "1:12.2~a+b".to_owned(),
            source: source.to_owned(),
            source_version: source_version.to_owned(),
        };
        let licences = vec![Licence::Spdx("MIT"), Licence::Named("Artistic".to_owned())];
        Package { installed, licences }
    }

    #[test]
    fn a_package_is_named_so_that_others_find_its_advisories() {
        let os = Os::of(&system());
        let own = purl(&package("libstdc++6", "1:12.2~a+b").installed, os.as_ref());
        assert_eq!(own, "pkg:deb/debian/libstdc%2B%2B6@1:12.2~a%2Bb?arch=amd64&distro=debian-12");
        let of_source = purl(&package("gcc-12", "12.2").installed, None);
        assert_eq!(of_source, "pkg:deb/debian/libstdc%2B%2B6@1:12.2~a%2Bb?arch=amd64&upstream=gcc-12%4012.2");
    }

    #[test]
    fn a_list_says_what_the_image_is_and_what_is_in_it() {
        let image = Digest::of(b"image");
        let list = cyclonedx(&image, "2026-01-01T00:00:00Z", &system(), &[package("gcc-12", "12.2")]);
        let number = list["serialNumber"].as_str().unwrap();
        let groups: Vec<_> = number.strip_prefix("urn:uuid:").unwrap().split('-').map(str::len).collect();
        assert_eq!(groups, [8, 4, 4, 4, 12], "{number}");
        assert_eq!(list["metadata"]["component"]["hashes"][0]["content"], image.hex());
        let [os, library] = list["components"].as_array().unwrap().as_slice() else { panic!("{list}") };
        assert_eq!((&os["type"], &os["name"]), (&json!("operating-system"), &json!("debian")));
        assert_eq!(
            library["licenses"],
            json!([{"license": {"id": "MIT"}}, {"license": {"name": "Artistic"}}])
        );
        assert_eq!(list["dependencies"][0]["dependsOn"], json!([os["bom-ref"], library["bom-ref"]]));
    }
}
