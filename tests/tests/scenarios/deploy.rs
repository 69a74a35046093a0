//! The files that a site is run in production with.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_store::{Database, Place, SqlStore, Store as _};
use kiln_test_postgres::Server;
use kiln_tests::Result;
use kiln_tests::command::{binary, run};
use kiln_tests::unit::Unit;

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// The units for the site `local`, with the programs where they were built.
fn units(folder: &Path) -> Result<Vec<PathBuf>> {
    let programs = binary("kiln")?.with_file_name("");
    let mut units = Vec::new();
    for entry in std::fs::read_dir(Unit::folder())? {
        let entry = entry?;
        let text = std::fs::read_to_string(entry.path())?
            .replace("/usr/local/lib/kiln/nats-server", "/bin/true")
            .replace("/usr/local/bin/", &programs.display().to_string());
        let unit = folder.join(entry.file_name().to_string_lossy().replace('@', "@local"));
        std::fs::write(&unit, text)?;
        units.push(unit);
    }
    units.sort();
    Ok(units)
}

#[test]
fn systemd_understands_every_unit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let units = units(folder.path())?;
    assert_eq!(units.len(), 9, "{units:?}");
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&units).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    // It looks at the machine's own units as well.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("kiln")).collect();
    assert!(ours.is_empty(), "{}", ours.join("\n"));
    Ok(())
}

#[test]
fn each_unit_is_enabled_by_itself() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (system, root) = (folder.path().join("etc/systemd/system"), folder.path().display().to_string());
    std::fs::create_dir_all(&system)?;
    for entry in std::fs::read_dir(Unit::folder())? {
        let entry = entry?;
        std::fs::copy(entry.path(), system.join(entry.file_name()))?;
    }
    for entry in std::fs::read_dir(&system)? {
        let unit = entry?.file_name().to_string_lossy().replace('@', "@local");
        let wanted_by = match unit.as_str() {
            // Its timer starts it.
            "kiln-issue@local.service" => None,
            unit if unit.ends_with(".timer") => Some("timers.target.wants"),
            unit if unit.ends_with(".service") || unit.ends_with(".target") => {
                Some("multi-user.target.wants")
            }
            _ => None,
        };
        if let Some(wanted_by) = wanted_by {
            run(Command::new("systemctl").args(["--root", &root, "enable", &unit]))?;
            let link = system.join(wanted_by).join(&unit);
            assert!(link.is_symlink(), "{unit} would not be started");
        }
    }
    Ok(())
}

/// What can do without rights has none; the node and the builder make namespaces and mounts.
#[test]
fn units_that_need_no_rights_have_none() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for unit in units(folder.path())? {
        let name = unit.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if ["kiln-tend@", "kiln-issue@local.service", "kiln-deployer@", "kiln-monitor@", "kiln-nats@"]
            .iter()
            .any(|it| name.starts_with(it))
        {
            // Of 100; what remains is the network, and root as the owner of its files.
            run(Command::new("systemd-analyze")
                .args(["security", "--offline=yes", "--threshold=20"])
                .arg(&unit))?;
        }
    }
    let node = std::fs::read_to_string(Unit::folder().join("kiln-node@.service"))?;
    let settings: Vec<_> = node.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(settings.contains(&"KillMode=process"), "instances outlive the node");
    // Each of these would give it a mount namespace, or bind its instances too.
    for setting in [
        "Protect",
        "Private",
        "ReadOnly",
        "ReadWrite",
        "Inaccessible",
        "Bind",
        "Mount",
        "SystemCallFilter",
        "NoNew",
    ] {
        assert!(!settings.iter().any(|line| line.starts_with(setting)), "{setting}");
    }
    Ok(())
}

/// Each has a key in its memory, of the site's or of TLS at least.
#[test]
fn no_unit_lets_memory_be_written_to_disk() -> Result<()> {
    for entry in std::fs::read_dir(Unit::folder())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".service") {
            assert_eq!(Unit::of(&name)?.wanted("LimitCORE")?, "0", "{name}");
        }
    }
    Ok(())
}

/// Everything that a configuration names by its whole path is put below a folder: certificates with their keys, and what
/// is included.
fn with_its_files(text: &str, folder: &Path, users: &str) -> Result<String> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let (certificate, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let settings = text.lines().filter(|line| !line.starts_with('#'));
    let words = settings.flat_map(|line| line.split(|it: char| it.is_whitespace() || "\"'=:,".contains(it)));
    let mut filled = text.to_owned();
    for name in words.collect::<BTreeSet<_>>() {
        let file = folder.join(Path::new(name).file_name().unwrap_or_default());
        match Path::new(name).extension().and_then(|it| it.to_str()) {
            Some("pem") => std::fs::write(&file, format!("{certificate}{key}"))?,
            Some("key") => std::fs::write(&file, &key)?,
            // What is included is named from the file's own folder.
            Some("conf") if name == "users.conf" => {
                std::fs::write(&file, users)?;
                continue;
            }
            _ => continue,
        }
        filled = filled.replace(name, &file.display().to_string());
    }
    Ok(filled)
}

/// `-t` reads everything that a start does, certificates and keys too.
#[test]
fn nats_server_understands_every_setting_of_its_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let home = folder.path().join("home").display().to_string();
    // For a broker that is not Kiln's own, which is what these files are for.
    let make =
        ["--home", &home, "--site", "broker", "up", "--nats-url", "nats://127.0.0.1:4222", "--no-start"];
    run(Command::new(binary("kiln")?).args(make))?;
    let users = std::fs::read_to_string(Path::new(&home).join("nats/users.conf"))?;
    let certificate = folder.path().join("certificate.pem");
    with_its_files("certificate.pem", folder.path(), "")?;
    let (mut names, mut environment) = (Vec::new(), BTreeMap::new());
    for entry in std::fs::read_dir(deploy("nats"))? {
        let entry = entry?;
        let text = with_its_files(&std::fs::read_to_string(entry.path())?, folder.path(), &users)?;
        for variable in text.split('$').skip(1) {
            let end = variable.find(|it: char| !it.is_ascii_uppercase() && it != '_');
            let name = &variable[..end.unwrap_or(variable.len())];
            let is_folder = name == "KILN_NATS_DATA";
            let value = if is_folder { folder.path().join("data") } else { certificate.clone() };
            environment.insert(name.to_owned(), value);
        }
        let path = folder.path().join(entry.file_name());
        std::fs::write(&path, text)?;
        names.push(path);
    }
    assert!(names.iter().any(|path| path.ends_with("server.conf")), "{names:?}");
    for path in &names {
        let mut check = Command::new("nats-server");
        run(check.envs(&environment).arg("-t").arg("--config").arg(path))?;
    }
    // It would say so.
    let wrong = folder.path().join("wrong.conf");
    let text = std::fs::read_to_string(folder.path().join("kiln.conf"))?;
    std::fs::write(&wrong, text.replace("write_deadline", "write_deadlines"))?;
    let mut check = Command::new("nats-server");
    let refused = run(check.envs(&environment).arg("-t").arg("--config").arg(&wrong));
    assert!(refused.is_err_and(|said| said.to_string().contains("write_deadlines")));
    Ok(())
}

#[tokio::test]
async fn postgresql_starts_with_every_setting_and_a_service_has_the_rights_it_needs() -> Result<()> {
    let mut server = Server::start(&[])?;
    let files = server.socket().join("files");
    std::fs::create_dir(&files)?;
    let text = std::fs::read_to_string(deploy("postgres/kiln.conf"))?;
    // Its own certificate, and no other addresses than this machine has.
    std::fs::write(server.data().join("kiln.conf"), with_its_files(&text, &files, "")?)?;
    let mut own = std::fs::OpenOptions::new().append(true).open(server.data().join("postgresql.conf"))?;
    own.write_all(b"include 'kiln.conf'\n")?;
    // The test's own way in goes first.
    let rules = std::fs::read_to_string(deploy("postgres/pg_hba.conf"))?;
    std::fs::write(server.data().join("pg_hba.conf"), format!("local all all trust\n{rules}"))?;
    for entry in std::fs::read_dir(&files)? {
        let path = entry?.path();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let user = std::fs::metadata(server.data())?;
        std::os::unix::fs::chown(&path, Some(user.uid()), Some(user.gid()))?;
    }
    server.kill()?;
    server.resume()?;
    let asked = |statement: &str| server.psql("postgres", statement);
    // What the harness says on the command line goes before the file.
    let unknown = "SELECT name, error FROM pg_file_settings WHERE error IS NOT NULL AND name NOT IN \
                   (SELECT name FROM pg_settings WHERE source = 'command line')";
    assert_eq!(asked(unknown)?, "");
    let settings = text.lines().filter(|line| line.contains('=') && !line.starts_with('#')).count();
    let read = asked("SELECT count(*) FROM pg_file_settings WHERE sourcefile LIKE '%/kiln.conf'")?;
    assert_eq!(read, settings.to_string());
    assert_eq!(asked("SHOW ssl")?, "on");
    assert_eq!(asked("SELECT line_number, error FROM pg_hba_file_rules WHERE error IS NOT NULL")?, "");
    let by_password = "SELECT count(*) FROM pg_hba_file_rules WHERE auth_method = 'scram-sha-256'";
    assert_eq!(asked(by_password)?, "1");

    server.psql_file("postgres", &deploy("postgres/kiln.sql"))?;
    let url = format!("postgres:///kiln?host={}&user=kiln", server.socket().display());
    let seen = files.join("seen");
    let place =
        Database { url: url.parse()?, schema: "kiln_0a1b2c3d_builder".to_owned(), password: None, seen };
    let store = SqlStore::open(&Place::Postgres(place)).await?;
    assert!(!store.epoch().is_empty());
    // Nobody else gets in.
    asked("CREATE ROLE stranger LOGIN")?;
    assert_eq!(asked("SELECT has_database_privilege('stranger', 'kiln', 'CONNECT')")?, "f");
    Ok(())
}
