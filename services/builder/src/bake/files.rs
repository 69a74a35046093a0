//! A `files` step into a tree.

use std::collections::HashMap;

use kiln_image::tar::{clean_path, split_path};
use kiln_model::lock::{LockedFile, LockedFileKind};
use rustix::fs::{self as rfs, AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::context::Contents;
use super::error::BakeError;
use super::owners;
use super::tree::Tree;

pub(crate) fn put(tree: &Tree, files: &[LockedFile], contents: &Contents) -> Result<(), BakeError> {
    let mut owners = HashMap::new();
    for file in files {
        let owner = match owners.get(file.owner.as_str()) {
            Some(owner) => *owner,
            None => {
                let owner = owners::resolve(tree, &file.owner)?;
                owners.insert(file.owner.as_str(), owner);
                owner
            }
        };
        one(tree, file, owner, contents)?;
    }
    Ok(())
}

fn one(tree: &Tree, file: &LockedFile, owner: (u32, u32), contents: &Contents) -> Result<(), BakeError> {
    let wrong = |why: &str| BakeError::Definition {
        what: format!("file {}", file.dest.escape_debug()),
        why: why.to_owned(),
        remedy: "give it another `dest`, or remove what is there in a step before".to_owned(),
    };
    let failed = |errno: Errno| BakeError::io("put", &file.dest)(errno.into());
    // The lock may have come from a store that somebody wrote to.
    let path = clean_path(file.dest.trim_start_matches('/').as_bytes()).map_err(wrong)?;
    if path.is_empty() {
        return Err(wrong("it would be the root itself"));
    }
    let found = tree.stat_itself(&path).map_err(failed)?.map(|stat| FileType::from_raw_mode(stat.st_mode));
    let (above, name) = split_path(&path);
    match &file.kind {
        LockedFileKind::Directory => {
            let is_folder = tree
                .stat(&path)
                .map_err(failed)?
                .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
            if is_folder {
                // One that the image has keeps its owner and mode: it is there for others too.
                return Ok(());
            }
            if found.is_some() {
                return Err(wrong("there is something else than a folder in the image"));
            }
            let folder = tree.folder(&path).map_err(failed)?;
            tree.own(&folder, owner.0, owner.1).map_err(failed)?;
            rfs::fchmod(&folder, Mode::from_raw_mode(file.mode)).map_err(failed)
        }
        _ if found == Some(FileType::Directory) => Err(wrong("there is a folder in the image")),
        LockedFileKind::Regular { digest, .. } => tree
            .put(&path, file.mode, owner, &mut contents.get(digest)?)
            .map_err(BakeError::io("put", &file.dest)),
        LockedFileKind::Symlink { target } => {
            let folder = tree.folder(above).map_err(failed)?;
            match rfs::unlinkat(&folder, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed(errno)),
            }
            rfs::symlinkat(target.as_str(), &folder, name).map_err(failed)?;
            tree.own_link(&folder, name, owner.0, owner.1).map_err(failed)
        }
    }
}
