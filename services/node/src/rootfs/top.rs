//! The instance's own layer: mount points that the image lacks, and who the instance is.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{self as rfs, FileType, Gid, OFlags, Uid};
use rustix::io::Errno;

use super::seed::{permissions, times};
use super::{User, open_inside};
use crate::failure::{During, Failure};

/// What the runtime mounts in every instance.
const MOUNTED: [&str; 3] = ["/proc", "/sys", "/dev"];

/// Who an instance is.
#[derive(Debug)]
pub(crate) struct Identity<'a> {
    pub(crate) hostname: &'a str,
    pub(crate) address: Ipv4Addr,
}

/// Makes the layer, and returns where the writable paths really lead, without duplicates, parents first.
pub(super) fn make(
    top: &Path,
    image: &OwnedFd,
    root: &Path,
    writable: &[String],
    identity: &Identity<'_>,
    user: &User,
) -> Result<Vec<String>, Failure> {
    let layer = Layer { top, image, root, user };
    for path in MOUNTED {
        let real = layer.real(path)?;
        if real != path {
            return Err(Failure::new(
                format!("looking at {path} of the image"),
                format!("it is a link to {real}"),
            ));
        }
        layer.folder(path)?;
    }
    let mut real = Vec::new();
    for path in writable {
        let path = layer.real(path)?;
        // The runtime's own file system has its folders made by the runtime.
        if !path.starts_with("/dev/") {
            layer.folder(&path)?;
        }
        real.push(path);
    }
    real.sort();
    real.dedup();
    if let Some(bad) = real.iter().find(|path| {
        let inside = |mounted: &str| {
            path.strip_prefix(mounted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        *path == "/" || inside("/proc") || inside("/sys") || *path == "/dev"
    }) {
        return Err(Failure::new(
            format!("making {bad} writable"),
            "it can't be; name a folder of the image",
        ));
    }
    let Identity { hostname, address } = identity;
    layer.file("/etc", "hosts", &format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n{address}\t{hostname}\n"))?;
    layer.file("/etc", "hostname", &format!("{hostname}\n"))?;
    layer.file("/etc", "resolv.conf", &resolvers())?;
    Ok(real)
}

struct Layer<'a> {
    top: &'a Path,
    image: &'a OwnedFd,
    root: &'a Path,
    user: &'a User,
}

impl Layer<'_> {
    /// Where a path of the image leads once all links are followed, whether it exists or not.
    fn real(&self, path: &str) -> Result<String, Failure> {
        let what = || format!("looking at {path} of the image");
        if path == "/" || path.is_empty() {
            return Ok("/".to_owned());
        }
        let path = path.trim_end_matches('/');
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        if !path.starts_with('/') || matches!(name, "" | "." | "..") {
            return Err(Failure::new(what(), "wanted an absolute path without `.`, `..` and `//`"));
        }
        match open_inside(self.image, path, OFlags::PATH) {
            Ok(found) => {
                let stat = rfs::fstat(&found).during(what)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    return Err(Failure::new(what(), "it is not a folder"));
                }
                let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&found));
                let at = std::fs::read_link(link).during(what)?;
                let inside = at.strip_prefix(self.root).during(what)?;
                Ok(Path::new("/").join(inside).to_string_lossy().into_owned())
            }
            Err(Errno::NOENT) => {
                if open_inside(self.image, path, OFlags::PATH | OFlags::NOFOLLOW).is_ok() {
                    return Err(Failure::new(what(), "it is a link that leads nowhere"));
                }
                let parent = self.real(parent)?;
                Ok(format!("{}/{name}", parent.trim_end_matches('/')))
            }
            Err(error) => Err(Failure::new(what(), error)),
        }
    }

    /// Makes a folder where the image has none. Those on the way are as they are in the image, since the topmost layer
    /// decides how a folder looks.
    fn folder(&self, real: &str) -> Result<(), Failure> {
        let what = || format!("making the mount point {real}");
        if open_inside(self.image, real, OFlags::PATH | OFlags::DIRECTORY).is_ok() {
            return Ok(());
        }
        self.ancestors(real)?;
        let at = self.within(real);
        make_dir(&at).during(what)?;
        std::os::unix::fs::chown(&at, Some(self.user.uid), Some(self.user.gid)).during(what)
    }

    fn within(&self, real: &str) -> PathBuf {
        self.top.join(real.trim_start_matches('/'))
    }

    fn ancestors(&self, real: &str) -> Result<(), Failure> {
        let what = || format!("making the folders above {real}");
        self.like_image(Path::new("/")).during(what)?;
        let mut all: Vec<&Path> = Path::new(real).ancestors().skip(1).collect();
        all.reverse();
        all.into_iter().try_for_each(|ancestor| self.like_image(ancestor)).during(what)
    }

    fn like_image(&self, real: &Path) -> std::io::Result<()> {
        let text = real.to_string_lossy();
        let at = self.within(&text);
        make_dir(&at)?;
        match open_inside(self.image, &text, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW) {
            Ok(there) => {
                let stat = rfs::fstat(&there)?;
                let folder = std::fs::File::open(&at)?;
                rfs::fchown(&folder, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
                rfs::fchmod(&folder, permissions(stat.st_mode))?;
                rfs::futimens(&folder, &times(&stat))?;
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a file in the place of whatever the image has there, be it a link.
    fn file(&self, folder: &str, name: &str, content: &str) -> Result<(), Failure> {
        let real = format!("{}/{name}", self.real(folder)?.trim_end_matches('/'));
        self.ancestors(&real)?;
        let at = self.within(&real);
        std::fs::write(&at, content).during(|| format!("writing {}", at.display()))
    }
}

fn make_dir(at: &Path) -> std::io::Result<()> {
    match std::fs::create_dir(at) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        Ok(()) => std::fs::set_permissions(at, std::os::unix::fs::PermissionsExt::from_mode(0o755)),
        Err(_) => Ok(()),
    }
}

/// The machine's name servers that an instance can reach: not those on the machine's own loopback.
fn resolvers() -> String {
    let usable = |path: &str| {
        let content = std::fs::read_to_string(path).unwrap_or_default();
        let reachable = |line: &&str| {
            let address = line.strip_prefix("nameserver").map(str::trim);
            !address.is_some_and(|address| address.starts_with("127.") || address == "::1")
        };
        let lines: Vec<&str> = content.lines().filter(reachable).collect();
        lines.iter().any(|line| line.starts_with("nameserver")).then(|| lines.join("\n") + "\n")
    };
    // The second has what stands behind systemd-resolved's address on the loopback.
    ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"].into_iter().find_map(usable).unwrap_or_default()
}
