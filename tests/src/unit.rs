//! A systemd unit of `deploy`, and programs that are started with what it lets them have.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::Result;

pub struct Unit {
    name: String,
    settings: Vec<(String, String)>,
}

impl Unit {
    /// # Errors
    /// Where there is none of this name.
    pub fn of(name: &str) -> Result<Self> {
        let path = Self::folder().join(name);
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let settings = lines.filter_map(|line| line.split_once('='));
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Ok(Self { name: name.to_owned(), settings })
    }

    pub fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd")
    }

    /// Of what is said twice the last.
    pub fn get(&self, setting: &str) -> Option<&str> {
        self.settings.iter().rev().find(|(name, _)| name == setting).map(|(_, value)| value.as_str())
    }

    /// # Errors
    /// Where it does not say.
    pub fn wanted(&self, setting: &str) -> Result<&str> {
        self.get(setting).ok_or_else(|| format!("{} does not say {setting}", self.name).into())
    }

    /// The capabilities that it names, without the prefix; and whether it gives all but these.
    ///
    /// # Errors
    /// Where it bounds them not at all.
    pub fn bounds(&self) -> Result<(BTreeSet<&str>, bool)> {
        let text = self.wanted("CapabilityBoundingSet")?;
        let (names, but) = text.strip_prefix('~').map_or((text, false), |names| (names, true));
        Ok((names.split_whitespace().map(|name| name.trim_start_matches("CAP_")).collect(), but))
    }

    /// Writes a program that becomes another one, with the rights that the unit gives it. A unit's file systems, control
    /// group and filter of system calls are systemd's to make.
    ///
    /// # Errors
    /// Where it can't be written, or the unit says what this does not know.
    pub fn write_starter(&self, at: &Path, program: &Path) -> Result<()> {
        let mut script = "#!/bin/sh -e\n".to_owned();
        for (setting, command) in [("UMask", "umask"), ("LimitCORE", "ulimit -c")] {
            if let Some(value) = self.get(setting) {
                writeln!(script, "{command} {value}")?;
            }
        }
        let (names, but) = self.bounds()?;
        let (mut list, sign) = if but { ("+all".to_owned(), '-') } else { ("-all".to_owned(), '+') };
        for name in names {
            write!(list, ",{sign}{}", name.to_lowercase())?;
        }
        // Without those that are inheritable, which would be given to root whatever the bounds.
        write!(script, "exec setpriv --inh-caps -all --bounding-set {list}")?;
        match self.get("AmbientCapabilities") {
            None | Some("") => {}
            Some(other) => return Err(format!("{}: AmbientCapabilities={other}", self.name).into()),
        }
        if self.get("NoNewPrivileges") == Some("yes") {
            script.push_str(" --no-new-privs");
        }
        writeln!(script, " -- {} \"$@\"", program.display())?;
        std::fs::write(at, script)?;
        Ok(std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o755))?)
    }
}
