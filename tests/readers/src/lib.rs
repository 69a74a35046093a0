//! What reads bytes that are not Kiln's own. Each function gives them to one reader, and checks what has to hold of whatever it
//! takes; that it ends, in little memory, and does not panic, has to hold of all. Fuzzing and properties share them.

#![allow(clippy::panic)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek as _, Write as _};

use kiln_formats::containerfile;
use kiln_formats::deb::Package;
use kiln_image::tar::Reader;
use kiln_image::{Foreign, parse_foreign, parse_foreign_config, parse_layout};
use kiln_model::definition::parse;
use kiln_model::release_file::{ReleaseFile, is_for_security, valid_until};

const ARCHITECTURE: &str = "amd64";
/// Of a stream that was compressed: the readers go on for longer.
const MOST: u64 = 1 << 20;

/// Gives bytes to a reader.
pub type Feed = fn(&[u8]);

/// All of them, by the names of their folders of examples.
pub const ALL: [(&str, Feed); 6] = [
    ("containerfile", containerfile),
    ("deb", deb),
    ("definition", definition),
    ("oci", oci),
    ("release", release),
    ("tar", tar),
];

/// A package's file.
pub fn deb(bytes: &[u8]) {
    let Some(file) = in_memory(bytes) else { return };
    let Ok(package) = Package::read(&file) else { return };
    for (name, ..) in &package.control_files {
        assert!(!name.contains(['/', '.']), "{name:?} is a file of dpkg's that is not this package's");
    }
    if let Ok(stream) = package.data.open(&file) {
        entries(stream.take(MOST));
    }
}

/// A layer's tar, or a root file system's.
pub fn tar(bytes: &[u8]) {
    entries(bytes);
}

/// Manifests, indexes and configurations of images.
pub fn oci(bytes: &[u8]) {
    if let Ok(Foreign::Manifest(manifest)) = parse_foreign(bytes, ARCHITECTURE) {
        let _ = parse_foreign_config(bytes, ARCHITECTURE, manifest.layers.len());
    }
    let _ = parse_layout(bytes, None);
    let _ = parse_layout(bytes, Some("latest"));
    let _ = parse_foreign_config(bytes, ARCHITECTURE, 1);
}

/// A `server.yaml`.
pub fn definition(bytes: &[u8]) {
    match parse(bytes, "server.yaml") {
        Ok(definition) => {
            let again = parse(bytes, "server.yaml").map(|again| again == definition);
            assert_eq!(again.ok(), Some(true), "the same text is two definitions");
        }
        Err(errors) => assert!(errors.to_string().contains("server.yaml"), "{errors}"),
    }
}

/// A Containerfile.
pub fn containerfile(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let none = BTreeMap::new();
    let Ok(images) = containerfile::images(text, &none, ARCHITECTURE) else { return };
    let renamed = containerfile::renamed(text, &none, ARCHITECTURE, &BTreeMap::new());
    assert_eq!(renamed.ok().as_deref(), Some(text), "nothing has another name, and the text is another");
    let named = images.iter().map(|image| (image.as_str(), format!("pinned/{}", image.len()))).collect();
    let renamed = containerfile::renamed(text, &none, ARCHITECTURE, &named);
    assert!(renamed.is_ok(), "{renamed:?}");
}

/// An archive's release file.
pub fn release(bytes: &[u8]) {
    let _ = (ReleaseFile::of(bytes), valid_until(bytes), is_for_security(bytes));
}

fn entries(stream: impl Read) {
    let mut tar = Reader::new(stream);
    let mut content = Vec::new();
    while let Ok(Some(entry)) = tar.next_entry() {
        let leads_out =
            entry.path.starts_with(b"/") || entry.path.split(|b| *b == b'/').any(|part| part == b"..");
        assert!(!leads_out, "{:?} leads out of the tree", String::from_utf8_lossy(&entry.path));
        content.clear();
        // What is said to be long and is not ends here.
        if (&mut tar).take(MOST).read_to_end(&mut content).is_err() {
            return;
        }
    }
}

/// None where the kernel gives none.
fn in_memory(bytes: &[u8]) -> Option<File> {
    let mut file = File::from(rustix::fs::memfd_create("deb", rustix::fs::MemfdFlags::CLOEXEC).ok()?);
    file.write_all(bytes).ok()?;
    file.rewind().ok()?;
    Some(file)
}
