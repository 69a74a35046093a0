//! The generated code is committed; this regenerates it and compares. `KILN_REGENERATE=1` writes it instead.

use std::path::{Path, PathBuf};

use prost::Message as _;

const PACKAGES: [&str; 7] = ["types", "audit", "builder", "deployer", "monitor", "engine", "events"];

#[test]
fn generated_code_is_what_the_protocol_gives() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = root.join("../../proto");
    let files: Vec<PathBuf> =
        PACKAGES.iter().map(|package| proto.join(format!("kiln/{package}/v1/{package}.proto"))).collect();
    let descriptors = protox::compile(&files, [&proto]).expect("the protocol compiles");
    let fresh = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(fresh.path().join("descriptors.bin"), descriptors.encode_to_vec()).expect("write");
    tonic_prost_build::configure()
        .out_dir(fresh.path())
        .btree_map(".")
        .build_transport(false)
        .compile_fds(descriptors)
        .expect("code is generated");

    let committed = root.join("src/generated");
    let mut names: Vec<_> = std::fs::read_dir(fresh.path())
        .expect("list")
        .map(|entry| entry.expect("entry").file_name())
        .collect();
    names.sort();
    for name in names {
        let wanted = std::fs::read(fresh.path().join(&name)).expect("read");
        let path = committed.join(&name);
        if std::env::var_os("KILN_REGENERATE").is_some() {
            std::fs::write(&path, &wanted).expect("write");
        }
        let found = std::fs::read(&path).unwrap_or_default();
        assert!(found == wanted, "{} is stale: run `just generate`", path.display());
    }
}
