//! Where a bake's trees lie: on a tmpfs of bounded size, with the layers below mounted in read-only.
//!
//! ```text
//! /run/kiln-bake-<site>/runc/      the runtime's state
//! /run/kiln-bake-<site>/<build>/   a tmpfs; belongs to the sandbox's root, as the way to it has to
//! ```
//!
//! Not in the site's folder, which nobody but root can enter: the sandbox's root is not root out here.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use kiln_model::name::{BuildId, SiteId};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount, move_mount, open_tree, unmount,
};

use super::error::BakeError;
use super::tree::SHIFT;

pub(crate) const IDS: u32 = 65_536;

pub(crate) fn site_folder(site: &SiteId) -> PathBuf {
    PathBuf::from(format!("/run/kiln-bake-{site}"))
}

/// The tmpfs of one bake; dropped, everything in it is gone.
pub(crate) struct Work {
    path: PathBuf,
}

impl Work {
    pub(crate) fn new(site: &SiteId, build: &BuildId, bytes: u64) -> Result<Self, BakeError> {
        let above = site_folder(site);
        let path = above.join(build.to_string());
        // Left over by an earlier try of the same build.
        clear(&path).map_err(BakeError::io("clear", &path))?;
        // A bake that ends at this moment removes the site's folder, so a second try can be needed.
        make_below(&above, &path)
            .or_else(|_| make_below(&above, &path))
            .map_err(BakeError::io("make folder", &path))?;
        let work = Self { path };
        let options = format!("size={bytes},mode=0700,uid={SHIFT},gid={SHIFT}");
        let options = std::ffi::CString::new(options).unwrap_or_default();
        mount("tmpfs", &work.path, "tmpfs", MountFlags::NODEV | MountFlags::NOSUID, options.as_c_str())
            .map_err(|e| BakeError::io("mount tmpfs on", &work.path)(e.into()))?;
        Ok(work)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A folder of the given name, owned by `uid`.
    pub(crate) fn folder(&self, name: &str, uid: u32) -> Result<PathBuf, BakeError> {
        let path = self.path.join(name);
        fs::create_dir(&path)
            .and_then(|()| chown(&path, Some(uid), Some(uid)))
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .map_err(BakeError::io("make folder", &path))?;
        Ok(path)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = clear(&self.path) {
            tracing::error!(path = %self.path.display(), %error, "a bake's folder is left over; the sweep at the next start removes it");
        }
        // The last one leaves nothing; with another one at work they are not empty, and stay.
        if let Some(above) = self.path.parent() {
            let _ = fs::remove_dir(above.join("runc"));
            let _ = fs::remove_dir(above);
        }
    }
}

fn make_below(above: &Path, path: &Path) -> io::Result<()> {
    fs::create_dir_all(above)?;
    // Passed through by the sandbox's root, listed by nobody.
    fs::set_permissions(above, fs::Permissions::from_mode(0o711))?;
    fs::create_dir(path)
}

/// Unmounts what is mounted at or below a folder, and removes it.
pub(crate) fn clear(folder: &Path) -> io::Result<()> {
    unmount_below(folder)?;
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Where something is mounted at or below a folder, parents first.
pub(crate) fn mounts_below(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(points.filter(|point| point.starts_with(folder)).collect())
}

pub(crate) fn unmount_below(folder: &Path) -> io::Result<()> {
    let mut points = mounts_below(folder)?;
    // Later ones lie on earlier ones.
    points.reverse();
    for point in points {
        match unmount(&point, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Gone with the one it lay on.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Mounts `tree` at `target` so that its plain owners are those of the sandbox.
pub(crate) fn mount_shifted(tree: &Path, target: &Path, read_only: bool) -> Result<(), BakeError> {
    let failed = |doing| BakeError::io(doing, target);
    let namespace = user_namespace().map_err(failed("make a user namespace for"))?;
    let clone = open_tree(CWD, tree, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
        .map_err(|e| BakeError::io("open", tree)(e.into()))?;
    set_id_mapping(&clone, namespace, read_only).map_err(failed("map the owners of"))?;
    move_mount(clone.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|e| failed("mount")(e.into()))
}

/// An overlay of `lowers`, the topmost first, with its changes in `upper`.
pub(crate) fn mount_overlay(
    lowers: &[PathBuf],
    upper: &Path,
    scratch: &Path,
    target: &Path,
) -> Result<(), BakeError> {
    let mount = || -> rustix::io::Result<()> {
        let overlay = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let overlay = overlay.as_fd();
        // One by one: all together would have to fit one page.
        for lower in lowers {
            fsconfig_set_string(overlay, "lowerdir+", lower)?;
        }
        fsconfig_set_string(overlay, "upperdir", upper)?;
        fsconfig_set_string(overlay, "workdir", scratch)?;
        // The upper is packed as a layer: everything that it changes has to be in it, whole and under its own name.
        for (option, value) in
            [("redirect_dir", "off"), ("metacopy", "off"), ("index", "off"), ("xino", "off")]
        {
            fsconfig_set_string(overlay, option, value)?;
        }
        fsconfig_create(overlay)?;
        let mounted = fsmount(
            overlay,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID,
        )?;
        move_mount(mounted.as_fd(), "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    mount().map_err(|e| BakeError::io("mount an overlay on", target)(e.into()))
}

/// `struct mount_attr` of the kernel.
#[repr(C)]
#[derive(Default)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    namespace: u64,
}

fn set_id_mapping(tree: &OwnedFd, namespace: &OwnedFd, read_only: bool) -> io::Result<()> {
    let attributes = MountAttributes {
        set: libc::MOUNT_ATTR_IDMAP | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 },
        // Not to be seen in other mount namespaces, which would keep it busy.
        propagation: libc::MS_PRIVATE,
        namespace: u64::try_from(namespace.as_raw_fd()).unwrap_or(u64::MAX),
        ..MountAttributes::default()
    };
    // SAFETY: the path is a constant with its NUL, the attributes are as large as they are said to be, and both live
    // until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A user namespace that nobody lives in, for its mapping: one for the whole process.
fn user_namespace() -> io::Result<&'static OwnedFd> {
    static NAMESPACE: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(namespace) = NAMESPACE.get() {
        return Ok(namespace);
    }
    let mut command = Command::new("/bin/cat");
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    // SAFETY: unshare(2) is a plain system call, which is all that may be done between fork and exec.
    unsafe {
        command.pre_exec(|| {
            if libc::unshare(libc::CLONE_NEWUSER) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        });
    }
    let mut child = command.spawn()?;
    let open = || -> io::Result<OwnedFd> {
        let process = PathBuf::from(format!("/proc/{}", child.id()));
        let map = format!("0 {SHIFT} {IDS}\n");
        fs::write(process.join("uid_map"), &map)?;
        fs::write(process.join("gid_map"), &map)?;
        Ok(fs::File::open(process.join("ns/user"))?.into())
    };
    let namespace = open();
    // It waits for its input to end.
    drop(child.stdin.take());
    child.wait()?;
    let namespace = namespace?;
    Ok(NAMESPACE.get_or_init(|| namespace))
}
