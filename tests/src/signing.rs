//! Other keys than the one of `kiln up`.

use std::path::Path;
use std::process::Command;

use crate::Result;
use crate::command::run;
use crate::site::Site;

const MARK: &str = "# whose word counts\n";

/// Puts `[signing]` into the settings, with the instances serving on meanwhile.
///
/// # Errors
/// Where the site does not come up with it.
pub fn restart_with(site: &Site, signing: &str) -> Result<()> {
    let path = site.home().join("site.toml");
    site.kiln(&["down", "--keep-instances"])?;
    let text = std::fs::read_to_string(&path)?;
    let before = text.split(MARK).next().unwrap_or(&text);
    std::fs::write(&path, format!("{before}{MARK}{signing}"))?;
    site.kiln(&["up"]).map(drop)
}

/// A key pair like that of `kiln up`, in files of this name.
///
/// # Errors
/// Where openssl fails.
pub fn another_key(keys: &Path, name: &str) -> Result<()> {
    let (key, public) = (keys.join(format!("{name}.key")), keys.join(format!("{name}.pub")));
    run(Command::new("openssl").args(["genpkey", "-algorithm", "ed25519", "-out"]).arg(&key))?;
    run(Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&key).arg("-out").arg(&public))?;
    Ok(())
}
