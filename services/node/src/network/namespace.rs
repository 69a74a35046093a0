//! Network namespaces by name, in the folder where `ip netns` looks for them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::UnshareFlags;

use crate::failure::{During, Failure};

const DIR: &str = "/run/netns";
/// The type of the kernel's file system of namespaces.
const NSFS: rustix::fs::FsWord = 0x6e73_6673;

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
    fs::create_dir_all(DIR).during(|| format!("making {DIR}"))?;
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
