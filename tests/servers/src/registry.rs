//! A real registry with a password.

use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::wait::until;
use crate::{Result, free_port};

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
    /// Answers over TLS at a port of each of these addresses of the host.
    ///
    /// # Errors
    /// Where it does not come up.
    pub async fn start(addresses: &[Ipv4Addr]) -> Result<Self> {
        let mut registry = Self::make(addresses)?;
        registry.resume().await?;
        Ok(registry)
    }

    /// Not running yet; on loopback, where it needs no TLS.
    ///
    /// # Errors
    /// Where no port is free, or the disk fails.
    pub fn on_loopback() -> Result<Self> {
        Self::make(&[])
    }

    fn make(addresses: &[Ipv4Addr]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let port = free_port()?;
        let at = folder.path().display();
        let http = if addresses.is_empty() {
            format!("addr: \"{}:{port}\"", Ipv4Addr::LOCALHOST)
        } else {
            let names = addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
            let made = rcgen::generate_simple_self_signed(names)?;
            std::fs::write(folder.path().join("ca.pem"), made.cert.pem())?;
            std::fs::write(folder.path().join("key.pem"), made.signing_key.serialize_pem())?;
            format!("addr: \":{port}\", tls: {{ certificate: {at}/ca.pem, key: {at}/key.pem }}")
        };
        std::fs::write(folder.path().join("htpasswd"), HTPASSWD)?;
        let config = format!(
            "version: 0.1\nlog: {{ level: warn }}\nstorage: {{ filesystem: {{ rootdirectory: {at}/data }} }}\n\
             auth: {{ htpasswd: {{ realm: kiln, path: {at}/htpasswd }} }}\nhttp: {{ {http} }}\n"
        );
        std::fs::write(folder.path().join("config.yml"), config)?;
        Ok(Self { folder, port, process: None })
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
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map(drop).map_err(Into::into)
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

    /// As whoever has the registry at this address calls it.
    pub fn host(&self, address: Ipv4Addr) -> String {
        format!("{address}:{}", self.port)
    }

    /// Of the images.
    pub fn repository(&self, address: Ipv4Addr) -> String {
        format!("{}/kiln", self.host(address))
    }

    /// The certificate, and the credentials for this address, in a folder of keys.
    ///
    /// # Errors
    /// Where they can't be written.
    pub fn give_keys(&self, keys: &Path, address: Ipv4Addr) -> Result<()> {
        std::fs::copy(self.folder.path().join("ca.pem"), keys.join("registry-ca.pem"))?;
        self.write_credentials(&keys.join("registry.json"), address, CREDENTIALS)
    }

    /// As docker's `config.json` has them.
    ///
    /// # Errors
    /// Where they can't be written.
    pub fn write_credentials(&self, file: &Path, address: Ipv4Addr, credentials: &str) -> Result<()> {
        let auths = serde_json::json!({ "auths": { self.host(address): { "auth": credentials } } });
        Ok(std::fs::write(file, auths.to_string())?)
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
