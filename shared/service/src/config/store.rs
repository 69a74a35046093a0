//! Where the services keep their state.

use std::path::{Path, PathBuf};

use kiln_model::event::Service;
use kiln_store::{Database, Password, Place, PostgresUrl};
use serde::{Deserialize, Serialize};

use super::credentials::is_private;
use super::{Error, Site};

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreFile {
    /// `postgres://kiln@db.example/kiln`, without a password.
    pub url: String,
    /// The file that holds the password and nothing else. Relative to the home.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<String>,
}

/// The database that the services share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    pub url: PostgresUrl,
    pub password_file: Option<PathBuf>,
}

impl StoreFile {
    /// # Errors
    /// What is wrong with the URL.
    pub(super) fn check(self, home: &Path) -> Result<Store, String> {
        Ok(Store { url: self.url.parse()?, password_file: self.password_file.map(|file| home.join(file)) })
    }
}

impl Site {
    /// Where a service keeps its state. The password of a database is read now.
    ///
    /// # Errors
    /// Where the password can't be read, or could be read by others.
    pub fn store_of(&self, service: Service) -> Result<Place, Error> {
        let database = match &self.store {
            // What a node knows is of its machine alone, and it serves on while no database can be reached.
            Some(database) if service != Service::Node => database,
            _ => return Ok(Place::File(self.paths().store(service))),
        };
        let password = database.password_file.as_deref().map(read_password).transpose()?;
        let schema = format!("kiln_{}_{service}", self.id);
        let seen = self.paths().service(service).join("store.seen");
        Ok(Place::Postgres(Database { url: database.url.clone(), schema, password, seen }))
    }
}

fn read_password(path: &Path) -> Result<Password, Error> {
    let wrong =
        |reason: String| Error::Invalid { path: path.to_owned(), field: "store.password_file", reason };
    is_private(path).map_err(wrong)?;
    let text = kiln_secret::read(path).map_err(|error| wrong(error.to_string()))?;
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err(wrong("it is empty".to_owned())),
        password => Ok(Password::new(password.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn each_service_has_a_schema_of_its_own_and_the_node_a_file() {
        let home = tempfile::tempdir().unwrap();
        let text = "name = \"home\"\nid = \"0a1b2c3d\"\nsubnet = \"10.77.3.0/24\"\nbridge = \"kiln-0\"\n\
            nats.url = \"nats://127.0.0.1:4222\"\n\
            store = { url = \"postgres://kiln@db.example/kiln\", password_file = \"keys/pw\" }\n";
        std::fs::write(home.path().join("site.toml"), text).unwrap();
        let site = Site::load(home.path()).unwrap();
        assert!(
            matches!(site.store_of(Service::Node).unwrap(), Place::File(path) if path.ends_with("node/store.db"))
        );

        let file = home.path().join("keys/pw");
        let missing = site.store_of(Service::Builder).unwrap_err().to_string();
        assert!(missing.contains("keys/pw") && missing.contains("`store.password_file`"), "{missing}");
        std::fs::create_dir(home.path().join("keys")).unwrap();
        std::fs::write(&file, "hunter2\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let open = site.store_of(Service::Builder).unwrap_err().to_string();
        assert!(open.contains("chmod 600"), "{open}");

        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        let shown = format!("{:?}", site.store_of(Service::Builder).unwrap());
        assert!(shown.contains("kiln_0a1b2c3d_builder") && !shown.contains("hunter2"), "{shown}");
    }
}
