//! The files that a site is run in production with.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_tests::Result;
use kiln_tests::command::{binary, run};

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// The units for the site `local`, with the programs where they were built.
fn units(folder: &Path) -> Result<Vec<PathBuf>> {
    let programs = binary("kiln")?.with_file_name("");
    let mut units = Vec::new();
    for entry in std::fs::read_dir(deploy("systemd"))? {
        let entry = entry?;
        let text = std::fs::read_to_string(entry.path())?
            .replace("/usr/local/lib/kiln/nats-server", "/bin/true")
            .replace("/usr/local/bin/", &programs.display().to_string());
        let unit = folder.join(entry.file_name().to_string_lossy().replace('@', "@local"));
        std::fs::write(&unit, text)?;
        units.push(unit);
    }
    units.sort();
    Ok(units)
}

#[test]
fn systemd_understands_every_unit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let units = units(folder.path())?;
    assert_eq!(units.len(), 9, "{units:?}");
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&units).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    // It looks at the machine's own units as well.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("kiln")).collect();
    assert!(ours.is_empty(), "{}", ours.join("\n"));
    Ok(())
}

#[test]
fn each_unit_is_enabled_by_itself() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (system, root) = (folder.path().join("etc/systemd/system"), folder.path().display().to_string());
    std::fs::create_dir_all(&system)?;
    for entry in std::fs::read_dir(deploy("systemd"))? {
        let entry = entry?;
        std::fs::copy(entry.path(), system.join(entry.file_name()))?;
    }
    for entry in std::fs::read_dir(&system)? {
        let unit = entry?.file_name().to_string_lossy().replace('@', "@local");
        let wanted_by = match unit.as_str() {
            // Its timer starts it.
            "kiln-issue@local.service" => None,
            unit if unit.ends_with(".timer") => Some("timers.target.wants"),
            unit if unit.ends_with(".service") || unit.ends_with(".target") => {
                Some("multi-user.target.wants")
            }
            _ => None,
        };
        if let Some(wanted_by) = wanted_by {
            run(Command::new("systemctl").args(["--root", &root, "enable", &unit]))?;
            let link = system.join(wanted_by).join(&unit);
            assert!(link.is_symlink(), "{unit} would not be started");
        }
    }
    Ok(())
}

/// What can do without rights has none; the node and the builder make namespaces and mounts.
#[test]
fn units_that_need_no_rights_have_none() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for unit in units(folder.path())? {
        let name = unit.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if ["kiln-tend@", "kiln-issue@local.service", "kiln-deployer@", "kiln-monitor@", "kiln-nats@"]
            .iter()
            .any(|it| name.starts_with(it))
        {
            // Of 100; what remains is the network, and root as the owner of its files.
            run(Command::new("systemd-analyze")
                .args(["security", "--offline=yes", "--threshold=20"])
                .arg(&unit))?;
        }
    }
    let node = std::fs::read_to_string(deploy("systemd/kiln-node@.service"))?;
    let settings: Vec<_> = node.lines().filter(|line| !line.starts_with('#')).collect();
    assert!(settings.contains(&"KillMode=process"), "instances outlive the node");
    // Each of these would give it a mount namespace, or bind its instances too.
    for setting in [
        "Protect",
        "Private",
        "ReadOnly",
        "ReadWrite",
        "Inaccessible",
        "Bind",
        "Mount",
        "SystemCallFilter",
        "NoNew",
    ] {
        assert!(!settings.iter().any(|line| line.starts_with(setting)), "{setting}");
    }
    Ok(())
}
