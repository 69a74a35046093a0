//! Network namespaces by name, in the folder where `ip netns` looks for them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_service::guard::lock_within;
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount,
};
use rustix::thread::UnshareFlags;

use crate::failure::{During, Failure};

const DIR: &str = "/run/netns";
/// The type of the kernel's file system of namespaces.
const NSFS: rustix::fs::FsWord = 0x6e73_6673;
/// For others that make the folder ready, which takes them milliseconds.
const LOCKED: Duration = Duration::from_secs(5);

pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

/// Whether the name stands for a namespace: a crash can leave a file that does not.
pub(crate) fn is_there(name: &str) -> bool {
    rustix::fs::statfs(path(name)).is_ok_and(|stat| stat.f_type == NSFS)
}

/// Makes a namespace with its loopback up, in which every user may listen on every port: an instance has no capability
/// to listen below 1024, and needs none, as the namespace is its own. Blocks for about a millisecond.
pub(crate) fn make(name: &str) -> Result<(), Failure> {
    let path = path(name);
    make_ready().during(|| format!("making {DIR} a mount point of its own"))?;
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .during(|| format!("making {}", path.display()))?;
    // A thread of its own: it moves into the new namespace and ends there.
    let made = std::thread::scope(|scope| {
        scope
            .spawn(|| enter_and_pin(&path))
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("its thread died")))
    });
    made.during(|| format!("making the network namespace {name}")).inspect_err(|_| {
        let _ = remove(name);
    })
}

/// The folder is a mount point of its own whose mounts others see, as `ip netns add` makes it. Where that comes after
/// the first namespace, it is bound over itself with all that is in it: the namespaces are mounted twice from then on,
/// once where nobody can unmount them any more, and none of them can be removed.
fn make_ready() -> io::Result<()> {
    fs::create_dir_all(DIR)?;
    let share = || mount_change(DIR, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    if share().is_ok() {
        return Ok(());
    }
    let below = File::open(DIR)?;
    // The lock that `ip netns` takes for the same.
    lock_within(&below, LOCKED)?;
    match share() {
        // Not a mount point.
        Err(Errno::INVAL) => {}
        // Another one was first.
        done => return Ok(done?),
    }
    mount_bind_recursive(DIR, DIR)?;
    share()?;
    // What was mounted before is mounted twice now.
    for name in fs::read_dir(DIR)?.flatten().map(|entry| entry.file_name()) {
        let hidden = Path::new("/proc/self/fd").join(below.as_raw_fd().to_string()).join(name);
        if rustix::fs::statfs(&hidden).is_ok_and(|stat| stat.f_type == NSFS) {
            unmount(&hidden, UnmountFlags::DETACH)?;
        }
    }
    Ok(())
}

fn enter_and_pin(path: &Path) -> io::Result<()> {
    // SAFETY: only this thread's network namespace changes, and no descriptor of it is shared with another thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? };
    fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")?;
    loopback_up()?;
    mount_bind("/proc/thread-self/ns/net", path)?;
    Ok(())
}

fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: all-zero bytes are a valid ifreq: a name, and a union of plain numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l'.cast_signed();
    request.ifr_name[1] = b'o'.cast_signed();
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or_default();
    // SAFETY: the request is an initialised ifreq that outlives the call, as SIOCSIFFLAGS wants.
    let done = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SIOCSIFFLAGS,
            std::ptr::from_ref(&request),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Removes the name. The namespace itself, with its interfaces, goes with the last process in it. Nothing to do is fine.
pub(crate) fn remove(name: &str) -> Result<(), Failure> {
    let path = path(name);
    // A crash between the file and the mount leaves the file alone.
    let _ = unmount(&path, UnmountFlags::DETACH);
    match fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::new(format!("removing the network namespace {name}"), error)),
    }
}

/// Namespaces whose name begins with `prefix`.
pub(crate) fn list(prefix: &str) -> Result<Vec<String>, Failure> {
    let entries = match fs::read_dir(DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::new(format!("listing {DIR}"), error)),
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with(prefix)).collect())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::mount::{MountFlags, mount};

    use super::*;

    /// Does it on a thread with mounts of its own, where nobody made the folder yet, as on a machine that has just booted.
    fn just_booted(does: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: only this thread's mounts change, and no other thread shares its folder.
                unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
                mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
                mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
                does();
            });
        });
    }

    fn ip_netns(verb: &str, name: &str) {
        assert!(Command::new("ip").args(["netns", verb, name]).status().unwrap().success());
    }

    #[test]
    fn what_was_made_before_others_used_the_folder_can_be_removed() {
        just_booted(|| {
            make("kiln-first").unwrap();
            ip_netns("add", "other");
            remove("kiln-first").unwrap();
            assert_eq!(list("kiln-").unwrap(), Vec::<String>::new());
            ip_netns("delete", "other");
        });
    }

    #[test]
    fn what_an_earlier_version_made_can_be_removed_and_stays_until_then() {
        just_booted(|| {
            fs::create_dir_all(DIR).unwrap();
            fs::write(path("kiln-first"), "").unwrap();
            mount_bind("/proc/self/ns/net", path("kiln-first")).unwrap();
            make("kiln-second").unwrap();
            assert!(is_there("kiln-first") && is_there("kiln-second"));
            ip_netns("add", "other");
            remove("kiln-first").unwrap();
            remove("kiln-second").unwrap();
            assert_eq!(list("kiln-").unwrap(), Vec::<String>::new());
        });
    }
}
