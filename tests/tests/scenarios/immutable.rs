//! A running instance can't be changed, and can't reach what is not its own.

use std::process::Command;

use kiln_api::engine::CheckRequest;
use kiln_api::types::check::Kind;
use kiln_api::types::{Check, CommandCheck};
use kiln_tests::Result;
use kiln_tests::command::run;

use kiln_tests::server::Web;
use kiln_tests::site::Site;

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_cannot_be_changed_from_inside() -> Result<()> {
    let web = Web::start(Site::up("inside")?).await?;
    let fleet = web.settled(1).await?;
    let id = fleet.instances.iter().find(|i| i.on_edge).ok_or("an instance is on the edge")?.id.clone();
    let inside = async |command: &str| -> Result<(bool, String)> {
        let request = CheckRequest {
            id: id.clone(),
            check: Some(Check {
                kind: Some(Kind::Command(CommandCheck {
                    run: command.to_owned(),
                    status: 0,
                    stdout: String::new(),
                })),
            }),
            timeout: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        };
        let result = web.site.engine().check(request).await?.into_inner().result.ok_or("no result")?;
        Ok((result.passed, result.detail))
    };
    for refused in [
        "touch /etc/changed",
        "echo changed >> /var/www/html/index.html",
        "rm /usr/sbin/nginx",
        "mount -o remount,rw /",
        "mount -t tmpfs none /mnt",
        "chroot / true",
        "mknod /var/lib/web/disk b 8 0",
        "hostname other",
        "echo 1 > /proc/sys/kernel/panic",
        "echo c > /proc/sysrq-trigger",
        "cat /proc/kcore",
        "ls /sys/kernel/security/*",
        "unshare --user --map-root-user true",
    ] {
        let (passed, detail) = inside(refused).await?;
        assert!(!passed, "{refused}: {detail}");
    }
    for allowed in ["true", "touch /var/lib/web/file", "test \"$STAGE\" = one", "id -un | grep www-data"] {
        let (passed, detail) = inside(allowed).await?;
        assert!(passed, "{allowed}: {detail}");
    }

    // The main process: no capability in any set, no way to gain one.
    let pid = web.pid_of(&id).await?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).ok_or("the set is listed")?;
        assert!(line.ends_with("\t0000000000000000"), "{line}");
    }
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");

    // From outside, as root of the machine: the tree that it runs from is mounted read-only.
    let target = format!("/proc/{pid}/root/etc/changed");
    assert!(run(Command::new("touch").arg(&target)).is_err(), "{target} could be written by root");
    web.site.down()
}
