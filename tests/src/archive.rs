//! A Debian archive of a few packages: made, signed and served on loopback by the test itself, so that a package can
//! get an update at a moment of the test's choosing.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use kiln_model::digest::Digest;

use crate::Result;
use crate::command::run;

pub struct Archive {
    folder: PathBuf,
    address: SocketAddr,
    packages: Vec<Package>,
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
        let keys = folder.join("keys");
        std::fs::create_dir_all(&keys)?;
        std::fs::create_dir_all(folder.join("www/pool"))?;
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
        run(gpg(&keys).arg("--output").arg(folder.join("archive.gpg")).arg("--export"))?;
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let root: Arc<Path> = folder.join("www").into();
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let root = Arc::clone(&root);
                std::thread::spawn(move || answer(&connection, &root));
            }
        });
        let archive = Self { folder: folder.to_path_buf(), address, packages: Vec::new() };
        archive.publish()?;
        Ok(archive)
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

    fn publish(&self) -> Result<()> {
        let mut index = String::new();
        for Package { control, filename, size, digest } in &self.packages {
            writeln!(index, "{control}Filename: {filename}\nSize: {size}\nSHA256: {}\n", digest.hex())?;
        }
        let suite = self.folder.join("www/dists/test");
        let binary = suite.join("main/binary-amd64");
        std::fs::create_dir_all(&binary)?;
        std::fs::write(binary.join("Packages"), &index)?;
        let date = run(Command::new("date").args(["--utc", "--rfc-email"]))?;
        let release = format!(
            "Origin: Test\nSuite: test\nCodename: test\nArchitectures: amd64 all\nComponents: main\nDate: {}\n\
             SHA256:\n {} {} main/binary-amd64/Packages\n",
            date.trim().replace("+0000", "UTC"),
            Digest::of(index.as_bytes()).hex(),
            index.len()
        );
        std::fs::write(self.folder.join("Release"), release)?;
        let signed = suite.join("InRelease.new");
        run(gpg(&self.folder.join("keys"))
            .args(["--yes", "--clearsign", "--output"])
            .arg(&signed)
            .arg(self.folder.join("Release")))?;
        // A reader sees the old file or the new one, whole.
        Ok(std::fs::rename(signed, suite.join("InRelease"))?)
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        // gpg starts an agent for the key folder, which would outlive the test.
        let _ = Command::new("gpgconf")
            .env("GNUPGHOME", self.folder.join("keys"))
            .args(["--kill", "gpg-agent"])
            .status();
    }
}

fn gpg(keys: &Path) -> Command {
    let mut gpg = Command::new("gpg");
    gpg.arg("--homedir").arg(keys).args(["--batch", "--quiet", "--pinentry-mode", "loopback"]);
    gpg
}

/// Answers the requests of one connection with files below `root`.
fn answer(connection: &TcpStream, root: &Path) {
    let served = || -> Result<()> {
        connection.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut lines = BufReader::new(connection).lines();
        let mut output = connection;
        while let Some(request) = lines.next() {
            let request = request?;
            for header in lines.by_ref() {
                if header?.is_empty() {
                    break;
                }
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
