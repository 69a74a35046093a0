//! What a source holds, in memory: files and symbolic links by path. Whoever sent it, it is read as hostile: bounded in
//! size, count and depth, and no name in it reaches a file system before it was looked at.

use std::collections::BTreeMap;
use std::io::Read;
use std::sync::Arc;

use kiln_model::digest::Digest;
use tar::EntryType;

/// All files together. A packed folder comes in one message, and a Git commit is held to the same.
pub const MAX_SIZE: u64 = 64 << 20;
pub const MAX_ENTRIES: usize = 20_000;
const MAX_DEPTH: usize = 64;
const MAX_PATH: usize = 1024;
const MAX_COMPONENT: usize = 255;

/// Paths are relative, without `.`, `..` or empty components. Folders are not told: an empty one is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    entries: BTreeMap<String, Node>,
    size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    File { content: Content, executable: bool },
    Symlink { target: String },
}

/// What is in a file. Hashed once, and shared by every part of a tree that holds it: definitions can lie in each other's
/// folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    bytes: Arc<[u8]>,
    digest: Digest,
}

impl Content {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub const fn digest(&self) -> Digest {
        self.digest
    }
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Self {
        Self { digest: Digest::of(&bytes), bytes: bytes.into() }
    }
}

/// Why a source can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {why}")]
pub struct Unreadable {
    pub path: String,
    pub why: String,
}

fn unreadable(path: &str, why: impl Into<String>) -> Unreadable {
    // Names come from outside and go to terminals.
    Unreadable { path: path.chars().take(200).flat_map(char::escape_debug).collect(), why: why.into() }
}

impl Tree {
    /// Adds an entry.
    ///
    /// # Errors
    /// A path that leads elsewhere or is too long or there already, or too much of everything.
    pub fn insert(&mut self, path: &str, node: Node) -> Result<(), Unreadable> {
        check_path(path)?;
        if self.entries.len() >= MAX_ENTRIES {
            return Err(unreadable(path, format!("more than {MAX_ENTRIES} files")));
        }
        self.size = self.size.saturating_add(node.size());
        if self.size > MAX_SIZE {
            return Err(unreadable(
                path,
                format!("the files are larger than {} MiB together", MAX_SIZE >> 20),
            ));
        }
        for (at, _) in path.match_indices('/') {
            if path.get(..at).is_some_and(|above| self.entries.contains_key(above)) {
                return Err(unreadable(path, "lies below something that is no folder"));
            }
        }
        let below = format!("{path}/");
        let has_below =
            self.entries.range(below.clone()..).next().is_some_and(|(next, _)| next.starts_with(&below));
        if has_below || self.entries.contains_key(path) {
            return Err(unreadable(path, "is there twice"));
        }
        self.entries.insert(path.to_owned(), node);
        Ok(())
    }

    /// Bytes of all files together.
    pub const fn size(&self) -> u64 {
        self.size
    }

    pub fn get(&self, path: &str) -> Option<&Node> {
        self.entries.get(path)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.entries.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// What `path` names: itself, or everything below it where it is a folder. `.` is everything.
    pub fn under<'a>(&'a self, path: &'a str) -> impl Iterator<Item = (&'a str, &'a Node)> {
        self.iter().filter(move |(entry, _)| {
            path == "."
                || *entry == path
                || entry.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
        })
    }

    /// The part below a folder, with paths relative to it; `.` is everything.
    #[must_use]
    pub fn folder(&self, folder: &str) -> Self {
        if folder == "." {
            return self.clone();
        }
        let mut part = Self::default();
        for (path, node) in self.under(folder) {
            if let Some(rest) = path.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/')) {
                part.size += node.size();
                part.entries.insert(rest.to_owned(), node.clone());
            }
        }
        part
    }

    /// Reads a packed folder.
    ///
    /// # Errors
    /// Anything but plain files, folders and symbolic links with proper names, or too much of it.
    pub fn from_tar(archive: &[u8]) -> Result<Self, Unreadable> {
        let broken =
            |error: std::io::Error| unreadable("the archive", format!("is no readable tar: {error}"));
        let mut reader = tar::Archive::new(archive);
        let mut tree = Self::default();
        // Folders count as well, else an archive of nothing but folders would be unbounded work.
        let mut count = 0;
        for entry in reader.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            count += 1;
            if count > MAX_ENTRIES {
                return Err(unreadable("the archive", format!("holds more than {MAX_ENTRIES} entries")));
            }
            let raw = entry.path_bytes().into_owned();
            let path = String::from_utf8(raw)
                .map_err(|error| unreadable(&String::from_utf8_lossy(error.as_bytes()), "is not UTF-8"))?;
            let path = path.strip_prefix("./").unwrap_or(&path).trim_end_matches('/').to_owned();
            let kind = entry.header().entry_type();
            match kind {
                EntryType::Directory if path.is_empty() || path == "." => {}
                EntryType::Directory => check_path(&path)?,
                EntryType::Regular => {
                    if entry.size() > MAX_SIZE {
                        return Err(unreadable(&path, format!("is larger than {} MiB", MAX_SIZE >> 20)));
                    }
                    let executable = entry.header().mode().map_err(broken)? & 0o100 != 0;
                    let mut content = Vec::new();
                    let size = entry.size();
                    let read = entry.read_to_end(&mut content).map_err(broken)?;
                    if read as u64 != size {
                        return Err(unreadable(&path, "is cut off"));
                    }
                    tree.insert(&path, Node::File { content: content.into(), executable })?;
                }
                EntryType::Symlink => {
                    let target =
                        entry.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default();
                    let target = String::from_utf8(target)
                        .map_err(|_| unreadable(&path, "has a target that is not UTF-8"))?;
                    tree.insert(&path, Node::Symlink { target })?;
                }
                other => {
                    let why = format!("is neither a file, a folder nor a symbolic link ({other:?})");
                    return Err(unreadable(&path, why));
                }
            }
        }
        let rest = reader.into_inner();
        if rest.iter().any(|byte| *byte != 0) {
            return Err(unreadable("the archive", "goes on after its end"));
        }
        Ok(tree)
    }
}

impl Node {
    fn size(&self) -> u64 {
        match self {
            Self::File { content, .. } => content.bytes.len() as u64,
            Self::Symlink { target } => target.len() as u64,
        }
    }
}

fn check_path(path: &str) -> Result<(), Unreadable> {
    let refused = |why: &str| Err(unreadable(path, why));
    if path.is_empty() {
        return refused("has no name");
    }
    if path.len() > MAX_PATH || path.split('/').count() > MAX_DEPTH {
        return refused("is too long or too deep a path");
    }
    for component in path.split('/') {
        match component {
            "" | "." | ".." => return refused("is not a plain relative path"),
            _ if component.len() > MAX_COMPONENT => return refused("has too long a name"),
            _ if component.chars().any(char::is_control) => {
                return refused("has control characters in its name");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Where a symbolic link leads, relative to the same folder as `path`; none where that lies outside.
pub fn link_target(path: &str, target: &str) -> Option<String> {
    if target.starts_with('/') || target.contains('\0') || target.is_empty() {
        return None;
    }
    let mut at: Vec<&str> = path.split('/').collect();
    at.pop();
    for component in target.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                at.pop()?;
            }
            name => at.push(name),
        }
    }
    Some(if at.is_empty() { ".".to_owned() } else { at.join("/") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str) -> Node {
        Node::File { content: content.as_bytes().to_vec().into(), executable: false }
    }

    /// A raw entry, so that names can be written which the tar crate would refuse to write.
    fn entry(name: &[u8], kind: EntryType, link: &[u8], content: &[u8]) -> Vec<u8> {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().div_ceil(512) * 512, 0);
        bytes
    }

    fn read(entries: &[Vec<u8>]) -> Result<Tree, Unreadable> {
        let mut archive = entries.concat();
        archive.extend_from_slice(&[0; 1024]);
        Tree::from_tar(&archive)
    }

    #[test]
    fn a_plain_archive_is_read() {
        let tree = read(&[
            entry(b"./", EntryType::Directory, b"", b""),
            entry(b"./web/server.yaml", EntryType::Regular, b"", b"name: web"),
            entry(b"web/link", EntryType::Symlink, b"server.yaml", b""),
        ])
        .unwrap();
        assert_eq!(tree.get("web/server.yaml"), Some(&file("name: web")));
        assert_eq!(
            tree.folder("web").iter().map(|(path, _)| path).collect::<Vec<_>>(),
            ["link", "server.yaml"]
        );
    }

    #[test]
    fn hostile_archives_are_refused() {
        let good = || entry(b"a", EntryType::Regular, b"", b"x");
        let mut lying = entry(b"big", EntryType::Regular, b"", b"");
        lying[124..136].copy_from_slice(b"77777777777\0");
        let mut trailing = [good(), vec![0; 1024]].concat();
        trailing.extend_from_slice(&good());
        let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
            ("out", vec![entry(b"../x", EntryType::Regular, b"", b"x")]),
            ("inside out", vec![entry(b"a/../../x", EntryType::Regular, b"", b"x")]),
            ("absolute", vec![entry(b"/etc/passwd", EntryType::Regular, b"", b"x")]),
            (
                "through a link",
                vec![
                    entry(b"l", EntryType::Symlink, b"/etc", b""),
                    entry(b"l/passwd", EntryType::Regular, b"", b"x"),
                ],
            ),
            (
                "a link over a folder",
                vec![
                    entry(b"l/x", EntryType::Regular, b"", b"x"),
                    entry(b"l", EntryType::Symlink, b"/etc", b""),
                ],
            ),
            ("hard link", vec![good(), entry(b"b", EntryType::Link, b"a", b"")]),
            ("device", vec![entry(b"null", EntryType::Char, b"", b"")]),
            ("fifo", vec![entry(b"pipe", EntryType::Fifo, b"", b"")]),
            ("sparse", vec![entry(b"holes", EntryType::GNUSparse, b"", b"")]),
            ("twice", vec![good(), good()]),
            ("not UTF-8", vec![entry(b"\xff\xfe", EntryType::Regular, b"", b"x")]),
            ("line end", vec![entry(b"a\nb", EntryType::Regular, b"", b"x")]),
            ("size lies", vec![lying]),
            ("trailing data", vec![trailing]),
            ("no tar", vec![b"hello".repeat(200)]),
            ("folders without end", vec![entry(b"d/", EntryType::Directory, b"", b""); MAX_ENTRIES + 1]),
        ];
        for (case, entries) in cases {
            assert!(read(&entries).is_err(), "{case}");
        }
        let cut = entry(b"a", EntryType::Regular, b"", &[1; 2000]);
        assert!(Tree::from_tar(&cut[..1024]).is_err(), "truncated");
    }

    #[test]
    fn what_is_too_much_is_refused() {
        let mut tree = Tree::default();
        tree.insert("a", Node::File { content: vec![0; MAX_SIZE as usize].into(), executable: false })
            .unwrap();
        assert!(tree.insert("b", file("x")).is_err());
        let mut tree = Tree::default();
        assert!(tree.insert(&"a/".repeat(100), file("x")).is_err());
        assert!(tree.insert(&"a".repeat(300), file("x")).is_err());
        assert!(tree.insert("ok", file("x")).is_ok());
    }

    #[test]
    fn a_link_leads_somewhere_inside_or_nowhere() {
        assert_eq!(link_target("a/b", "../c").as_deref(), Some("c"));
        assert_eq!(link_target("a/b", "c/./d").as_deref(), Some("a/c/d"));
        for out in ["/etc", "../../c", "../..", ""] {
            assert_eq!(link_target("a/b", out), None, "{out}");
        }
    }
}
