use std::path::Path;
use std::process::ExitCode;

use kiln_model::event::Service;
use kiln_service::config::{EXIT_BAD_CONFIG, Site, SiteFile};
use kiln_service::guard::{self, Guard};
use kiln_service::run;

const FILE: &str = r#"
name = "home"
id = "0a1b2c3d"
subnet = "10.77.3.0/24"
bridge = "kiln-0a1b2c"
[nats]
url = "nats://127.0.0.1:4222"
"#;

fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let file: SiteFile = toml::from_str(FILE).unwrap();
    std::fs::write(home.path().join("site.toml"), file.to_text().unwrap()).unwrap();
    std::fs::create_dir(home.path().join("run")).unwrap();
    home
}

fn start(home: &Path) -> ExitCode {
    run::at_home(Service::Builder, home, |start| async move {
        assert!(start.site.paths().pid(Service::Builder).exists());
        Ok(())
    })
}

#[test]
fn a_service_starts_and_ends_and_leaves_no_pid() {
    let home = home();
    assert_eq!(start(home.path()), ExitCode::SUCCESS);
    assert!(!home.path().join("run/builder.pid").exists());
}

#[test]
fn a_wrong_configuration_is_64_and_a_failure_is_1() {
    let home = home();
    assert_eq!(start(&home.path().join("nowhere")), ExitCode::from(EXIT_BAD_CONFIG));
    let failed = run::at_home(Service::Builder, home.path(), |_| async { Err("no luck".into()) });
    assert_eq!(failed, ExitCode::FAILURE);
    std::fs::write(home.path().join("site.toml"), FILE.replace("home", "Home")).unwrap();
    assert_eq!(start(home.path()), ExitCode::from(EXIT_BAD_CONFIG));
}

#[test]
fn a_second_copy_is_refused_until_the_first_is_gone() {
    let home = home();
    let site = Site::load(home.path()).unwrap();
    let first = Guard::take(site.paths(), Service::Builder).unwrap();
    let pid = std::fs::read_to_string(site.paths().pid(Service::Builder)).unwrap();
    assert_eq!(pid.trim(), std::process::id().to_string());
    assert!(matches!(Guard::take(site.paths(), Service::Builder), Err(guard::Error::Held { .. })));
    // The refused one did not take the first one's pid file away.
    assert!(site.paths().pid(Service::Builder).exists());
    let _other = Guard::take(site.paths(), Service::Monitor).unwrap();
    drop(first);
    Guard::take(site.paths(), Service::Builder).unwrap();
}
