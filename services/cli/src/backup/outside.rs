//! What a site needs and a backup does not hold: files that the settings name outside of `keys`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use kiln_service::config::Site;

use crate::failure::{Failure, Outcome};

/// Every file below `keys`. A link is none: what it leads to is elsewhere.
pub(super) fn key_files(site: &Site) -> Outcome<Vec<PathBuf>> {
    let keys = site.paths().keys();
    let mut files = Vec::new();
    for entry in walkdir::WalkDir::new(&keys).sort_by_file_name() {
        let entry =
            entry.map_err(|error| Failure::failed(format_args!("reading {}", keys.display()), error))?;
        if entry.file_type().is_file() {
            files.push(entry.into_path());
        }
    }
    Ok(files)
}

/// The files that the settings name and that are not among `packed`.
pub(super) fn left_out(site: &Site, packed: &[PathBuf]) -> Vec<PathBuf> {
    let mut named = site.signing.files();
    if let Some(registry) = &site.registry {
        named.extend(registry.ca.iter().chain(&registry.credentials).cloned());
    }
    if let Some(store) = &site.store {
        named.extend(store.password_file.iter().cloned().chain(store.url.files()));
    }
    named.extend(site.credentials.git.iter().chain(&site.credentials.archives).cloned());
    named.extend(site.secrets.values().cloned());
    let packed: BTreeSet<_> = packed.iter().collect();
    named.into_iter().filter(|path| !packed.contains(path)).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kiln_service::config::SiteFile;

    use super::*;

    const SETTINGS: &str = r#"
name = "home"
id = "0a1b2c3d"
subnet = "10.77.3.0/24"
bridge = "kiln-0a1b2c"
[nats]
url = "nats://127.0.0.1:4222"
"#;
    const OF_OTHERS: &str = r#"
[store]
url = "postgres://kiln@db.example/kiln?sslrootcert=/etc/db.pem"
password_file = "keys/database"
[registry]
repository = "registry.example/kiln"
ca = "/etc/registry.pem"
credentials = "registry.json"
[credentials]
git = "keys/database"
archives = "/etc/archives.conf"
[secrets]
pip-token = "/etc/pip-token"
[signing]
keys = [{ file = "keys/signing.key" }, { command = ["/usr/local/bin/sign", "-x"], public = "/etc/b.pub" }]
[[signing.trust]]
servers = ["web"]
keys = ["keys/signing.pub", "/etc/b.pub", "keys/link.pub"]
[[signing.trust]]
servers = ["*"]
keys = ["/etc/c.pub"]
"#;

    #[test]
    fn files_that_are_named_and_not_packed_are_told_once_each() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path();
        std::fs::create_dir_all(home.join("keys/nats")).unwrap();
        for name in ["signing.key", "signing.pub", "database", "nats/cli.nk"] {
            std::fs::write(home.join("keys").join(name), "").unwrap();
        }
        std::os::unix::fs::symlink("/etc/link.pub", home.join("keys/link.pub")).unwrap();
        let told = |text: &str| {
            let site = SiteFile::parse(text).unwrap().check(home).unwrap();
            left_out(&site, &key_files(&site).unwrap())
        };
        assert_eq!(told(SETTINGS), Vec::<PathBuf>::new());
        let found: BTreeSet<_> = told(&format!("{SETTINGS}{OF_OTHERS}")).into_iter().collect();
        let expected = [
            "/etc/archives.conf",
            "/etc/b.pub",
            "/etc/c.pub",
            "/etc/db.pem",
            "/etc/pip-token",
            "/etc/registry.pem",
            "/usr/local/bin/sign",
        ];
        let within = ["keys/link.pub", "registry.json"].map(|name| home.join(name));
        assert_eq!(found, expected.into_iter().map(|it| Path::new(it).to_owned()).chain(within).collect());
    }
}
