//! Steps that reach a network, and steps that are told secrets.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use super::*;

const SECRET: &str = "canary-of-a-step-77f0e2";

/// Of this machine, and not its loopback. Nothing is sent: a socket of this kind is only told whom it is for.
fn own_address() -> IpAddr {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).unwrap();
    socket.local_addr().unwrap().ip()
}

/// A server that says hello, at every address of this machine.
fn hello() -> u16 {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nhello");
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_step_that_says_so_reaches_the_network_and_no_step_this_machine_s_loopback() {
    let kitchen = Kitchen::new("be00000e", BakeLimits::default());
    let (address, port) = (own_address(), hello());
    let get = |host: &str| {
        format!(
            "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(PeerAddr => \"{host}:{port}\", Timeout => 3) or exit 7; print $s \"GET / HTTP/1.0\\r\\n\\r\\n\"; print <$s>'"
        )
    };
    let steps = |network: &str, script: &str| {
        format!("  from: {{ debian: bookworm }}\n  steps:\n    - run: |\n        {script}\n{network}")
    };
    let with = "      network: true\n";
    let there = format!(
        "{} >/opt/answer; grep nameserver /etc/resolv.conf >/opt/resolver",
        get(&address.to_string())
    );
    let reached = kitchen.lock(&steps(with, &there), None, None).await;
    let [LockedStep::Run { archives, .. }] = reached.lock.steps.as_slice() else {
        panic!("{:?}", reached.lock.steps)
    };
    assert!(archives.is_some(), "what it could install from counts");
    let image = kitchen.bake(&reached.lock, 1).await;
    assert!(kitchen.read(&image, "opt/answer").unwrap().ends_with("hello"));
    assert_eq!(kitchen.read(&image, "opt/resolver").unwrap(), "nameserver 10.0.2.3\n");
    let tree = kitchen.store().layer_tree(&image.layers[1].digest).unwrap();
    assert!(fs::symlink_metadata(tree.join("etc/resolv.conf")).is_err(), "nothing of the network stays");
    kitchen.assert_nothing_is_left();

    for (what, network, host) in [
        ("a step that says nothing of it", "", address.to_string()),
        ("the loopback", with, "10.0.2.2".to_owned()),
        ("its own loopback", with, "127.0.0.1".to_owned()),
    ] {
        let lock = kitchen.lock(&steps(network, &get(&host)), None, Some(&reached.lock)).await.lock;
        let error = kitchen.baker.bake(&lock, kitchen.run(2)).await.unwrap_err().to_string();
        assert!(error.contains("status 7"), "{what}: {error}");
        kitchen.assert_nothing_is_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_where_its_step_reads_it_and_nowhere_else() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), format!("{SECRET}\n")).unwrap();
    let secrets = BTreeMap::from([("token".to_owned(), file.path().to_owned())]);
    let kitchen = Kitchen::with_secrets("be00000f", secrets);
    let steps = |secrets: &str, script: &str| {
        format!(
            "  from: {{ debian: bookworm }}\n  steps:\n    - run: |\n        {script}\n      secrets: {secrets}\n"
        )
    };
    let good = steps(
        "[token]",
        "cat /run/secrets/token; test $(stat -c %a:%U /run/secrets/token) = 400:root; \
         ! su -s /bin/sh nobody -c 'cat /run/secrets/token'; ! touch /run/secrets/new; \
         sha256sum </run/secrets/token >/opt/hash",
    );
    let lock = kitchen.lock(&good, None, None).await.lock;
    let image = kitchen.bake(&lock, 1).await;
    assert_eq!(kitchen.read(&image, "opt/hash").unwrap().len(), 68);
    assert!(kitchen.log.lock().unwrap().iter().any(|line| line == "***"), "what it prints is hidden");

    for (what, script) in [
        ("a copy", "cp /run/secrets/token /opt/copy"),
        ("a part of a file", "{ seq 100000; cat /run/secrets/token; seq 10; } >/var/tmp2"),
        ("a name", "mkdir /opt/$(cat /run/secrets/token)"),
        ("a link", "ln -s $(cat /run/secrets/token) /opt/link"),
    ] {
        let lock = kitchen.lock(&steps("[token]", script), None, Some(&lock)).await.lock;
        let error = kitchen.baker.bake(&lock, kitchen.run(2)).await.unwrap_err().to_string();
        assert!(error.contains("leaves the secret token") && !error.contains(SECRET), "{what}: {error}");
    }
    let failing =
        kitchen.lock(&steps("[token]", "cat /run/secrets/token >&2; exit 3"), None, Some(&lock)).await.lock;
    let error = kitchen.baker.bake(&failing, kitchen.run(2)).await.unwrap_err().to_string();
    assert!(error.contains("***") && !error.contains(SECRET), "{error}");
    let error = kitchen.try_lock(&steps("[other]", "true"), None, None).await.unwrap_err().to_string();
    assert!(error.contains("secret other") && error.contains("site.toml"), "{error}");

    // Nowhere: in no image, no layer, no cache, no log, no lock, no error.
    assert!(!kitchen.log.lock().unwrap().join("\n").contains(SECRET));
    let found = Command::new("grep").args(["-rlF", SECRET]).arg(kitchen.folder.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    kitchen.assert_nothing_is_left();
}
