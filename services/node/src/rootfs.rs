//! An instance's root file system: the image's layers as read-only lowers of an overlay without an upper, which no
//! capability can make writable, under one small layer of the instance's own. That one has the mount points that the
//! image lacks, and the files that tell an instance who it is.

mod passwd;
mod seed;
mod top;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::failure::{During, Failure};

pub(crate) use passwd::{User, name_of};
pub(crate) use top::Identity;

/// mount(2) takes one page of options.
const OPTIONS_LIMIT: usize = 4095;

/// Files and folders in the memory of one instance.
const INODES: u32 = 100_000;

/// What an instance's root file system is made of.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    /// The instance's own folder, not there yet.
    pub(crate) dir: &'a Path,
    /// Extracted trees, from the lowest to the topmost.
    pub(crate) layers: &'a [PathBuf],
    pub(crate) writable: &'a [String],
    /// Bytes that all writable paths together can take.
    pub(crate) memory: u64,
    pub(crate) identity: Identity<'a>,
    /// As the image's configuration has it; empty for root.
    pub(crate) user: &'a str,
}

/// A root file system that is mounted.
#[derive(Debug)]
pub(crate) struct Rootfs {
    pub(crate) root: PathBuf,
    /// Where each writable path leads inside, and the memory that is to be bound there.
    pub(crate) writable: Vec<(String, PathBuf)>,
    pub(crate) user: User,
}

/// Makes and mounts it. What a failure leaves is taken away by [`remove`]. Blocks.
pub(crate) fn make(plan: &Plan<'_>) -> Result<Rootfs, Failure> {
    let (root, top, empty) = (plan.dir.join("rootfs"), plan.dir.join("top"), plan.dir.join("empty"));
    for dir in [&root, &top, &empty] {
        fs::create_dir_all(dir).during(|| format!("making {}", dir.display()))?;
    }
    // First the image alone, to see what it lacks. An overlay without an upper needs two lowers.
    mount_overlay(&empty, plan.layers, &root)?;
    let image = open_root(&root)?;
    let user = passwd::look_up(&image, plan.user)?;
    let writable = top::make(&top, &image, &root, plan.writable, &plan.identity, &user)?;
    let memory = plan.dir.join("memory");
    let mut bound = Vec::new();
    if !writable.is_empty() {
        fs::create_dir(&memory).during(|| format!("making {}", memory.display()))?;
        let options = format!("mode=0755,size={},nr_inodes={INODES}", plan.memory);
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("tmpfs", &memory, "tmpfs", flags, Some(c_text(&options)?.as_c_str()))
            .during(|| format!("mounting memory of {} bytes at {}", plan.memory, memory.display()))?;
        for (n, path) in writable.into_iter().enumerate() {
            let to = memory.join(n.to_string());
            seed::copy(&image, &path, &to, &user)?;
            bound.push((path, to));
        }
    }
    drop(image);
    // Detached, as a program that is just being started has a copy of every descriptor until it begins.
    unmount(&root, UnmountFlags::DETACH).during(|| format!("unmounting {}", root.display()))?;
    mount_overlay(&top, plan.layers, &root)?;
    Ok(Rootfs { root, writable: bound, user })
}

fn mount_overlay(top: &Path, layers: &[PathBuf], at: &Path) -> Result<(), Failure> {
    let what = || format!("mounting {} layers at {}", layers.len(), at.display());
    let lowers: Vec<String> = std::iter::once(top)
        .chain(layers.iter().rev().map(PathBuf::as_path))
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    // These separate options and lowers; the site folder's name is the only part that a person chooses.
    if let Some(bad) = lowers.iter().find(|path| path.contains([',', ':', '\\'])) {
        return Err(Failure::new(
            what(),
            format!("`{bad}` has a `,`, `:` or `\\`; choose another site folder"),
        ));
    }
    // Layers can't lead elsewhere by attributes of the overlay's own.
    let options = format!("lowerdir={},redirect_dir=nofollow,metacopy=off", lowers.join(":"));
    if options.len() > OPTIONS_LIMIT {
        let why =
            format!("{} bytes of options, the kernel takes {OPTIONS_LIMIT}: too many layers", options.len());
        return Err(Failure::new(what(), why));
    }
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    mount("overlay", at, "overlay", flags, Some(c_text(&options)?.as_c_str())).during(what)
}

fn c_text(text: &str) -> Result<std::ffi::CString, Failure> {
    std::ffi::CString::new(text).during(|| format!("using `{text}` as mount options"))
}

/// Lets go of the mounts in the host's sight. An instance that has been started has its own view of them, which ends with
/// it: nothing is left over, however the node ends.
pub(crate) fn detach(dir: &Path) -> Result<(), Failure> {
    for name in ["rootfs", "memory"] {
        detach_one(&dir.join(name))?;
    }
    Ok(())
}

fn detach_one(at: &Path) -> Result<(), Failure> {
    // As often as it is mounted: a crash can fall between the first and the second mount at one place.
    loop {
        match unmount(at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(Failure::new(format!("unmounting {}", at.display()), error)),
        }
    }
}

/// Unmounts what is below an instance's folder and removes it; fine if it is gone. Blocks.
pub(crate) fn remove(dir: &Path) -> Result<(), Failure> {
    for at in mounts_below(dir)?.iter().rev() {
        detach_one(at)?;
    }
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::new(format!("removing {}", dir.display()), error))
        }
        _ => Ok(()),
    }
}

/// Where something is mounted at or below a folder, parents first.
pub(crate) fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let mounts =
        fs::read_to_string("/proc/self/mountinfo").during(|| "reading /proc/self/mountinfo".to_owned())?;
    let place = |line: &str| Some(PathBuf::from(unescaped(line.split(' ').nth(4)?)));
    Ok(mounts.lines().filter_map(place).filter(|path| path.starts_with(dir)).collect())
}

/// Spaces and the like are written in octal there.
fn unescaped(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (code, plain)| text.replace(code, plain))
}

pub(crate) fn open_root(root: &Path) -> Result<OwnedFd, Failure> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(root, flags, Mode::empty()).during(|| format!("opening {}", root.display()))
}

/// Opens a path as a process inside would: symbolic links lead nowhere but inside, and never into what /proc names.
pub(crate) fn open_inside(root: &OwnedFd, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // EAGAIN: something was renamed meanwhile, so the kernel could not be sure that the path stays inside.
    for _ in 0..16 {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}
