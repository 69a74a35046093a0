//! A real registry, with TLS and a password.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::Result;
use crate::site::free_port;
use crate::wait::until;

/// Of the user `kiln`.
pub const PASSWORD: &str = "canary-of-the-registry-5b1c8";
/// User and password in docker's `config.json`, and in each request.
pub const CREDENTIALS: &str = "a2lsbjpjYW5hcnktb2YtdGhlLXJlZ2lzdHJ5LTViMWM4";
/// As `htpasswd -B` writes them.
const HTPASSWD: &str = "kiln:$2b$05$BpvRrKoJf.wQoshIEs2CDukAob8ryfwmj9RVcj8kDs34FJRSPeFdO\n";

pub struct Registry {
    folder: tempfile::TempDir,
    port: u16,
    process: Option<Child>,
}

impl Registry {
    /// Answers at a port of each of these addresses of the host.
    ///
    /// # Errors
    /// Where it does not come up.
    pub async fn start(addresses: &[Ipv4Addr]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let names = addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let made = rcgen::generate_simple_self_signed(names)?;
        std::fs::write(folder.path().join("ca.pem"), made.cert.pem())?;
        std::fs::write(folder.path().join("key.pem"), made.signing_key.serialize_pem())?;
        std::fs::write(folder.path().join("htpasswd"), HTPASSWD)?;
        let at = folder.path().display();
        let config = format!(
            "version: 0.1\nlog: {{ level: warn }}\nstorage: {{ filesystem: {{ rootdirectory: {at}/data }} }}\n\
             auth: {{ htpasswd: {{ realm: kiln, path: {at}/htpasswd }} }}\n\
             http: {{ addr: \":{port}\", tls: {{ certificate: {at}/ca.pem, key: {at}/key.pem }} }}\n"
        );
        std::fs::write(folder.path().join("config.yml"), config)?;
        let mut registry = Self { folder, port, process: None };
        registry.resume().await?;
        Ok(registry)
    }

    /// # Errors
    /// Where it does not come up.
    pub async fn resume(&mut self) -> Result<()> {
        let config = self.folder.path().join("config.yml");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(config).stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(command.spawn()?);
        let port = self.port;
        until("the registry", Duration::from_secs(20), async || {
            std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map(drop).map_err(Into::into)
        })
        .await
    }

    /// # Errors
    /// Where it can't be killed.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// Of the images, as whoever has the registry at this address calls it.
    pub fn repository(&self, address: Ipv4Addr) -> String {
        format!("{address}:{}/kiln", self.port)
    }

    /// The certificate, and the credentials for this address, in a folder of keys.
    ///
    /// # Errors
    /// Where they can't be written.
    pub fn give_keys(&self, keys: &Path, address: Ipv4Addr) -> Result<()> {
        std::fs::copy(self.folder.path().join("ca.pem"), keys.join("registry-ca.pem"))?;
        let auths = serde_json::json!({
            "auths": { format!("{address}:{}", self.port): { "auth": CREDENTIALS } }
        });
        Ok(std::fs::write(keys.join("registry.json"), auths.to_string())?)
    }

    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
