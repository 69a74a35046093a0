//! Packages into a tree, several at a time, straight from their compressed tars.
//!
//! What dpkg does, for packages that are not installed yet: a configuration file gets `.dpkg-new` behind its name until
//! `dpkg --configure` takes it over, a folder belongs to the first package that has it, and a link to a folder that is in the
//! way of a folder stays. What needs dpkg's judgement (a file that another package has) is not decided here.

use std::collections::HashSet;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use kiln_image::tar::{Entry, Kind, Problem, split_path};
use rustix::fs::{self as rfs, AtFlags, FileType, Mode, Timespec, Timestamps};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::deb::Deb;
use super::error::BakeError;
use super::tree::{Folders, Tree, create};

/// What one package put into the tree.
#[derive(Debug, Default)]
pub(crate) struct Unpacked {
    /// Absolute paths, in the order of its tar.
    pub(crate) paths: Vec<Vec<u8>>,
    folders: Vec<Entry>,
    /// Seconds of its youngest entry.
    pub(crate) newest: i64,
}

#[derive(Debug)]
pub(crate) enum Trouble {
    /// A file is there already: the package replaces it, diverts it, or breaks.
    Taken {
        package: String,
        path: String,
    },
    Failed(BakeError),
}

impl From<BakeError> for Trouble {
    fn from(error: BakeError) -> Self {
        Self::Failed(error)
    }
}

/// Folders that did not exist before, by device and inode.
type Made = Mutex<HashSet<(u64, u64)>>;

/// Unpacks all, and gives what each one put there, in the order of `debs`.
pub(crate) fn unpack(
    debs: &[Deb],
    tree: &Tree,
    cancel: &CancellationToken,
) -> Result<Vec<Unpacked>, Trouble> {
    let next = AtomicUsize::new(0);
    let made = Made::default();
    let results: Mutex<Vec<(usize, Result<Unpacked, Trouble>)>> = Mutex::new(Vec::new());
    // The largest first, so that no thread is left alone with one at the end.
    let mut order: Vec<usize> = (0..debs.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(debs[*at].data_size()));
    let threads = thread::available_parallelism().map_or(2, |n| n.get().min(16));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut folders = Folders::of(tree);
                while let Some(at) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = if cancel.is_cancelled() {
                        Err(Trouble::Failed(BakeError::Cancelled))
                    } else {
                        one(&debs[*at], tree, &mut folders, &made)
                    };
                    let failed = result.is_err();
                    if let Ok(mut results) = results.lock() {
                        results.push((*at, result));
                    }
                    if failed {
                        // Nobody begins another package.
                        next.store(debs.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_default();
    results.sort_by_key(|(at, _)| *at);
    let unpacked = results.into_iter().map(|(_, result)| result).collect::<Result<Vec<_>, _>>()?;
    let made = made.into_inner().unwrap_or_default();
    own_folders(debs, &unpacked, tree, made)?;
    Ok(unpacked)
}

/// Owner and mode of the folders that were made: those of the first package that has them, whichever thread was faster.
fn own_folders(
    debs: &[Deb],
    unpacked: &[Unpacked],
    tree: &Tree,
    mut made: HashSet<(u64, u64)>,
) -> Result<(), Trouble> {
    for (deb, unpacked) in debs.iter().zip(unpacked) {
        for entry in &unpacked.folders {
            let mut set = || -> Result<(), Errno> {
                let folder = tree.folder(&entry.path)?;
                let stat = rfs::fstat(&folder)?;
                if made.remove(&(stat.st_dev, stat.st_ino)) {
                    tree.own(&folder, entry.uid, entry.gid)?;
                    rfs::fchmod(&folder, Mode::from_raw_mode(entry.mode))?;
                }
                Ok(())
            };
            set().map_err(|errno| failed(deb, &entry.path, "own folder", errno))?;
        }
    }
    Ok(())
}

fn one(deb: &Deb, tree: &Tree, folders: &mut Folders<'_>, made: &Made) -> Result<Unpacked, Trouble> {
    let conffiles: HashSet<Vec<u8>> =
        deb.conffiles().into_iter().map(|path| path.trim_start_matches('/').as_bytes().to_vec()).collect();
    let mut tar = deb.data()?;
    let mut unpacked = Unpacked::default();
    loop {
        let entry = match tar.next_entry() {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(unpacked),
            Err(problem) => return Err(malformed(deb, &problem).into()),
        };
        let shown =
            if entry.path.is_empty() { b"/.".to_vec() } else { [b"/", entry.path.as_slice()].concat() };
        unpacked.paths.push(shown);
        unpacked.newest = unpacked.newest.max(entry.mtime);
        if entry.kind == Kind::Directory {
            folder(deb, &entry, tree, folders, made)?;
            unpacked.folders.push(entry);
            continue;
        }
        let is_conffile = conffiles.contains(&entry.path);
        member(deb, &entry, is_conffile, &conffiles, tree, folders, &mut tar)?;
    }
}

fn folder(
    deb: &Deb,
    entry: &Entry,
    tree: &Tree,
    folders: &mut Folders<'_>,
    made: &Made,
) -> Result<(), Trouble> {
    let (above, name) = split_path(&entry.path);
    if name.is_empty() {
        return Ok(());
    }
    let failed = |errno| failed(deb, &entry.path, "make folder", errno);
    let parent = folders.get(above).map_err(failed)?;
    match rfs::mkdirat(parent, name, Mode::RWXU) {
        Ok(()) => {
            let stat = rfs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
            if let Ok(mut made) = made.lock() {
                made.insert((stat.st_dev, stat.st_ino));
            }
            Ok(())
        }
        Err(Errno::EXIST) => {
            let found = tree.stat(&entry.path).map_err(failed)?;
            let is_folder =
                found.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
            if is_folder { Ok(()) } else { Err(taken(deb, &entry.path)) }
        }
        Err(errno) => Err(failed(errno).into()),
    }
}

fn member(
    deb: &Deb,
    entry: &Entry,
    is_conffile: bool,
    conffiles: &HashSet<Vec<u8>>,
    tree: &Tree,
    folders: &mut Folders<'_>,
    content: &mut impl io::Read,
) -> Result<(), Trouble> {
    let (above, name) = split_path(&entry.path);
    let name = if is_conffile { [name, b".dpkg-new"].concat() } else { name.to_vec() };
    let name = name.as_slice();
    let failed = |doing: &'static str| move |errno: Errno| failed(deb, &entry.path, doing, errno);
    let taken_or = |doing: &'static str, errno: Errno| match errno {
        Errno::EXIST => taken(deb, &entry.path),
        errno => failed(doing)(errno).into(),
    };
    let time = Timespec { tv_sec: entry.mtime, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    match entry.kind {
        Kind::File => {
            let parent = folders.get(above).map_err(failed("open folder of"))?;
            if is_conffile
                && rfs::statat(parent, split_path(&entry.path).1, AtFlags::SYMLINK_NOFOLLOW).is_ok()
            {
                // Whether the file that is there stays is a question that dpkg answers by what it knows of it.
                return Err(taken(deb, &entry.path));
            }
            let fd = create(parent, name).map_err(|errno| taken_or("make file", errno))?;
            let mut file = std::fs::File::from(fd);
            let copied = io::copy(content, &mut file)
                .map_err(|error| BakeError::Package { package: deb.name.clone(), why: error.to_string() })?;
            if copied != entry.size {
                return Err(BakeError::Package {
                    package: deb.name.clone(),
                    why: format!("/{} ends too early", String::from_utf8_lossy(&entry.path)),
                }
                .into());
            }
            let fd = file.into();
            tree.own(&fd, entry.uid, entry.gid).map_err(failed("own"))?;
            rfs::fchmod(&fd, Mode::from_raw_mode(entry.mode)).map_err(failed("set the mode of"))?;
            rfs::futimens(&fd, &times).map_err(failed("set the time of"))?;
        }
        Kind::Symlink => {
            let parent = folders.get(above).map_err(failed("open folder of"))?;
            match rfs::symlinkat(entry.link.as_slice(), parent, name) {
                Ok(()) => {
                    tree.own_link(parent, name, entry.uid, entry.gid).map_err(failed("own"))?;
                    rfs::utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
                        .map_err(failed("set the time of"))?;
                }
                Err(Errno::EXIST) => {
                    let same = rfs::readlinkat(parent, name, Vec::new())
                        .is_ok_and(|target| target.as_bytes() == entry.link.as_slice());
                    let folder = tree
                        .stat_itself(&entry.path)
                        .map_err(failed("look at"))?
                        .is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
                    // The links that were made first for the merged /usr; and dpkg never puts a link in the place of a folder.
                    if !same && !folder {
                        return Err(taken(deb, &entry.path));
                    }
                }
                Err(errno) => return Err(failed("make link")(errno).into()),
            }
        }
        Kind::Hardlink => {
            let (target_above, target) = split_path(&entry.link);
            let target = if conffiles.contains(&entry.link) {
                [target, b".dpkg-new"].concat()
            } else {
                target.to_vec()
            };
            let from = tree.folder(target_above).map_err(failed("open folder of the target of"))?;
            let parent = folders.get(above).map_err(failed("open folder of"))?;
            rfs::linkat(&from, target.as_slice(), parent, name, AtFlags::empty())
                .map_err(|errno| taken_or("make hard link", errno))?;
        }
        Kind::Directory => {}
        Kind::Fifo | Kind::CharDevice | Kind::BlockDevice => {
            return Err(BakeError::Package {
                package: deb.name.clone(),
                why: format!("/{} is a device or a fifo", String::from_utf8_lossy(&entry.path)),
            }
            .into());
        }
    }
    Ok(())
}

fn taken(deb: &Deb, path: &[u8]) -> Trouble {
    Trouble::Taken { package: deb.name.clone(), path: format!("/{}", String::from_utf8_lossy(path)) }
}

fn malformed(deb: &Deb, problem: &Problem) -> BakeError {
    BakeError::Package { package: deb.name.clone(), why: format!("data.tar: {problem}") }
}

fn failed(deb: &Deb, path: &[u8], doing: &'static str, errno: Errno) -> BakeError {
    if errno == Errno::NOSPC {
        return BakeError::Machine {
            what: format!("package {}", deb.name),
            why: "the build's trees are larger than the memory they may take".to_owned(),
            remedy: "ask for fewer packages, or raise the builder's limit for trees".to_owned(),
        };
    }
    let path = std::path::PathBuf::from(format!("/{} of {}", String::from_utf8_lossy(path), deb.name));
    BakeError::Io { doing, path, source: errno.into() }
}
