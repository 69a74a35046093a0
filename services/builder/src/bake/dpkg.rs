//! dpkg's database, as dpkg leaves it between unpacking and configuring.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use kiln_formats::deb822::{self, Paragraph};

use super::deb::Deb;
use super::error::BakeError;
use super::tree::Tree;
use super::unpack::Unpacked;

pub(crate) const STATUS: &[u8] = b"var/lib/dpkg/status";
const INFO: &str = "var/lib/dpkg/info";
const FILE_TRIGGERS: &[u8] = b"var/lib/dpkg/triggers/File";

/// What dpkg knew before a step.
#[derive(Debug, Default)]
pub(crate) struct Database {
    status: String,
    installed: BTreeSet<String>,
    /// Paths below which a change is of interest to an installed package.
    file_triggers: Vec<String>,
    diverts: bool,
    overrides: bool,
}

impl Database {
    pub(crate) fn read(tree: &Tree) -> Result<Self, BakeError> {
        let text = |path: &[u8]| -> Result<String, BakeError> {
            let content = tree.read(path).map_err(io("read", path))?;
            Ok(content.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default())
        };
        let status = text(STATUS)?;
        let paragraphs = deb822::parse(&status).map_err(|why| BakeError::Package {
            package: "of the layers below".to_owned(),
            why: format!("dpkg's status: {why}"),
        })?;
        let installed = paragraphs.iter().filter_map(|p| p.get("Package")).map(str::to_owned).collect();
        let file_triggers = text(FILE_TRIGGERS)?
            .lines()
            .filter_map(|line| line.rsplit_once(' '))
            .map(|(path, _)| path.to_owned())
            .collect();
        let diverts = !text(b"var/lib/dpkg/diversions")?.trim().is_empty();
        let overrides = !text(b"var/lib/dpkg/statoverride")?.trim().is_empty();
        Ok(Self { status, installed, file_triggers, diverts, overrides })
    }

    /// Why these packages have to be unpacked by dpkg itself; nothing where they are plainly new.
    pub(crate) fn needs_dpkg(&self, debs: &[Deb]) -> Option<String> {
        if let Some(deb) = debs.iter().find(|deb| self.installed.contains(&deb.name)) {
            return Some(format!("{} is there in another version", deb.name));
        }
        if self.overrides {
            return Some("owners or modes are overridden".to_owned());
        }
        let diverting = debs.iter().find(|deb| {
            deb.control_file("preinst").is_some_and(|script| {
                let script = String::from_utf8_lossy(script);
                script.contains("dpkg-divert") || script.contains("dpkg-statoverride")
            })
        });
        diverting.map(|deb| format!("{} diverts files before it is unpacked", deb.name))
    }

    /// Diversions say that a package's file belongs under another name: dpkg's to apply.
    pub(crate) fn diverted(&self, tree: &Tree, unpacked: &[Unpacked]) -> Result<Option<String>, BakeError> {
        if !self.diverts {
            return Ok(None);
        }
        let path = b"var/lib/dpkg/diversions";
        let content = tree.read(path).map_err(io("read", path))?.unwrap_or_default();
        let text = String::from_utf8_lossy(&content).into_owned();
        // Three lines each: from, to, by whom.
        let from: BTreeSet<&[u8]> = text.lines().step_by(3).map(str::as_bytes).collect();
        Ok(unpacked
            .iter()
            .flat_map(|unpacked| &unpacked.paths)
            .find(|path| from.contains(path.as_slice()))
            .map(|path| format!("{} is diverted", String::from_utf8_lossy(path))))
    }

    /// The paths that installed packages want to hear of, for `dpkg-trigger`.
    pub(crate) fn triggered(&self, unpacked: &[Unpacked]) -> Vec<String> {
        self.file_triggers
            .iter()
            .filter(|interest| {
                unpacked.iter().flat_map(|unpacked| &unpacked.paths).any(|path| {
                    path.strip_prefix(interest.as_bytes())
                        .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
                })
            })
            .cloned()
            .collect()
    }

    /// Writes the new packages in as `install ok unpacked`.
    pub(crate) fn add(
        &self,
        tree: &Tree,
        debs: &[Deb],
        unpacked: &[Unpacked],
        architecture: &str,
    ) -> Result<(), BakeError> {
        let put = |path: &str, mode: u32, content: &[u8]| {
            tree.write(path.as_bytes(), mode, content).map_err(io("write", path.as_bytes()))
        };
        let mut status = self.status.clone();
        if !status.is_empty() && !status.ends_with("\n\n") {
            status.push('\n');
        }
        for (deb, unpacked) in debs.iter().zip(unpacked) {
            status.push_str(&unpacked_paragraph(&deb.control, &deb.conffiles()));
            let name = deb.info_name();
            let mut list = unpacked.paths.join(&b'\n');
            list.push(b'\n');
            put(&format!("{INFO}/{name}.list"), 0o644, &list)?;
            for (file, mode, content) in &deb.control_files {
                put(&format!("{INFO}/{name}.{file}"), *mode, content)?;
            }
        }
        put("var/lib/dpkg/status", 0o644, status.as_bytes())?;
        if self.status.is_empty() {
            put(&format!("{INFO}/format"), 0o644, b"1\n")?;
            put("var/lib/dpkg/arch", 0o644, format!("{architecture}\n").as_bytes())?;
            tree.folder(b"var/lib/dpkg/updates")
                .map_err(|e| io("make", b"var/lib/dpkg/updates")(e.into()))?;
        }
        add_interests(tree, debs)
    }
}

/// `interest` lines of the packages' triggers: by name in a file of that name, by path all in one.
fn add_interests(tree: &Tree, debs: &[Deb]) -> Result<(), BakeError> {
    for deb in debs {
        let text = String::from_utf8_lossy(deb.control_file("triggers").unwrap_or_default()).into_owned();
        for line in text.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            let (Some(directive), Some(trigger)) = (words.next(), words.next()) else { continue };
            let options = match directive {
                "interest" | "interest-await" => "",
                "interest-noawait" => "/noawait",
                _ => continue,
            };
            let package = deb.info_name();
            let (path, line) = if trigger.starts_with('/') {
                (FILE_TRIGGERS.to_vec(), format!("{trigger} {package}{options}\n"))
            } else {
                if trigger.contains('/') || trigger.starts_with('.') {
                    return Err(BakeError::Package {
                        package: deb.name.clone(),
                        why: format!("a trigger has the name {}", trigger.escape_debug()),
                    });
                }
                (format!("var/lib/dpkg/triggers/{trigger}").into_bytes(), format!("{package}{options}\n"))
            };
            let mut content = tree.read(&path).map_err(io("read", &path))?.unwrap_or_default();
            content.extend_from_slice(line.as_bytes());
            tree.write(&path, 0o644, &content).map_err(io("write", &path))?;
        }
    }
    Ok(())
}

fn unpacked_paragraph(control: &Paragraph, conffiles: &[String]) -> String {
    let mut text = String::new();
    // Writing into a String can't fail.
    for (name, value) in control.fields() {
        let _ = writeln!(text, "{name}: {value}");
        if name == "Package" {
            let _ = writeln!(text, "Status: install ok unpacked");
        }
    }
    if !conffiles.is_empty() {
        let _ = writeln!(text, "Conffiles:");
        for path in conffiles {
            // So dpkg marks one that it has unpacked but not taken over.
            let _ = writeln!(text, " {path} newconffile");
        }
    }
    text.push('\n');
    text
}

fn io(doing: &'static str, path: &[u8]) -> impl FnOnce(std::io::Error) -> BakeError {
    BakeError::io(doing, format!("/{}", String::from_utf8_lossy(path)))
}
