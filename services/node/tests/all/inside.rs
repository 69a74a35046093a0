//! What an instance can do from inside: nothing that was not declared.

use kiln_api::types::check::Kind;
use kiln_api::types::{
    FileCheck, HttpCheck, LogCheck, PackageCheck, PortCheck, ProcessCheck, Transport, UserCheck,
};

use crate::site::{TestSite, id, request, spec, wait_for};

#[tokio::test]
async fn nothing_can_be_written_mounted_or_traced() {
    let site = TestSite::start().await;
    let image = site.server_image();
    site.serving(&image, 1).await;
    for run in [
        "write /etc/passwd",
        "write /new",
        "write /bin/server",
        "write /etc/hosts",
        "write /dev/new",
        "write /sys/kernel/uevent_helper",
        "write /proc/sys/kernel/core_pattern",
        "write /proc/sysrq-trigger",
        "remount",
        "mount",
        "unshare",
        "ptrace",
        "mknod",
    ] {
        let tried = site.command(&id(1), run, "").await;
        assert!(tried.detail.contains("exit status 1, wanted 0"), "{run}: {}", tried.detail);
    }
    for run in ["write /run/new", "write /tmp/new"] {
        let tried = site.command(&id(1), run, "write: done").await;
        assert!(tried.passed, "{run}: {}", tried.detail);
    }
    let none = "0000000000000000";
    let status =
        format!("CapInh:\t{none}\nCapPrm:\t{none}\nCapEff:\t{none}\nCapBnd:\t{none}\nCapAmb:\t{none}\n");
    let tried = site.command(&id(1), "status", &status).await;
    assert!(tried.passed, "{}", tried.detail);
    assert!(site.command(&id(1), "status", "NoNewPrivs:\t1\nSeccomp:\t2\n").await.passed);
}

#[tokio::test]
async fn a_user_has_what_was_declared_and_no_more() {
    let site = TestSite::start().await;
    let image = site.image("www", &["/bin/server"]);
    let mut capable = spec(&image, 1);
    capable.run.as_mut().unwrap().capabilities = vec!["CHOWN".to_owned()];
    let instance = site.launch(request(capable)).await.unwrap();
    // CAP_CHOWN is bit 0. Not root, so it has to be ambient to be there at all; and port 80 needs none.
    let one = "0000000000000001";
    let status = format!("CapInh:\t{one}\nCapPrm:\t{one}\nCapEff:\t{one}\nCapBnd:\t{one}\nCapAmb:\t{one}\n");
    let tried = site.command(&id(1), "status", &status).await;
    assert!(tried.passed, "{}", tried.detail);
    for run in ["write /data/new", "write /var/data/seed"] {
        let tried = site.command(&id(1), run, "write: done").await;
        assert!(tried.passed, "{run}: {}", tried.detail);
    }
    assert!(
        !site.command(&id(1), "write /run/new", "write: done").await.passed,
        "the folder belongs to root"
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", instance.pid)).unwrap();
    assert!(status.contains("Uid:\t33\t33\t33\t33"), "{status}");
    // The image's own tree is as it was: what was written lies in memory.
    let image = site.images().image(&image.parse().unwrap()).unwrap();
    let tree = site.images().layer_tree(&image.layers[0].diff_id).unwrap();
    assert_eq!(std::fs::read_to_string(tree.join("var/data/seed")).unwrap(), "seed\n");
    assert!(!tree.join("var/data/new").exists());
}

#[tokio::test]
async fn checks_see_what_the_instance_sees() {
    let site = TestSite::start().await;
    let image = site.server_image();
    site.serving(&image, 1).await;
    let file = async |path: &str, mode: &str, owner: &str, contains: &str, absent: bool| {
        let (path, mode) = (path.to_owned(), mode.to_owned());
        let (owner, contains) = (owner.to_owned(), contains.to_owned());
        site.check(&id(1), Kind::File(FileCheck { path, mode, owner, contains, absent })).await
    };
    // Seeded memory, through a link: owner and mode as in the image.
    let seed = file("/data/seed", "0640", "www", "seed", false).await;
    assert!(seed.passed, "{}", seed.detail);
    assert!(file("/var/data", "0750", "33", "", false).await.passed);
    assert!(file("/tmp", "1777", "root", "", false).await.passed);
    assert!(file("/etc/hosts", "0644", "root", &id(1), false).await.passed);
    assert!(file("/etc/resolv.conf", "", "root", "", false).await.passed);
    assert!(file("/missing", "", "", "", true).await.passed);
    assert!(!file("/etc/passwd", "0600", "", "", false).await.passed);
    // A link to the machine's files leads nowhere: the root is the instance's own.
    assert!(!file("/../../../../../../etc/machine-id", "", "", "", false).await.passed);

    let http = |path: &str, body: &str| {
        Kind::Http(HttpCheck { port: 80, path: path.to_owned(), status: 200, body: body.to_owned() })
    };
    assert!(site.check(&id(1), http("/", "Hello")).await.passed);
    assert!(!site.check(&id(1), http("/", "Goodbye")).await.passed);
    assert!(site.command(&id(1), "exit 0", "").await.passed);
    let failed = site.command(&id(1), "unknown", "").await;
    assert!(failed.detail.contains("127") && failed.detail.contains("not known"), "{}", failed.detail);
    let endless = site.command(&id(1), "forever", "").await;
    assert!(endless.detail.contains("5s"), "{}", endless.detail);
    let procs = format!("/sys/fs/cgroup/pids/kiln-{}/{}/cgroup.procs", site.site.id, id(1));
    if std::path::Path::new(&procs).exists() {
        // The kernel takes a killed process apart when it has its turn.
        let alone = || std::fs::read_to_string(&procs).is_ok_and(|pids| pids.lines().count() == 1);
        wait_for("a command that took too long to be killed, inside too", alone).await;
    }
}

#[tokio::test]
async fn checks_see_users_ports_processes_packages_and_the_log() {
    let site = TestSite::start().await;
    let image = site.image("www", &["/bin/server"]);
    site.serving(&image, 1).await;
    let user = |uid| UserCheck { name: "www".to_owned(), uid: Some(uid), ..UserCheck::default() };
    let port = |port, protocol: Transport, address: &str| PortCheck {
        port,
        protocol: protocol.into(),
        address: address.to_owned(),
        absent: false,
    };
    let process = |name: &str, user: &str, count| ProcessCheck {
        name: name.to_owned(),
        user: user.to_owned(),
        count,
        absent: false,
    };
    let log = |contains: &str| LogCheck { contains: contains.to_owned(), absent: false };
    let absent = PackageCheck { name: "nginx".to_owned(), absent: true, ..PackageCheck::default() };
    for (check, wrong) in [
        (Kind::User(user(33)), Kind::User(user(34))),
        (Kind::Port(port(80, Transport::Tcp, "0.0.0.0")), Kind::Port(port(80, Transport::Tcp, "127.0.0.1"))),
        (Kind::Port(port(80, Transport::Tcp, "")), Kind::Port(port(80, Transport::Udp, ""))),
        (Kind::Process(process("server", "www", 1)), Kind::Process(process("server", "root", 1))),
        (Kind::Process(process("server", "33", 0)), Kind::Process(process("conmon", "", 0))),
        (Kind::Log(log("ready")), Kind::Log(log("steady"))),
        (Kind::Package(absent.clone()), Kind::Package(PackageCheck { absent: false, ..absent })),
    ] {
        let seen = site.check(&id(1), check.clone()).await;
        assert!(seen.passed, "{check:?}: {}", seen.detail);
        let seen = site.check(&id(1), wrong.clone()).await;
        assert!(!seen.passed, "{wrong:?}: {}", seen.detail);
    }
}
