//! Programs that a step is run by, and that no image keeps: a tree of packages beside the image's own, made once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_model::digest::Digest;
use kiln_model::lock::LockedPackage;
use serde_json::json;

use super::command::{self, Stdout};
use super::error::BakeError;
use super::install::Installer;
use super::kept;
use super::sandbox::{Job, Rights};
use super::tree::{SHIFT, Tree};
use super::work::{mount_shifted, unmount_below};

/// Where a step sees them.
pub(crate) const INSIDE: &str = "/run/kiln/tools";
/// Grows when other trees are made of the same packages.
const FORMAT: u32 = 1;
const COPY_LIMIT: Duration = Duration::from_secs(600);

/// What a tree of tools is made of beside packages.
pub(crate) struct Recipe<'a> {
    /// A program's path in the tree, and the name of the script in `usr/bin` that runs it wherever the tree lies.
    pub(crate) programs: &'a [(&'a str, &'a str)],
    /// Lines of these scripts, where `$t` is the tree and `$m` the name that libraries' folders have for the machine.
    pub(crate) setting: &'a str,
    /// Run once in the tree.
    pub(crate) prepare: &'a str,
}

/// All of them.
pub(crate) fn all(home: &Path) -> PathBuf {
    home.join("tools")
}

/// The tree, made where it is not there yet.
pub(crate) fn tree(
    installer: &Installer<'_>,
    packages: &[LockedPackage],
    recipe: &Recipe<'_>,
) -> Result<PathBuf, BakeError> {
    let Recipe { programs, setting, prepare } = recipe;
    let key = json!({
        "format": FORMAT, "packages": packages, "programs": programs, "setting": setting, "prepare": prepare
    });
    let key = Digest::of_json(&key).map_err(|e| BakeError::io("name", "a tree of tools")(e.into()))?;
    let sandbox = installer.sandbox;
    let all = all(&sandbox.config.home);
    let tree = all.join(key.hex());
    if tree.is_dir() {
        kept::touch(&tree)?;
        return Ok(tree);
    }
    let built = make(installer, packages, recipe)?;
    fs::create_dir_all(&all).map_err(BakeError::io("make folder", &all))?;
    let folder = tempfile::tempdir_in(&all).map_err(BakeError::io("make a folder in", &all))?;
    let fresh = folder.path().join("tree");
    let mut copy = Command::new("cp");
    copy.args(["-a", "--"]).args([&built, &fresh]);
    let outcome = command::run(&mut copy, Stdout::Log, sandbox.log, sandbox.cancel, COPY_LIMIT)?;
    if !outcome.succeeded() {
        return Err(BakeError::Machine {
            what: format!("copying tools to {}", all.display()),
            why: format!("{}: {}", outcome.why(COPY_LIMIT), outcome.last_lines.join("; ")),
            remedy: "see that there is space on the disk".to_owned(),
        });
    }
    fs::remove_dir_all(&built).map_err(BakeError::io("remove", &built))?;
    // Before it has its name: what has one is taken as whole.
    File::open(&fresh)
        .and_then(|fresh| rustix::fs::syncfs(&fresh).map_err(Into::into))
        .map_err(BakeError::io("sync", &fresh))?;
    match fs::rename(&fresh, &tree) {
        // Another bake was first.
        Err(_) if tree.is_dir() => Ok(tree),
        Err(error) => Err(BakeError::io("name", &tree)(error)),
        Ok(()) => Ok(tree),
    }
}

/// The tree among those of the bake, which can't take more than the bake may: who wrote the packages may mean no good.
fn make(
    installer: &Installer<'_>,
    packages: &[LockedPackage],
    recipe: &Recipe<'_>,
) -> Result<PathBuf, BakeError> {
    let sandbox = installer.sandbox;
    let built = sandbox.work.folder("tools-tree", 0)?;
    installer.unpack_alone(packages, &built)?;
    put_scripts(&built, recipe, installer.architecture)?;
    let root = sandbox.work.folder("tools-root", SHIFT)?;
    mount_shifted(&built, &root, false)?;
    let env = [("PATH".to_owned(), "/usr/bin:/bin".to_owned())].into();
    let prepared = sandbox.run(&Job {
        step: "its tools",
        root: &root,
        script: recipe.prepare,
        env: &env,
        folders: &[],
        hide_ischroot: false,
        own_run: false,
        resolver: None,
        rights: Rights::Step,
    });
    unmount_below(&root).and_then(|()| fs::remove_dir(&root)).map_err(BakeError::io("unmount", &root))?;
    prepared.map(|()| built)
}

fn put_scripts(tree: &Path, recipe: &Recipe<'_>, architecture: &str) -> Result<(), BakeError> {
    let inside = Tree::open(tree, 0).map_err(BakeError::io("open", tree))?;
    for (program, name) in recipe.programs {
        let script = script(program, name, recipe.setting, architecture);
        let path = format!("usr/bin/{name}");
        let written = inside.write(path.as_bytes(), 0o755, script.as_bytes());
        written.map_err(BakeError::io("write", tree.join(path)))?;
    }
    Ok(())
}

/// By the tree's own loader and libraries: the image's may be others, or not there.
fn script(program: &str, name: &str, setting: &str, architecture: &str) -> String {
    let (machine, loader) = match architecture {
        "arm64" => ("aarch64-linux-gnu", "lib/ld-linux-aarch64.so.1"),
        _ => ("x86_64-linux-gnu", "lib64/ld-linux-x86-64.so.2"),
    };
    format!(
        "#!/bin/sh\n\
         t={INSIDE}\n\
         m={machine}\n\
         {setting}\
         export OPENSSL_MODULES=$t/usr/lib/$m/ossl-modules\n\
         exec $t/{loader} --argv0 $t/usr/bin/{name} --library-path $t/lib/$m:$t/usr/lib/$m $t/{program} \"$@\"\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_can_t_have_another_file_written() {
        let folder = tempfile::tempdir().unwrap();
        let (tree, secret) = (folder.path().join("tree"), folder.path().join("secret"));
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::write(&secret, "as it was").unwrap();
        std::os::unix::fs::symlink(&secret, tree.join("usr/bin/kiln-x")).unwrap();
        let recipe = Recipe { programs: &[("usr/bin/x", "kiln-x")], setting: "", prepare: "" };
        put_scripts(&tree, &recipe, "amd64").unwrap();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "as it was");
        assert!(fs::read_to_string(tree.join("usr/bin/kiln-x")).unwrap().contains("ld-linux-x86-64"));
        // Where a folder on the way leads out, the script is written inside all the same, or not at all.
        fs::remove_dir_all(tree.join("usr")).unwrap();
        fs::create_dir(folder.path().join("bin")).unwrap();
        std::os::unix::fs::symlink(folder.path(), tree.join("usr")).unwrap();
        let _ = put_scripts(&tree, &recipe, "amd64");
        assert_eq!(fs::read_dir(folder.path().join("bin")).unwrap().count(), 0);
    }
}
