//! What a file tree is: each path with all that an image carries of it but its times.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use kiln_model::digest::Digest;

use crate::Result;

/// Type, mode, owner, and content (of a file), target (of a link) or number (of a device), by the path below the root.
pub type Tree = BTreeMap<String, String>;

/// # Errors
/// Where something below `root` can't be read.
pub fn read(root: &Path) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            let meta = path.symlink_metadata()?;
            let kind = meta.file_type();
            let mut what = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
            if kind.is_file() {
                write!(what, " {}{}", Digest::of(&std::fs::read(&path)?), capabilities(&path)?)?;
            } else if kind.is_symlink() {
                write!(what, " -> {}", std::fs::read_link(&path)?.display())?;
            } else if kind.is_char_device() || kind.is_block_device() {
                write!(what, " device {}", meta.rdev())?;
            } else if kind.is_dir() {
                folders.push(path.clone());
            }
            let name = path.strip_prefix(root)?.as_os_str().as_bytes().escape_ascii().to_string();
            tree.insert(name, what);
        }
    }
    Ok(tree)
}

/// A file's capabilities, as the kernel stores them.
fn capabilities(path: &Path) -> Result<String> {
    let mut value = [0; 64];
    match rustix::fs::lgetxattr(path, "security.capability", &mut value) {
        Ok(length) => Ok(format!(" capabilities {}", hex::encode(&value[..length]))),
        Err(rustix::io::Errno::NODATA) => Ok(String::new()),
        Err(error) => Err(format!("{}: {error}", path.display()).into()),
    }
}

/// The paths that are not the same in both trees: `-` before those that only `theirs` has, `+` before those that only
/// `ours` has, `~` before those that differ.
pub fn differences(ours: &Tree, theirs: &Tree) -> Vec<String> {
    let mut found: Vec<String> = theirs
        .iter()
        .filter_map(|(path, what)| match ours.get(path) {
            None => Some(format!("- {path}")),
            Some(other) if other != what => Some(format!("~ {path}")),
            Some(_) => None,
        })
        .collect();
    found.extend(ours.keys().filter(|path| !theirs.contains_key(*path)).map(|path| format!("+ {path}")));
    found
}
