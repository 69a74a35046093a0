//! What must be known to nobody is looked for everywhere.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use kiln_tests::Result;
use kiln_tests::command::both;
use kiln_tests::otlp::Collector;
use kiln_tests::server::Web;
use kiln_tests::site::Site;

/// Secrets by what they are.
#[derive(Default)]
struct Canaries(BTreeMap<String, Vec<u8>>);

impl Canaries {
    fn plant(&mut self, what: impl Into<String>, secret: &str) {
        let secret = secret.trim().as_bytes().to_vec();
        assert!(secret.len() >= 16, "too short to be told from chance");
        self.0.insert(what.into(), secret);
    }

    /// Each line of the private part of a PEM file: keys are long, and a part of one is as bad.
    fn plant_pem(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path)?;
        let (_, key) = text.split_once("PRIVATE KEY-----\n").ok_or("no private key in it")?;
        for (number, line) in key.lines().take_while(|line| !line.starts_with("-----")).enumerate() {
            // What is left of a key's last line can be a few letters.
            if line.len() >= 32 {
                self.plant(format!("line {number} of {}", path.display()), line);
            }
        }
        Ok(())
    }

    fn look(&self, place: &str, content: &[u8]) {
        for (what, secret) in &self.0 {
            assert!(memchr::memmem::find(content, secret).is_none(), "{what} is in {place}");
        }
    }

    /// Every file below a folder, and how many there were.
    fn look_below(&self, folder: &Path, but: &[PathBuf]) -> Result<usize> {
        let mut looked = 0;
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder)? {
                let entry = entry?;
                let (path, kind) = (entry.path(), entry.file_type()?);
                if but.iter().any(|but| path.starts_with(but)) {
                    continue;
                }
                if kind.is_dir() {
                    folders.push(path);
                } else if kind.is_file()
                    && let Ok(content) = std::fs::read(&path)
                {
                    // What goes away meanwhile is gone.
                    self.look(&path.display().to_string(), &content);
                    looked += 1;
                }
            }
        }
        Ok(looked)
    }

    /// Command lines and environments of everything that runs here.
    fn look_at_processes(&self) -> Result<usize> {
        let mut looked = 0;
        for entry in std::fs::read_dir("/proc")? {
            let path = entry?.path();
            if !path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().bytes().all(|b| b.is_ascii_digit()))
            {
                continue;
            }
            for part in ["cmdline", "environ"] {
                if let Ok(content) = std::fs::read(path.join(part)) {
                    self.look(&path.join(part).display().to_string(), &content);
                    looked += 1;
                }
            }
        }
        Ok(looked)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_anywhere_but_where_it_is_kept() -> Result<()> {
    let outside = tempfile::tempdir()?;
    let mut canaries = Canaries::default();
    let password = outside.path().join("password");
    std::fs::write(&password, "canary-of-the-database-7f3a9\n")?;
    std::fs::set_permissions(&password, std::fs::Permissions::from_mode(0o600))?;
    canaries.plant("the database's password", "canary-of-the-database-7f3a9");
    let collector = Collector::start().await?;
    let site = Site::up_on_postgres_with(
        "secrets",
        &[
            &format!("store.password_file={}", password.display()),
            &format!("otlp.endpoint={}", collector.endpoint()),
            "log=debug",
        ],
    )?;
    let keys = site.home().join("keys");
    for entry in std::fs::read_dir(keys.join("nats"))? {
        let path = entry?.path();
        canaries.plant(path.display().to_string(), &std::fs::read_to_string(&path)?);
    }
    canaries.plant_pem(&keys.join("signing.key"))?;
    canaries.plant_pem(&keys.join("pki/authority.key"))?;
    for service in ["builder", "deployer", "monitor", "node"] {
        canaries.plant_pem(&keys.join(format!("pki/{service}.pem")))?;
    }
    let token = site.json(&["token", "create", "ada", "--role", "operator"])?;
    canaries.plant("a token", token["token"].as_str().ok_or("no token")?);

    let web = Web::start(site).await?;
    web.say("second")?;
    web.settled(2).await?;
    web.site.kiln(&["rollback", "web"])?;
    web.settled(1).await?;
    let (backup, key) = (outside.path().join("backup"), outside.path().join("backup.key"));
    let (file, key_file) = (backup.display().to_string(), key.display().to_string());
    web.site.kiln(&["backup", &file, "--key", &key_file])?;
    let digits = std::fs::read_to_string(&key)?;
    canaries.plant("the backup's key", digits.split_whitespace().nth(1).ok_or("no key")?);

    // What a person sees, also where something is wrong.
    for arguments in [
        &["status"][..],
        &["status", "web"],
        &["instances"],
        &["history", "web", "-n", "0"],
        &["why", "web"],
        &["events"],
        &["audit", "-n", "0"],
        &["audit", "verify"],
        &["image", "inspect", "web"],
        &["plan", "web"],
        &["doctor"],
        &["pki", "list"],
        &["token", "list"],
        &["logs", "web"],
        &["restore", &file, "--key", &key_file],
        &["backup", &file, "--key", &key_file],
        &["apply", "/nowhere"],
    ] {
        for format in ["table", "json"] {
            let mut all = vec!["-o", format];
            all.extend(arguments);
            let output = web.site.try_kiln(&all)?;
            canaries.look(&format!("what kiln {} prints", all.join(" ")), both(&output).as_bytes());
        }
    }
    let files = canaries.look_below(web.site.home(), &[keys])?;
    let in_database = canaries.look_below(&web.site.database_folder()?, &[])?;
    canaries.look("the backup", &std::fs::read(&backup)?);
    let processes = canaries.look_at_processes()?;
    let spans = collector.spans();
    canaries.look("the traces", format!("{spans:?}").as_bytes());
    println!(
        "{} secrets, {files} files, {in_database} files of the database, {processes} of processes, {} spans",
        canaries.0.len(),
        spans.len()
    );
    assert!(files > 50 && in_database > 100 && processes > 20 && spans.len() > 20);
    // The search finds what is there.
    let planted = outside.path().join("planted");
    std::fs::create_dir(&planted)?;
    std::fs::write(planted.join("file"), "… canary-of-the-database-7f3a9 …")?;
    assert!(std::panic::catch_unwind(|| canaries.look_below(&planted, &[])).is_err());
    web.site.down()
}
