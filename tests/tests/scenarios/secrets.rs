//! What must be known to nobody is looked for everywhere.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::command::{both, run};
use kiln_tests::elsewhere::{Elsewhere, Ports};
use kiln_tests::free_port;
use kiln_tests::machine::Machine;
use kiln_tests::otlp::Collector;
use kiln_tests::registry::{self, Registry};
use kiln_tests::server::{SETTLES, Web};
use kiln_tests::signing::{another_key, restart_with};
use kiln_tests::site::Site;
use kiln_tests::stores::{self, Cell};
use kiln_tests::wait::until;
use rustix::process::Signal;

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

    fn look_at_cells(&self, of: &str, cells: &[Cell]) {
        for cell in cells {
            self.look(&format!("{} of {of}", cell.place), &cell.content);
        }
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

/// What a person sees of these commands, whatever comes of them.
fn look_at_commands(canaries: &Canaries, site: &Site, when: &str, commands: &[&[&str]]) -> Result<()> {
    for arguments in commands {
        for format in ["table", "json"] {
            let mut all = vec!["-o", format];
            all.extend(*arguments);
            let output = site.try_kiln(&all)?;
            canaries.look(&format!("what kiln {} prints {when}", all.join(" ")), both(&output).as_bytes());
        }
    }
    Ok(())
}

fn write_for_oneself(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text)?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?)
}

/// A command that signs with a key that a PIN opens, and is as careless with the PIN as a command can be: it says it on
/// standard error always, and on standard output while `broken` is there.
fn careless_signer(folder: &Path, canaries: &mut Canaries) -> Result<PathBuf> {
    const PIN: &str = "canary-of-the-pin-93d07e1c";
    let (clear, key, pin) = (folder.join("hsm.key"), folder.join("closed.key"), folder.join("pin"));
    canaries.plant("the PIN of the key that a command signs with", PIN);
    write_for_oneself(&pin, PIN)?;
    another_key(folder, "hsm")?;
    canaries.plant_pem(&clear)?;
    let password = format!("file:{}", pin.display());
    let mut close = Command::new("openssl");
    close.args(["pkey", "-aes256", "-passout", &password, "-in"]).arg(&clear).arg("-out").arg(&key);
    run(&mut close)?;
    std::fs::remove_file(&clear)?;
    let program = folder.join("sign");
    let script = format!(
        "#!/bin/sh\ncd {}\ncat > bytes.$$\ncat pin >&2\ntest ! -e broken || exec cat pin\n\
         openssl pkeyutl -sign -rawin -inkey closed.key -passin file:pin -in bytes.$$ | base64 -w0\n",
        folder.display()
    );
    write_for_oneself(&program, &script)?;
    Ok(program)
}

/// Every one of the secrets is used on the way, and most of what uses them fails once: an error is where a secret gets out.
#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_anywhere_but_where_it_is_kept() -> Result<()> {
    const PASSWORD: &str = "canary-of-the-database-7f3a9";
    let outside = tempfile::tempdir()?;
    let mut canaries = Canaries::default();
    let password = outside.path().join("password");
    write_for_oneself(&password, PASSWORD)?;
    canaries.plant("the database's password", PASSWORD);
    let mut machine = Machine::new("edge-1", 7)?;
    let mut registry = Registry::start(&[machine.host()]).await?;
    registry.give_keys(&registry.folder(), machine.host())?;
    canaries.plant("the registry's password", registry::PASSWORD);
    canaries.plant("the registry's user and password", registry::CREDENTIALS);
    let collector = Collector::start().await?;
    let ports = Ports::free()?;
    let mut settings = ports.settings();
    settings.extend([
        machine.setting(),
        format!("store.password_file={}", password.display()),
        format!("registry.repository={}", registry.repository(machine.host())),
        format!("registry.ca={}", registry.folder().join("registry-ca.pem").display()),
        format!("registry.credentials={}", registry.folder().join("registry.json").display()),
        format!("otlp.endpoint={}", collector.endpoint()),
        "log=debug".to_owned(),
    ]);
    let settings: Vec<_> = settings.iter().map(String::as_str).collect();
    let site = Site::up_on_postgres_asking("secrets", PASSWORD, &settings)?;
    let keys = site.home().join("keys");
    for entry in std::fs::read_dir(keys.join("nats"))? {
        let path = entry?.path();
        canaries.plant(path.display().to_string(), &std::fs::read_to_string(&path)?);
    }
    canaries.plant_pem(&keys.join("signing.key"))?;
    for entry in std::fs::read_dir(keys.join("pki"))? {
        let path = entry?.path();
        // `authority.pem` is for everybody.
        if std::fs::read_to_string(&path)?.contains("PRIVATE KEY") {
            canaries.plant_pem(&path)?;
        }
    }
    let signer = careless_signer(outside.path(), &mut canaries)?;
    let public = outside.path().join("hsm.pub").display().to_string();
    let both_sign = format!(
        "[signing]\nkeys = [{{ file = \"keys/signing.key\" }}, {{ command = [\"{}\"], public = \"{public}\" }}]\n\
         [[signing.trust]]\nservers = [\"*\"]\nkeys = [\"keys/signing.pub\", \"{public}\"]\nthreshold = 2\n",
        signer.display()
    );
    restart_with(&site, &both_sign)?;
    machine.join(&site, 7, &registry)?;
    let identity = machine.home().join("keys/pki/node.pem");
    canaries.plant_pem(&identity)?;
    let web = Web::start(site).await?;

    // By a token, from elsewhere: it is taken, refused, taken back, and one that nobody gave out is tried.
    let made = web.site.json(&["token", "create", "ada", "--role", "operator"])?;
    let token = made["token"].as_str().ok_or("no token")?;
    canaries.plant("a token", token);
    // Without any, who shows no certificate does not come as far as being asked for one.
    let kept = web.site.json(&["token", "create", "bea", "--role", "viewer"])?;
    canaries.plant("a token that is kept", kept["token"].as_str().ok_or("no token")?);
    let strange = format!("kiln_{}", "5eed".repeat(16));
    canaries.plant("a token that nobody gave out", &strange);
    let person = Elsewhere::new(outside.path(), "secrets");
    let beside = outside.path().join("beside");
    run(Command::new("cp").arg("-r").arg(web.repo.path().join("web")).arg(&beside))?;
    let text = std::fs::read_to_string(beside.join("server.yaml"))?;
    let text = text.replace("name: web", "name: beside").replace("\nrun:\n", "\nrun:\n  node: edge-1\n");
    std::fs::write(
        beside.join("server.yaml"),
        text.replace(&web.port.to_string(), &free_port()?.to_string()),
    )?;
    let mut said = person.log_in(&web.site, &ports, &["--token"], token)?;
    said += &person.does(&["apply", &beside.display().to_string()], "")?;
    said += &both(&person.kiln(&["remove", "beside"], "")?);
    // With an image that its machine pulls.
    web.site.settled("beside", 1, SETTLES).await?;
    web.site.kiln(&["token", "revoke", made["id"].as_str().ok_or("no id")?])?;
    until("the token to be refused", Duration::from_secs(5), async || {
        person.is_refused(&["status"], &["unknown or was revoked"])
    })
    .await?;
    said += &both(&person.kiln(&["status"], "")?);
    assert!(person.log_in(&web.site, &ports, &["--token"], &strange).is_err());
    said += &both(&person.kiln(&["status"], "")?);
    canaries.look("what a person elsewhere is told", said.as_bytes());

    // What signs says its PIN instead; the registry is away.
    let broken = outside.path().join("broken");
    std::fs::write(&broken, "")?;
    web.say("unsigned")?;
    until("the command's answer to be refused", SETTLES, async || {
        let told = web.site.kiln(&["history", "web", "-n", "0"])?;
        if told.contains("no signature in base64") { Ok(()) } else { Err(told.into()) }
    })
    .await?;
    std::fs::remove_file(&broken)?;
    registry.kill()?;
    web.say("second")?;
    until("the registry to be missed", SETTLES, async || {
        let told = web.site.kiln(&["history", "web", "-n", "0"])?;
        if told.contains("push sha256:") { Ok(()) } else { Err(told.into()) }
    })
    .await?;
    registry.resume().await?;
    web.settled(2).await?;
    web.site.kiln(&["rollback", "web"])?;
    web.settled(1).await?;
    let (backup, key) = (outside.path().join("backup"), outside.path().join("backup.key"));
    let (file, key_file) = (backup.display().to_string(), key.display().to_string());
    web.site.kiln(&["backup", &file, "--key", &key_file])?;
    let digits = std::fs::read_to_string(&key)?;
    canaries.plant("the backup's key", digits.split_whitespace().nth(1).ok_or("no key")?);

    // What a person sees, also where something is wrong.
    let commands: &[&[&str]] = &[
        &["status"],
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
    ];
    look_at_commands(&canaries, &web.site, "", commands)?;
    let another = outside.path().join("another-backup").display().to_string();
    let some: &[&[&str]] = &[
        &["status", "web"],
        &["events"],
        &["audit", "verify"],
        &["rollback", "web"],
        &["backup", &another, "--key", &key_file],
    ];
    web.site.signal("nats", Signal::STOP)?;
    let looked = look_at_commands(&canaries, &web.site, "without a broker", some);
    web.site.signal("nats", Signal::CONT)?;
    looked?;
    const WRONG: &str = "canary-of-a-wrong-password-c41e";
    canaries.plant("a password that the database refuses", WRONG);
    write_for_oneself(&password, WRONG)?;
    let refused = web.site.try_kiln(&["backup", &format!("{another}-2"), "--key", &key_file])?;
    assert!(both(&refused).contains("refuses this user"), "{}", both(&refused));
    look_at_commands(&canaries, &web.site, "with a wrong password", some)?;
    write_for_oneself(&password, PASSWORD)?;
    // It ends with the thread that starts it again, so others look meanwhile.
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| look_at_commands(&canaries, &web.site, "without a database", some));
        web.site.kill_database(Duration::from_secs(5))?;
        looking.join().map_err(|_| "a secret was found while the database was away")?
    })?;
    until("the database to be back", SETTLES, async || web.site.kiln(&["status", "web"]).map(drop)).await?;

    let mut files = canaries.look_below(web.site.home(), &[keys])?;
    files += canaries.look_below(machine.home(), &[machine.home().join("keys")])?;
    let in_database = canaries.look_below(&web.site.database_folder()?, &[])?;
    let mut cells = 0;
    for service in Service::ALL {
        let kept = web.site.cells(service).await?;
        canaries.look_at_cells(service.as_str(), &kept);
        cells += kept.len();
    }
    let kept = stores::cells(&machine.home().join("node/store.db")).await?;
    canaries.look_at_cells("another machine's node", &kept);
    cells += kept.len();
    canaries.look("the backup", &std::fs::read(&backup)?);
    let processes = canaries.look_at_processes()?;
    let spans = collector.spans();
    canaries.look("the traces", format!("{spans:?}").as_bytes());
    println!(
        "{} secrets, {files} files, {in_database} files of the database, {cells} texts in stores, {processes} of \
         processes, {} spans",
        canaries.0.len(),
        spans.len()
    );
    assert!(files > 50 && in_database > 100 && cells > 500 && processes > 20 && spans.len() > 20);
    // The search finds what is there.
    let planted = outside.path().join("planted");
    std::fs::create_dir(&planted)?;
    std::fs::write(planted.join("file"), format!("… {PASSWORD} …"))?;
    assert!(std::panic::catch_unwind(|| canaries.look_below(&planted, &[])).is_err());
    web.site.change_store("node", &format!("CREATE TABLE planted AS SELECT '{PASSWORD}' AS body")).await?;
    let kept = web.site.cells(Service::Node).await?;
    assert!(std::panic::catch_unwind(|| canaries.look_at_cells("the node", &kept)).is_err());
    web.site.down()?;
    machine.clear()
}
