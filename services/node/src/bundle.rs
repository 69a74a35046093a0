//! What the OCI runtime is told about an instance.

mod seccomp;

use std::collections::BTreeMap;
use std::path::Path;

use kiln_model::run::{GRANTABLE, Limits};
use serde_json::{Value, json};

use crate::failure::{During, Failure};
use crate::rootfs::Rootfs;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const OPEN_FILES: u64 = 65_536;
/// In microseconds; the kernel takes no less.
const LEAST_QUOTA: u64 = 1000;

/// The first capability that can't be granted.
pub(crate) fn refused_capability(capabilities: &[String]) -> Option<&str> {
    capabilities.iter().map(String::as_str).find(|name| !GRANTABLE.contains(name))
}

pub(crate) fn grantable() -> String {
    GRANTABLE.join(", ")
}

/// What a bundle is made of besides its root file system.
#[derive(Debug)]
pub(crate) struct Contents<'a> {
    pub(crate) hostname: &'a str,
    pub(crate) command: &'a [String],
    pub(crate) workdir: &'a str,
    /// `KEY=value`, as images have it.
    pub(crate) image_env: &'a [String],
    pub(crate) env: &'a BTreeMap<String, String>,
    pub(crate) capabilities: &'a [String],
    pub(crate) limits: &'a Limits,
    pub(crate) network: &'a Path,
    /// From the root of the hierarchies, with a leading slash.
    pub(crate) cgroup: &'a str,
}

pub(crate) fn write(dir: &Path, rootfs: &Rootfs, contents: &Contents<'_>) -> Result<(), Failure> {
    let path = dir.join("config.json");
    std::fs::write(&path, config(rootfs, contents).to_string())
        .during(|| format!("writing {}", path.display()))
}

fn config(rootfs: &Rootfs, contents: &Contents<'_>) -> Value {
    let limits = contents.limits;
    let mut resources = json!({});
    if let Some(bytes) = limits.memory_bytes {
        resources["memory"] = json!({ "limit": bytes });
        // Counted together with memory: the same number means none. Without swap there may be nothing to limit.
        if has_swap() {
            resources["memory"]["swap"] = json!(bytes);
        }
    }
    if let Some(millis) = limits.cpu_millis {
        // Thousandths of a CPU, in microseconds out of each period of 100 ms.
        resources["cpu"] = json!({ "period": 100_000, "quota": (u64::from(millis) * 100).max(LEAST_QUOTA) });
    }
    if let Some(pids) = limits.pids {
        resources["pids"] = json!({ "limit": pids });
    }
    json!({
        "ociVersion": "1.0.2",
        "hostname": contents.hostname,
        "root": { "path": rootfs.root, "readonly": true },
        "process": process(rootfs, contents),
        "mounts": mounts(rootfs),
        "linux": {
            "cgroupsPath": contents.cgroup,
            "resources": resources,
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                { "type": "network", "path": contents.network },
            ],
            "seccomp": seccomp::profile(contents.capabilities),
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
                "/sys/devices/virtual/powercap", "/sys/firmware",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

fn has_swap() -> bool {
    // A line of headings comes first.
    std::fs::read_to_string("/proc/swaps").is_ok_and(|swaps| swaps.lines().count() > 1)
}

fn process(rootfs: &Rootfs, contents: &Contents<'_>) -> Value {
    let user = &rootfs.user;
    let capabilities: Vec<String> = contents.capabilities.iter().map(|name| format!("CAP_{name}")).collect();
    let none: Vec<String> = Vec::new();
    // A program run by another user than root keeps only what is ambient; for root the bounding set decides.
    let kept = if user.uid == 0 { &none } else { &capabilities };
    json!({
        "terminal": false,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups, "umask": 0o022 },
        "args": contents.command,
        "env": environment(&user.home, contents),
        "cwd": contents.workdir,
        "noNewPrivileges": true,
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            "inheritable": kept, "ambient": kept,
        },
        "rlimits": [
            { "type": "RLIMIT_NOFILE", "soft": open_files(), "hard": open_files() },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ],
    })
}

/// Descriptors of one process. Not more than the node itself may have: to raise a limit takes a capability that the
/// machine may not grant.
fn open_files() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .maximum
        .map_or(OPEN_FILES, |most| most.min(OPEN_FILES))
}

/// The image's, then the release's, which win.
fn environment(home: &str, contents: &Contents<'_>) -> Vec<String> {
    let mut all: BTreeMap<&str, &str> =
        BTreeMap::from([("PATH", PATH), ("HOME", home), ("HOSTNAME", contents.hostname)]);
    all.extend(contents.image_env.iter().filter_map(|pair| pair.split_once('=')));
    all.extend(contents.env.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    all.into_iter().map(|(key, value)| format!("{key}={value}")).collect()
}

fn mounts(rootfs: &Rootfs) -> Vec<Value> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let mut all = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        // Read-only once the runtime has put the devices there: it would be memory that nobody declared.
        mount("/dev", "tmpfs", &["nosuid", "noexec", "strictatime", "mode=755", "size=64k", "ro"]),
        mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
    ];
    all.extend(rootfs.writable.iter().map(|(destination, source)| {
        json!({
            "destination": destination, "type": "bind", "source": source,
            "options": ["bind", "rw", "nosuid", "nodev"],
        })
    }));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rootfs::User;

    fn of(uid: u32, capabilities: &[&str]) -> Value {
        let user = User { uid, gid: 0, groups: vec![], home: "/root".to_owned() };
        let rootfs = Rootfs { root: "/r".into(), writable: vec![("/run".to_owned(), "/m/0".into())], user };
        let capabilities: Vec<String> = capabilities.iter().map(|&name| name.to_owned()).collect();
        let env = BTreeMap::from([("A".to_owned(), "release".to_owned())]);
        let limits = Limits { memory_bytes: Some(1 << 20), cpu_millis: Some(500), pids: Some(7) };
        config(
            &rootfs,
            &Contents {
                hostname: "web-r1-0-a1",
                command: &["nginx".to_owned()],
                workdir: "/",
                image_env: &["A=image".to_owned(), "B=image".to_owned()],
                env: &env,
                capabilities: &capabilities,
                limits: &limits,
                network: Path::new("/run/netns/x"),
                cgroup: "/kiln-00000000/web-r1-0-a1",
            },
        )
    }

    #[test]
    fn nothing_is_kept_but_what_was_declared() {
        let config = of(33, &[]);
        for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
            assert_eq!(config["process"]["capabilities"][set], json!([]), "{set}");
        }
        assert_eq!(config["process"]["noNewPrivileges"], json!(true));
        assert_eq!(config["root"]["readonly"], json!(true));
        let root = of(0, &["SETUID"]);
        assert_eq!(root["process"]["capabilities"]["effective"], json!(["CAP_SETUID"]));
        assert_eq!(root["process"]["capabilities"]["ambient"], json!([]));
        assert_eq!(of(33, &["SETUID"])["process"]["capabilities"]["ambient"], json!(["CAP_SETUID"]));
    }

    #[test]
    fn the_release_s_environment_wins() {
        let env = of(0, &[])["process"]["env"].to_string();
        assert!(env.contains("A=release") && env.contains("B=image") && env.contains("HOME=/root"), "{env}");
    }

    #[test]
    fn limits_become_cgroup_numbers() {
        let resources = &of(0, &[])["linux"]["resources"];
        assert_eq!(resources["memory"]["limit"], json!(1 << 20));
        assert_eq!(resources["cpu"], json!({ "period": 100_000, "quota": 50_000 }));
        assert_eq!(resources["pids"], json!({ "limit": 7 }));
    }

    #[test]
    fn a_capability_that_breaks_out_is_refused() {
        let wanted = ["SETUID".to_owned(), "SYS_ADMIN".to_owned()];
        assert_eq!(refused_capability(&wanted), Some("SYS_ADMIN"));
        assert_eq!(refused_capability(&wanted[..1]), None);
    }
}
