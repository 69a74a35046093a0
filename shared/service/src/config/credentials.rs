//! Who a site is to those that ask: Git repositories over https, and archives. What it says to them stands in files of git's and
//! apt's own kind, which only these programs read.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, Site};

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CredentialsFile {
    /// Lines as git-credential-store(1) has them: `https://kiln:TOKEN@git.example`. Relative to the home.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub git: Option<String>,
    /// Lines as apt_auth.conf(5) has them: `machine https://archive.example login kiln password TOKEN`. Relative to the home.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub archives: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    pub git: Option<PathBuf>,
    pub archives: Option<PathBuf>,
}

impl CredentialsFile {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(self, home: &Path) -> Credentials {
        let path = |file: Option<String>| file.map(|file| home.join(file));
        Credentials { git: path(self.git), archives: path(self.archives) }
    }
}

impl Site {
    /// The files that are there and closed to others.
    ///
    /// # Errors
    /// Names the one that is not.
    pub fn checked_credentials(&self) -> Result<&Credentials, Error> {
        let Credentials { git, archives } = &self.credentials;
        for (field, path) in [("credentials.git", git), ("credentials.archives", archives)] {
            if let Some(path) = path {
                let invalid = |reason| Error::Invalid { path: path.clone(), field, reason };
                is_private(path).map_err(invalid)?;
            }
        }
        Ok(&self.credentials)
    }
}

/// # Errors
/// What is wrong with a file that only its owner should be able to read.
pub(super) fn is_private(path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    match metadata.permissions().mode() & 0o077 {
        0 => Ok(()),
        _ => Err("others may look into it: chmod 600".to_owned()),
    }
}

/// What git has to be told so that it finds credentials in a file, as part of its configuration. It only looks: git itself
/// would have those taken out of the file that a server has refused once.
pub fn git_credentials(file: Option<&Path>) -> String {
    let Some(file) = file else { return String::new() };
    let quoted = file.display().to_string().replace('\'', r"'\''");
    let helper = format!("!f() {{ test \"$1\" != get || git credential-store --file='{quoted}' get; }}; f");
    format!("[credential]\n\thelper = \"{}\"\n", helper.replace('\\', r"\\").replace('"', "\\\""))
}

/// What apt has to be told so that it finds credentials in a file, as an option of its own.
pub fn apt_credentials(file: Option<&Path>) -> Option<String> {
    file.map(|file| format!("Dir::Etc::netrc={}", file.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    const FILE: &str = "https://kiln:hunter2@git.example\n";

    /// What git answers to `git credential <what>` about a host.
    fn git(config: &Path, what: &str, host: &str) -> (bool, String) {
        let mut git = Command::new("git");
        git.args(["credential", what]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        git.env("GIT_CONFIG_GLOBAL", config).env("GIT_CONFIG_NOSYSTEM", "1");
        git.env("GIT_TERMINAL_PROMPT", "0").env("GIT_ASKPASS", "false");
        let mut child = git.spawn().unwrap();
        let asked = format!("protocol=https\nhost={host}\nusername=kiln\npassword=hunter2\n\n");
        let asked = if what == "fill" { format!("protocol=https\nhost={host}\n\n") } else { asked };
        child.stdin.take().unwrap().write_all(asked.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn git_finds_them_for_their_host_and_never_takes_them_away() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("it's \"here\" $HOME");
        std::fs::write(&file, FILE).unwrap();
        let config = folder.path().join("gitconfig");
        std::fs::write(&config, git_credentials(Some(&file))).unwrap();
        let (found, said) = git(&config, "fill", "git.example");
        assert!(found && said.contains("username=kiln\npassword=hunter2\n"), "{said}");
        assert!(!git(&config, "fill", "other.example").0);
        git(&config, "reject", "git.example");
        git(&config, "approve", "new.example");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), FILE);
        assert_eq!(git_credentials(None), "");
    }

    #[test]
    fn files_that_others_can_read_are_refused_by_name() {
        let home = tempfile::tempdir().unwrap();
        let text = "name = \"home\"\nid = \"0a1b2c3d\"\nsubnet = \"10.77.3.0/24\"\nbridge = \"kiln-0\"\n\
            nats.url = \"nats://127.0.0.1:4222\"\ncredentials = { archives = \"archives\", git = \"git\" }\n";
        std::fs::write(home.path().join("site.toml"), text).unwrap();
        let site = Site::load(home.path()).unwrap();
        let refused = || site.checked_credentials().unwrap_err().to_string();
        let file = home.path().join("git");
        assert!(
            refused().contains("`credentials.git`") && refused().contains("No such file"),
            "{}",
            refused()
        );
        let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        std::fs::write(&file, FILE).unwrap();
        mode(0o640);
        assert!(refused().contains("chmod 600"), "{}", refused());
        mode(0o600);
        assert!(refused().contains("`credentials.archives`"), "{}", refused());
    }
}
