//! A folder as the tar that an apply sends.

use std::path::Path;

use walkdir::WalkDir;

use crate::failure::{Code, During as _, Failure, Outcome};

/// What the builder takes.
pub(crate) const LIMIT: usize = 64 << 20;

/// Version control's own files are not part of a definition.
const LEFT_OUT: [&str; 4] = [".git", ".hg", ".svn", ".jj"];

/// Files, folders and symbolic links, in a fixed order and without owners and times: the same content packs to the
/// same bytes.
pub(crate) fn folder(root: &Path) -> Outcome<Vec<u8>> {
    let mut builder = tar::Builder::new(Vec::new());
    builder.mode(tar::HeaderMode::Deterministic);
    builder.follow_symlinks(false);
    let walk = WalkDir::new(root).min_depth(1).sort_by_file_name().into_iter();
    let mut size = 0;
    for entry in walk.filter_entry(|entry| !LEFT_OUT.iter().any(|name| entry.file_name() == *name)) {
        let entry = entry.map_err(|error| Failure::failed(format!("reading {}", root.display()), error))?;
        let path = entry.path();
        let kind = entry.file_type();
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink()) {
            let what = format!("packing {}", path.display());
            return Err(Failure::new(
                Code::Invalid,
                what,
                "it is neither a file, a folder nor a symbolic link",
            )
            .todo("move it out of the folder"));
        }
        if kind.is_file() {
            size += entry.metadata().map_or(0, |metadata| metadata.len());
        }
        // Each entry has a header of 512 bytes and is padded to as many; what lies near the limit is the builder's
        // to decide, this keeps a home folder applied by mistake from being read into memory.
        if size > LIMIT as u64 {
            return Err(Failure::new(
                Code::Invalid,
                format!("packing {}", root.display()),
                format!("it is larger than {} MiB", LIMIT >> 20),
            )
            .reason("folder_too_large")
            .todo("apply the folder that holds the server.yaml, or a Git repository"));
        }
        let name = path.strip_prefix(root).unwrap_or(path);
        builder.append_path_with_name(path, name).during(format_args!("packing {}", path.display()))?;
    }
    builder.into_inner().during(format_args!("packing {}", root.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(archive: &[u8]) -> Vec<String> {
        let mut archive = tar::Archive::new(archive);
        archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[test]
    fn the_same_content_packs_to_the_same_bytes() {
        let make = || {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir(folder.path().join("site")).unwrap();
            std::fs::create_dir(folder.path().join(".git")).unwrap();
            std::fs::write(folder.path().join(".git/config"), "x").unwrap();
            std::fs::write(folder.path().join("site/index.html"), "Hello").unwrap();
            std::fs::write(folder.path().join("server.yaml"), "name: web").unwrap();
            symlink("site/index.html", folder.path().join("link")).unwrap();
            super::folder(folder.path()).unwrap()
        };
        let first = make();
        assert_eq!(first, make());
        assert_eq!(names(&first), ["link", "server.yaml", "site", "site/index.html"]);
    }

    #[test]
    fn what_is_no_file_and_what_is_too_large_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let big = std::fs::File::create(folder.path().join("big")).unwrap();
        big.set_len(LIMIT as u64 + 1).unwrap();
        assert!(super::folder(folder.path()).unwrap_err().line().contains("larger than 64 MiB"));
        std::fs::remove_file(folder.path().join("big")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap());
        assert!(super::folder(folder.path()).unwrap_err().line().contains("neither a file"));
    }
}
