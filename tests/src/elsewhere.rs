//! Somebody on another machine: no folder of the site, a folder of settings of their own.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use kiln_model::event::Service;

use crate::Result;
use crate::command::{binary, both};
use crate::free_port;
use crate::site::Site;

/// A port of this machine for each service.
pub struct Ports(Vec<(Service, u16)>);

impl Ports {
    /// # Errors
    /// Where none is free.
    pub fn free() -> Result<Self> {
        let ports: Result<_> = Service::ALL.into_iter().map(|service| Ok((service, free_port()?))).collect();
        Ok(Self(ports?))
    }

    pub fn each(&self) -> impl Iterator<Item = (Service, u16)> {
        self.0.iter().copied()
    }

    /// `listen.builder=127.0.0.1:…` for each service.
    pub fn settings(&self) -> Vec<String> {
        self.each().map(|(service, port)| format!("listen.{service}=127.0.0.1:{port}")).collect()
    }
}

/// Who it is, is in the folder, as `kiln login` leaves it.
#[derive(Debug)]
pub struct Elsewhere<'a> {
    folder: &'a Path,
    site: &'a str,
}

impl<'a> Elsewhere<'a> {
    pub const fn new(folder: &'a Path, site: &'a str) -> Self {
        Self { folder, site }
    }

    /// Runs `kiln`, whatever comes of it.
    ///
    /// # Errors
    /// Where it can't be started.
    pub fn kiln(&self, arguments: &[&str], input: &str) -> Result<Output> {
        let mut kiln = Command::new(binary("kiln")?)
            .env("XDG_CONFIG_HOME", self.folder)
            .arg("--home")
            .arg(self.folder.join("nothing"))
            .args(["--site", self.site])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        kiln.stdin.take().ok_or("no input")?.write_all(input.as_bytes())?;
        Ok(kiln.wait_with_output()?)
    }

    /// Runs `kiln`, and gives what it printed.
    ///
    /// # Errors
    /// Where its exit status is not 0, with everything that it printed.
    pub fn does(&self, arguments: &[&str], input: &str) -> Result<String> {
        let output = self.kiln(arguments, input)?;
        if output.status.success() {
            return Ok(both(&output));
        }
        Err(format!("kiln {} ended with {}:\n{}", arguments.join(" "), output.status, both(&output)).into())
    }

    /// `kiln login`, with a proof as in `--token`.
    ///
    /// # Errors
    /// As for [`Elsewhere::does`].
    pub fn log_in(&self, site: &Site, ports: &Ports, proof: &[&str], input: &str) -> Result<String> {
        let authority = site.home().join("keys/pki/authority.pem").display().to_string();
        let servers: Vec<_> =
            ports.each().map(|(service, port)| format!("{service}=https://127.0.0.1:{port}")).collect();
        let mut arguments = vec!["login", "--authority", &authority];
        for server in &servers {
            arguments.extend(["--server", server]);
        }
        arguments.extend(proof);
        self.does(&arguments, input)
    }

    /// Runs what must be refused in these words.
    ///
    /// # Errors
    /// Where it is not, or not so.
    pub fn is_refused(&self, arguments: &[&str], words: &[&str]) -> Result<()> {
        let output = self.kiln(arguments, "")?;
        let text = both(&output);
        let missing = words.iter().find(|word| !text.contains(**word));
        match (output.status.code(), missing) {
            (Some(4), None) => Ok(()),
            _ => {
                Err(format!("kiln {}: {}, no {missing:?} in {text}", arguments.join(" "), output.status)
                    .into())
            }
        }
    }
}
