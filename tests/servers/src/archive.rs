//! A Debian archive of a few packages: made, signed and served on loopback by the test itself, so that a package can
//! get an update at a moment of the test's choosing.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_model::digest::Digest;

use crate::Result;
use crate::command::run;

pub struct Archive {
    folder: PathBuf,
    address: SocketAddr,
    packages: Vec<Package>,
    door: Arc<Door>,
}

/// Who is let in.
#[derive(Default)]
struct Door {
    is_away: AtomicBool,
    /// What has to stand after `Authorization:`.
    asks_for: Mutex<Option<String>>,
}

struct Package {
    control: String,
    filename: String,
    size: u64,
    digest: Digest,
}

impl Archive {
    /// An empty archive, served from now on until the process ends.
    ///
    /// # Errors
    /// Where gpg, the disk or the port fails.
    pub fn serve(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder.join("www/pool"))?;
        let keys = make_key(folder, KEYS)?;
        run(gpg(&keys).arg("--output").arg(folder.join("archive.gpg")).arg("--export"))?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let root: Arc<Path> = folder.join("www").into();
        let door = Arc::new(Door::default());
        let seen = Arc::clone(&door);
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // Closed without an answer.
                if seen.is_away.load(Ordering::Relaxed) {
                    continue;
                }
                let (root, door) = (Arc::clone(&root), Arc::clone(&seen));
                std::thread::spawn(move || answer(&connection, &root, &door));
            }
        });
        let archive = Self { folder: folder.to_path_buf(), address, packages: Vec::new(), door };
        archive.publish()?;
        Ok(archive)
    }

    /// Whether connections are closed without an answer from now on.
    pub fn set_away(&self, away: bool) {
        self.door.is_away.store(away, Ordering::Relaxed);
    }

    /// Lets in only who says this, such as `Basic a2lsbjpwdw==`.
    ///
    /// # Errors
    /// Where a thread of the server broke off.
    pub fn ask_for(&self, authorization: &str) -> Result<()> {
        *self.door.asks_for.lock().map_err(|_| "the server broke off")? = Some(authorization.to_owned());
        Ok(())
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The key ring that verifies it.
    pub fn key_ring(&self) -> PathBuf {
        self.folder.join("archive.gpg")
    }

    /// Adds a package with one file, and publishes; an older version stays in the pool, as archives do for a while.
    ///
    /// # Errors
    /// Where dpkg-deb, gpg or the disk fails.
    pub fn add(&mut self, name: &str, version: &str, path: &str, content: &str) -> Result<()> {
        let tree = self.folder.join("tree");
        let file = tree.join(path.trim_start_matches('/'));
        std::fs::create_dir_all(file.parent().ok_or("a file lies in a folder")?)?;
        std::fs::create_dir_all(tree.join("DEBIAN"))?;
        std::fs::write(&file, content)?;
        let control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Tester <tester@localhost>\n\
             Description: made by a test\n"
        );
        std::fs::write(tree.join("DEBIAN/control"), &control)?;
        let filename = format!("pool/{name}_{version}_all.deb");
        let deb = self.folder.join("www").join(&filename);
        run(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).arg(&tree).arg(&deb))?;
        std::fs::remove_dir_all(&tree)?;
        let bytes = std::fs::read(&deb)?;
        self.packages.push(Package {
            control,
            filename,
            size: bytes.len() as u64,
            digest: Digest::of(&bytes),
        });
        self.publish()
    }

    /// Changes a byte of the newest package, or puts it back.
    ///
    /// # Errors
    /// Where there is none, or the disk fails.
    pub fn flip_a_byte(&self) -> Result<()> {
        let package = self.packages.last().ok_or("there is no package")?;
        let path = self.folder.join("www").join(&package.filename);
        let mut content = std::fs::read(&path)?;
        *content.last_mut().ok_or("it is empty")? ^= 1;
        Ok(std::fs::write(path, content)?)
    }

    /// As it is, from now on.
    ///
    /// # Errors
    /// Where gpg or the disk fails.
    pub fn publish(&self) -> Result<()> {
        self.release(&self.packages, "now", KEYS)
    }

    /// As it is, by a key that nobody trusts.
    ///
    /// # Errors
    /// Where gpg or the disk fails.
    pub fn publish_by_a_stranger(&self) -> Result<()> {
        make_key(&self.folder, STRANGERS)?;
        self.release(&self.packages, "now", STRANGERS)
    }

    /// As it was an hour ago, before the newest package came.
    ///
    /// # Errors
    /// Where gpg or the disk fails.
    pub fn publish_of_before(&self) -> Result<()> {
        let (_, before) = self.packages.split_last().ok_or("there is no package")?;
        self.release(before, "1 hour ago", KEYS)
    }

    fn release(&self, packages: &[Package], date: &str, keys: &str) -> Result<()> {
        let mut index = String::new();
        for Package { control, filename, size, digest } in packages {
            writeln!(index, "{control}Filename: {filename}\nSize: {size}\nSHA256: {}\n", digest.hex())?;
        }
        let suite = self.folder.join("www/dists/test");
        let binary = suite.join("main/binary-amd64");
        std::fs::create_dir_all(&binary)?;
        std::fs::write(binary.join("Packages"), &index)?;
        let date = run(Command::new("date").args(["--utc", "--rfc-email", "--date", date]))?;
        let release = format!(
            "Origin: Test\nSuite: test\nCodename: test\nArchitectures: amd64 all\nComponents: main\nDate: {}\n\
             SHA256:\n {} {} main/binary-amd64/Packages\n",
            date.trim().replace("+0000", "UTC"),
            Digest::of(index.as_bytes()).hex(),
            index.len()
        );
        std::fs::write(self.folder.join("Release"), release)?;
        let signed = suite.join("InRelease.new");
        run(gpg(&self.folder.join(keys))
            .args(["--yes", "--clearsign", "--output"])
            .arg(&signed)
            .arg(self.folder.join("Release")))?;
        // A reader sees the old file or the new one, whole.
        Ok(std::fs::rename(signed, suite.join("InRelease"))?)
    }
}

/// Folders of gpg's: the archive's own key, and another one.
const KEYS: &str = "keys";
const STRANGERS: &str = "strangers-keys";

fn make_key(folder: &Path, name: &str) -> Result<PathBuf> {
    let keys = folder.join(name);
    std::fs::create_dir_all(&keys)?;
    run(Command::new("chmod").arg("700").arg(&keys))?;
    run(gpg(&keys).args([
        "--quick-generate-key",
        "--passphrase",
        "",
        "Kiln test archive",
        "ed25519",
        "sign",
        "0",
    ]))?;
    Ok(keys)
}

impl Drop for Archive {
    fn drop(&mut self) {
        // gpg starts an agent for each folder of keys, which would outlive the test.
        for keys in [KEYS, STRANGERS].map(|name| self.folder.join(name)) {
            if keys.exists() {
                let _ = Command::new("gpgconf").env("GNUPGHOME", keys).args(["--kill", "gpg-agent"]).status();
            }
        }
    }
}

fn gpg(keys: &Path) -> Command {
    let mut gpg = Command::new("gpg");
    gpg.arg("--homedir").arg(keys).args(["--batch", "--quiet", "--pinentry-mode", "loopback"]);
    gpg
}

/// Answers the requests of one connection with files below `root`.
fn answer(connection: &TcpStream, root: &Path, door: &Door) {
    let served = || -> Result<()> {
        connection.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut lines = BufReader::new(connection).lines();
        let mut output = connection;
        while let Some(request) = lines.next() {
            let request = request?;
            let mut said = None;
            for header in lines.by_ref() {
                let header = header?;
                if header.is_empty() {
                    break;
                }
                said = header.strip_prefix("Authorization: ").map(str::to_owned).or(said);
            }
            let wanted = door.asks_for.lock().map_err(|_| "another thread broke off")?.clone();
            if wanted.is_some() && said != wanted {
                let status = "401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"test\"";
                write!(output, "HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n")?;
                continue;
            }
            let path = request.split(' ').nth(1).unwrap_or("/").trim_start_matches('/');
            let file = root.join(path);
            let content = if path.contains("..") { None } else { std::fs::read(file).ok() };
            let (status, body) = content.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
            write!(output, "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", body.len())?;
            output.write_all(&body)?;
        }
        Ok(())
    };
    // A client that goes away in the middle is the client's business.
    let _ = served();
}
