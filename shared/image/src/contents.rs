//! What an image holds, all its layers together, as a process in it finds it.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kiln_model::digest::Digest;
use rustix::fs::{self as rfs, AtFlags, Dir, FileType, Mode, OFlags, Stat};

use crate::error::Error;
use crate::extract::{CAPABILITY, OVERLAY_OPAQUE};
use crate::pack::{attribute, join};
use crate::stack::Stack;
use crate::store::ImageStore;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeKind {
    File {
        /// In bytes.
        size: u64,
    },
    Directory,
    Symlink {
        target: Vec<u8>,
    },
    Fifo,
}

/// A file, folder or link. Times are left out: they are the build's, not the content's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub kind: NodeKind,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// File capabilities, as the kernel keeps them; none where there are none.
    pub capabilities: Option<Vec<u8>>,
}

#[derive(Clone)]
struct Placed {
    node: Node,
    /// Of the layer that has it, counted from the lowest.
    layer: usize,
}

/// A node in the tree of the layer that has it.
pub(crate) struct Found<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) node: &'a Node,
    pub(crate) layer: usize,
    stack: &'a Stack,
}

impl Found<'_> {
    pub(crate) fn stat(&self) -> Result<Stat, Error> {
        self.stack.stat_in(self.layer, self.path)
    }

    pub(crate) fn open(&self) -> Result<File, Error> {
        self.stack.open_in(self.layer, self.path)
    }
}

/// What an image holds. Paths are relative to its root, without a `/` in front.
pub struct Contents {
    stack: Stack,
    nodes: BTreeMap<Vec<u8>, Placed>,
}

/// One path at which two images differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    pub path: Vec<u8>,
    /// None where it is new.
    pub before: Option<Node>,
    /// None where it is gone.
    pub after: Option<Node>,
    /// Both are regular files, with other bytes.
    pub content: bool,
}

impl ImageStore {
    /// What an image holds.
    ///
    /// # Errors
    /// The image is not in the store, or a layer is not one that can be extracted.
    pub fn contents(&self, image: &Digest) -> Result<Contents, Error> {
        let stack = self.stack(image)?;
        let mut nodes = Nodes::default();
        nodes.put_layers(&stack, 0..stack.layers.len())?;
        Ok(Contents { stack, nodes: nodes.0 })
    }

    /// What two images hold, to be compared. The layers that both begin with are looked through once.
    ///
    /// # Errors
    /// As for [`ImageStore::contents`], of either.
    pub fn contents_of_both(&self, one: &Digest, other: &Digest) -> Result<(Contents, Contents), Error> {
        let (one, other) = (self.stack(one)?, self.stack(other)?);
        let pairs = one.layers.iter().zip(&other.layers);
        let shared = pairs.take_while(|(one, other)| one.diff_id == other.diff_id).count();
        let mut nodes = Nodes::default();
        nodes.put_layers(&one, 0..shared)?;
        let over = |mut nodes: Nodes, stack: Stack| {
            nodes.put_layers(&stack, shared..stack.layers.len())?;
            Ok(Contents { stack, nodes: nodes.0 })
        };
        Ok((over(nodes.clone(), one)?, over(nodes, other)?))
    }
}

impl Contents {
    pub fn get(&self, path: &[u8]) -> Option<&Node> {
        self.nodes.get(path).map(|placed| &placed.node)
    }

    /// All of them, by path.
    pub fn nodes(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes.iter().map(|(path, placed)| (path.as_slice(), &placed.node))
    }

    /// All of them, by path, with where each lies.
    pub(crate) fn found(&self) -> impl Iterator<Item = Found<'_>> {
        self.nodes.iter().map(|(path, Placed { node, layer })| Found {
            path,
            node,
            layer: *layer,
            stack: &self.stack,
        })
    }

    /// A regular file's bytes; none where there is no such file.
    ///
    /// # Errors
    /// It can't be read, or has more than `limit` bytes.
    pub fn read(&self, path: &[u8], limit: u64) -> Result<Option<Vec<u8>>, Error> {
        match self.nodes.get(path) {
            Some(Placed { node: Node { kind: NodeKind::File { .. }, .. }, layer }) => {
                self.stack.read_in(*layer, path, limit).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Where another image differs from this one, by path.
    ///
    /// # Errors
    /// A file can't be read.
    pub fn differences(&self, after: &Self) -> Result<Vec<Difference>, Error> {
        let mut differences = Vec::new();
        let (mut old, mut new) = (self.nodes.iter().peekable(), after.nodes.iter().peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => return Ok(differences),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((one, _)), Some((other, _))) => one.cmp(other),
            };
            let gone = if order.is_le() { old.next() } else { None };
            let come = if order.is_ge() { new.next() } else { None };
            let Some(path) = gone.or(come).map(|(path, _)| path) else { return Ok(differences) };
            let content = match (gone, come) {
                (Some((_, old)), Some((_, new))) => self.content_differs(after, path, old, new)?,
                _ => false,
            };
            let (before, after) = (gone.map(|(_, it)| it.node.clone()), come.map(|(_, it)| it.node.clone()));
            if content || before != after {
                differences.push(Difference { path: path.clone(), before, after, content });
            }
        }
    }

    fn content_differs(&self, other: &Self, path: &[u8], old: &Placed, new: &Placed) -> Result<bool, Error> {
        match (&old.node.kind, &new.node.kind) {
            (NodeKind::File { size: one }, NodeKind::File { size: another }) => {
                if one != another {
                    return Ok(true);
                }
                // The same layer has the same bytes: with a base in common most files need not be read.
                if self.stack.layers[old.layer].diff_id == other.stack.layers[new.layer].diff_id {
                    return Ok(false);
                }
                let shown = Path::new("/").join(OsStr::from_bytes(path));
                let (one, another) =
                    (self.stack.open_in(old.layer, path)?, other.stack.open_in(new.layer, path)?);
                Ok(!same_bytes(one, another).map_err(Error::io("read", shown))?)
            }
            _ => Ok(false),
        }
    }
}

#[derive(Clone, Default)]
struct Nodes(BTreeMap<Vec<u8>, Placed>);

impl Nodes {
    fn put_layers(&mut self, stack: &Stack, which: Range<usize>) -> Result<(), Error> {
        for at in which {
            let tree = &stack.layers[at];
            self.put_folder(at, &tree.root, b"").map_err(Error::io("read", &tree.path))?;
        }
        Ok(())
    }

    /// Puts a folder of the next layer over what is there.
    fn put_folder(&mut self, layer: usize, folder: &OwnedFd, path: &[u8]) -> io::Result<()> {
        if attribute(folder, OsStr::new(OVERLAY_OPAQUE))?.is_some() {
            self.remove_below(path);
        }
        let mut names = Vec::new();
        for item in Dir::read_from(folder)? {
            let name = item?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        for name in names {
            let stat = rfs::statat(folder, name.as_slice(), AtFlags::SYMLINK_NOFOLLOW)?;
            let below = join(path, &name);
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let mut capabilities = None;
            let kind = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => NodeKind::Directory,
                FileType::RegularFile => {
                    // Only what can be executed has any use for them.
                    if stat.st_mode & 0o111 != 0 {
                        let file = rfs::openat(folder, name.as_slice(), flags, Mode::empty())?;
                        capabilities = attribute(&file, OsStr::from_bytes(CAPABILITY))?;
                    }
                    NodeKind::File { size: u64::try_from(stat.st_size).unwrap_or(0) }
                }
                FileType::Symlink => NodeKind::Symlink {
                    target: rfs::readlinkat(folder, name.as_slice(), Vec::new())?.into_bytes(),
                },
                FileType::Fifo => NodeKind::Fifo,
                FileType::CharacterDevice if stat.st_rdev == 0 => {
                    self.remove_below(&below);
                    self.0.remove(&below);
                    continue;
                }
                // No layer holds another.
                _ => continue,
            };
            let is_folder = kind == NodeKind::Directory;
            if !is_folder {
                self.remove_below(&below);
            }
            let mode = if matches!(kind, NodeKind::Symlink { .. }) { 0o777 } else { stat.st_mode & 0o7777 };
            let node = Node { kind, mode, uid: stat.st_uid, gid: stat.st_gid, capabilities };
            self.0.insert(below.clone(), Placed { node, layer });
            if is_folder {
                let folder = rfs::openat(folder, name.as_slice(), flags | OFlags::DIRECTORY, Mode::empty())?;
                self.put_folder(layer, &folder, &below)?;
            }
        }
        Ok(())
    }

    fn remove_below(&mut self, path: &[u8]) {
        if path.is_empty() {
            self.0.clear();
            return;
        }
        // `0` comes next after `/`.
        let range = [path, b"/"].concat()..[path, b"0"].concat();
        let doomed: Vec<Vec<u8>> = self.0.range(range).map(|(path, _)| path.clone()).collect();
        for path in doomed {
            self.0.remove(&path);
        }
    }
}

fn same_bytes(one: File, another: File) -> io::Result<bool> {
    const BUFFER: usize = 1 << 16;
    let (mut one, mut another) =
        (BufReader::with_capacity(BUFFER, one), BufReader::with_capacity(BUFFER, another));
    loop {
        let (left, right) = (one.fill_buf()?, another.fill_buf()?);
        let length = left.len().min(right.len());
        if length == 0 {
            return Ok(left.is_empty() && right.is_empty());
        }
        if left[..length] != right[..length] {
            return Ok(false);
        }
        one.consume(length);
        another.consume(length);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
