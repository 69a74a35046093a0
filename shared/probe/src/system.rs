//! What an instance's databases, its kernel's tables, its processes and its log say, held against what the check wants.
//! Each is a text of somebody else's: a line that can't be read says nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use kiln_model::check::{LogCheck, PackageCheck, PortCheck, ProcessCheck, Transport, UserCheck};

use crate::{Verdict, clip};

/// `status` is dpkg's database, empty where the instance has none.
pub fn package(check: &PackageCheck, status: &str) -> Verdict {
    let name = clip(&check.name);
    let states: Vec<_> = status.split("\n\n").filter_map(|entry| state_of(entry, &check.name)).collect();
    // One package can be there for two architectures.
    let installed = states.iter().find(|(state, _)| *state == "installed").map(|(_, version)| *version);
    match (installed, check.version.as_deref()) {
        (Some(version), _) if check.absent => {
            Verdict::failed(format!("{name} {} is installed, and must not be", clip(version)))
        }
        (None, _) if check.absent => Verdict::passed(format!("{name} is not installed")),
        (Some(version), Some(wanted)) if !is_version(version, wanted) => {
            Verdict::failed(format!("{name} has version {}, wanted {}", clip(version), clip(wanted)))
        }
        (Some(version), _) => Verdict::passed(format!("{name} {} is installed", clip(version))),
        (None, _) => match states.first() {
            Some((state, _)) => Verdict::failed(format!("{name} is not installed, but {}", clip(state))),
            None => Verdict::failed(format!("{name} is not installed")),
        },
    }
}

/// State and version of the package in an entry of dpkg's database, where it is the one of that name.
fn state_of<'a>(entry: &'a str, name: &str) -> Option<(&'a str, &'a str)> {
    let field = |wanted: &str| {
        entry.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key == wanted).then(|| value.trim())
        })
    };
    if field("Package") != Some(name) {
        return None;
    }
    // `install ok installed`: what is wanted, whether something is broken, what is.
    let state = field("Status")?.split_whitespace().nth(2)?;
    Some((state, field("Version").unwrap_or_default()))
}

fn is_version(found: &str, wanted: &str) -> bool {
    let begins = |found: &str| {
        let digit = |c: char| c.is_ascii_digit();
        found.strip_prefix(wanted).is_some_and(|rest| !(wanted.ends_with(digit) && rest.starts_with(digit)))
    };
    // The epoch is seldom known to who writes a version.
    begins(found) || found.split_once(':').is_some_and(|(_, found)| begins(found))
}

/// The instance's `/etc/passwd` and `/etc/group`, each empty where it has none.
#[derive(Debug, Clone, Copy)]
pub struct UsersSeen<'a> {
    pub passwd: &'a str,
    pub group: &'a str,
}

pub fn user(check: &UserCheck, seen: UsersSeen<'_>) -> Verdict {
    let name = clip(&check.name);
    let fields = |line: &'_ str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let entry = seen.passwd.lines().map(fields).find(|entry| entry.len() >= 7 && entry[0] == check.name);
    let entry = match (entry, check.absent) {
        (Some(entry), true) => {
            return Verdict::failed(format!("there is a user {name} ({}), and must not be", clip(&entry[2])));
        }
        (None, true) => return Verdict::passed(format!("there is no user {name}")),
        (None, false) => return Verdict::failed(format!("there is no user {name}")),
        (Some(entry), false) => entry,
    };
    let uid = check.uid.map(|uid| uid.to_string());
    let wanted =
        [("uid", 2, uid.as_ref()), ("home", 5, check.home.as_ref()), ("shell", 6, check.shell.as_ref())];
    for (what, at, wanted) in wanted {
        if let Some(wanted) = wanted.filter(|wanted| **wanted != entry[at]) {
            let (found, wanted) = (clip(&entry[at]), clip(wanted));
            return Verdict::failed(format!("the user {name} has {what} {found}, wanted {wanted}"));
        }
    }
    let Some(wanted) = check.group.as_deref() else {
        return Verdict::passed(format!("the user {name} is as wanted"));
    };
    let groups = seen.group.lines().map(fields).filter(|group| {
        let member = group.get(3).is_some_and(|members| members.split(',').any(|it| it == check.name));
        member || group.get(2) == Some(&entry[3])
    });
    let groups: Vec<String> = groups.filter_map(|group| group.into_iter().next()).collect();
    if groups.iter().any(|group| group == wanted) {
        return Verdict::passed(format!("the user {name} is in the group {}", clip(wanted)));
    }
    let groups = groups.join(", ");
    Verdict::failed(format!("the user {name} is in {}, wanted {}", clip(&groups), clip(wanted)))
}

/// `tables` are `/proc/<pid>/net/tcp` and `tcp6`, or `udp` and `udp6`, of the instance, one after the other.
pub fn port(check: &PortCheck, tables: &str) -> Verdict {
    let (port, protocol) = (check.port, check.protocol.as_str());
    let bound: Vec<_> = tables.lines().filter_map(|line| listening(line, check.protocol)).collect();
    let mut here: Vec<_> = bound.iter().filter(|place| place.port() == port).map(SocketAddr::ip).collect();
    here.sort();
    here.dedup();
    let places = here.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let matching = check.address.map_or(!here.is_empty(), |wanted| here.contains(&wanted));
    match (matching, check.absent) {
        (true, true) => Verdict::failed(format!(
            "something listens on {protocol} port {port} of {}, and must not",
            clip(&places)
        )),
        (false, true) => Verdict::passed(format!("nothing listens on {protocol} port {port}")),
        (true, false) => {
            Verdict::passed(format!("{protocol} port {port} of {} is listened on", clip(&places)))
        }
        (false, false) => match check.address {
            Some(wanted) if !here.is_empty() => Verdict::failed(format!(
                "{protocol} port {port} is listened on at {}, wanted {wanted}",
                clip(&places)
            )),
            _ => {
                let mut others: Vec<_> = bound.iter().map(SocketAddr::port).collect();
                others.sort_unstable();
                others.dedup();
                let others = others.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                let others = if others.is_empty() { "none" } else { &others };
                Verdict::failed(format!(
                    "nothing listens on {protocol} port {port}; those that are listened on: {}",
                    clip(others)
                ))
            }
        },
    }
}

/// The local address of a line `0: 0100007F:1F90 00000000:0000 0A …`, where something waits for others there.
fn listening(line: &str, protocol: Transport) -> Option<SocketAddr> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, _, state) = (fields.next()?, fields.next()?, fields.next()?);
    // TCP_LISTEN; a datagram socket that is bound and not connected has TCP_CLOSE.
    let waits = match protocol {
        Transport::Tcp => "0A",
        Transport::Udp => "07",
    };
    if state != waits {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    // Words of 32 bits that lie in memory as they go over the wire, printed as numbers of this machine.
    let words: Option<Vec<[u8; 4]>> = (0..address.len())
        .step_by(8)
        .map(|at| u32::from_str_radix(address.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes))
        .collect();
    let ip: IpAddr = match *words? {
        [word] => Ipv4Addr::from(word).into(),
        [a, b, c, d] => {
            let bytes: [u8; 16] = std::array::from_fn(|at| [a, b, c, d][at / 4][at % 4]);
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// One process of the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessSeen {
    /// As the kernel has it: at most 15 bytes, and a process can give itself another.
    pub name: String,
    /// What it was called with: the first word of its command line, without a folder. Empty for one that has ended.
    pub program: String,
    pub uid: u32,
    /// The user's name in the instance's own database, if it has one.
    pub user: Option<String>,
}

pub fn process(check: &ProcessCheck, seen: &[ProcessSeen]) -> Verdict {
    let name = clip(&check.name);
    let found: Vec<_> = seen.iter().filter(|it| it.name == check.name || it.program == check.name).collect();
    let count = found.len();
    if check.absent {
        return match count {
            0 => Verdict::passed(format!("no process {name} runs")),
            _ => Verdict::failed(format!("{count} of {name} run, and must not")),
        };
    }
    if count == 0 {
        let mut others: Vec<_> = seen.iter().map(|it| it.name.as_str()).collect();
        others.sort_unstable();
        others.dedup();
        let others = others.join(", ");
        return Verdict::failed(format!("no process {name} runs; those that do: {}", clip(&others)));
    }
    if let Some(wanted) = check.count.filter(|wanted| usize::try_from(*wanted) != Ok(count)) {
        return Verdict::failed(format!("{count} of {name} run, wanted {wanted}"));
    }
    if let Some(wanted) = check.user.as_deref() {
        let by_name_or_number =
            |it: &&&ProcessSeen| it.user.as_deref() == Some(wanted) || wanted.parse() == Ok(it.uid);
        if let Some(other) = found.iter().find(|it| !by_name_or_number(it)) {
            let user = other.user.as_deref().unwrap_or("no name");
            let (user, wanted) = (clip(user), clip(wanted));
            return Verdict::failed(format!("{name} runs as {user} ({}), wanted {wanted}", other.uid));
        }
    }
    Verdict::passed(format!("{count} of {name} run"))
}

/// Looks for what a log check wants, line by line, however long the log is.
#[derive(Debug)]
pub struct LogSearch<'a> {
    check: &'a LogCheck,
    finder: memchr::memmem::Finder<'a>,
    lines: u64,
    found: Option<String>,
}

impl<'a> LogSearch<'a> {
    pub fn new(check: &'a LogCheck) -> Self {
        Self { check, finder: memchr::memmem::Finder::new(&check.contains), lines: 0, found: None }
    }

    /// True where no further line can change the verdict.
    pub fn line(&mut self, line: &[u8]) -> bool {
        self.lines += 1;
        if self.found.is_none() && self.finder.find(line).is_some() {
            self.found = Some(String::from_utf8_lossy(line).into_owned());
        }
        self.found.is_some()
    }

    pub fn verdict(self) -> Verdict {
        let wanted = clip(&self.check.contains);
        match (self.found, self.check.absent) {
            (Some(line), false) => Verdict::passed(format!("the log has `{}`", clip(&line))),
            (Some(line), true) => Verdict::failed(format!("the log has `{}`, and must not", clip(&line))),
            (None, true) => Verdict::passed(format!("none of {} lines contains `{wanted}`", self.lines)),
            (None, false) => Verdict::failed(format!("none of {} lines contains `{wanted}`", self.lines)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "Package: curl\nStatus: install ok installed\nArchitecture: amd64\nVersion: 7.88.1-10\n\n\
        Package: vim\nStatus: deinstall ok config-files\nVersion: 2:9.0\n\n\
        Package: git\nStatus: install ok installed\nVersion: 1:2.39.5-0\nDescription: a\n Package: lie\n";

    #[test]
    fn a_package_is_judged_by_what_dpkg_says() {
        let judge = |name: &str, version: Option<&str>, absent| {
            let check = PackageCheck { name: name.to_owned(), version: version.map(str::to_owned), absent };
            let verdict = package(&check, STATUS);
            (verdict.passed, verdict.detail)
        };
        let cases = [
            ("curl", None, false, true, "curl 7.88.1-10 is installed"),
            ("curl", Some("7.88"), false, true, "curl 7.88.1-10 is installed"),
            ("curl", Some("7.8"), false, false, "curl has version 7.88.1-10, wanted 7.8"),
            ("git", Some("2.39"), false, true, "git 1:2.39.5-0 is installed"),
            ("git", Some("1:2.39.5-0"), false, true, "git 1:2.39.5-0 is installed"),
            ("curl", None, true, false, "curl 7.88.1-10 is installed, and must not be"),
            ("vim", None, false, false, "vim is not installed, but config-files"),
            ("vim", None, true, true, "vim is not installed"),
            ("lie", None, false, false, "lie is not installed"),
        ];
        for (name, version, absent, passes, detail) in cases {
            assert_eq!(judge(name, version, absent), (passes, detail.to_owned()));
        }
    }

    #[test]
    fn a_user_is_judged_by_all_that_is_wanted_of_it() {
        let seen = UsersSeen {
            passwd: "root:x:0:0:root:/root:/bin/bash\nwww:x:33:33:www:/var/www:/usr/sbin/nologin\nbroken:x\n",
            group: "root:x:0:\nwww:x:33:\nlog:x:44:other,www\n",
        };
        let judge = |change: fn(&mut UserCheck)| {
            let mut check = UserCheck {
                name: "www".to_owned(),
                uid: None,
                group: None,
                home: None,
                shell: None,
                absent: false,
            };
            change(&mut check);
            let verdict = user(&check, seen);
            (verdict.passed, verdict.detail)
        };
        assert!(judge(|_| {}).0);
        assert!(judge(|c| c.uid = Some(33)).0);
        assert_eq!(judge(|c| c.uid = Some(34)), (false, "the user www has uid 33, wanted 34".to_owned()));
        assert!(judge(|c| c.home = Some("/var/www".to_owned())).0);
        let shell = judge(|c| c.shell = Some("/bin/sh".to_owned()));
        assert_eq!(shell, (false, "the user www has shell /usr/sbin/nologin, wanted /bin/sh".to_owned()));
        assert!(judge(|c| c.group = Some("www".to_owned())).0, "its own");
        assert!(judge(|c| c.group = Some("log".to_owned())).0, "as a member");
        let group = judge(|c| c.group = Some("root".to_owned()));
        assert_eq!(group, (false, "the user www is in www, log, wanted root".to_owned()));
        assert!(!judge(|c| c.name = "broken".to_owned()).0);
        assert!(!judge(|c| c.absent = true).0);
        assert!(judge(|c| (c.name, c.absent) = ("nobody".to_owned(), true)).0);
    }

    #[test]
    fn a_port_is_judged_by_who_waits_there() {
        let tcp = "  sl  local_address rem_address   st tx_queue\n\
               0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n\
               1: 0100007F:1F91 0100007F:9999 01 00000000:00000000\n\
              0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0\n\
              1: 00:1 0 0A\n x\n";
        let judge = |port_, protocol, address: Option<&str>, absent| {
            let address = address.map(|address| address.parse().unwrap());
            let verdict = port(&PortCheck { port: port_, protocol, address, absent }, tcp);
            (verdict.passed, verdict.detail)
        };
        assert_eq!(judge(8080, Transport::Tcp, None, false).1, "tcp port 8080 of 127.0.0.1 is listened on");
        assert!(judge(80, Transport::Tcp, Some("::"), false).0);
        let elsewhere = judge(8080, Transport::Tcp, Some("0.0.0.0"), false);
        assert_eq!(
            elsewhere,
            (false, "tcp port 8080 is listened on at 127.0.0.1, wanted 0.0.0.0".to_owned())
        );
        let nobody = judge(8081, Transport::Tcp, None, false);
        let said = "nothing listens on tcp port 8081; those that are listened on: 80, 8080";
        assert_eq!(nobody, (false, said.to_owned()), "a connection of that port is no listener");
        assert!(judge(8081, Transport::Tcp, None, true).0);
        assert!(!judge(8080, Transport::Tcp, None, true).0);
        assert!(judge(8080, Transport::Tcp, Some("0.0.0.0"), true).0);
        assert!(!judge(8080, Transport::Udp, None, false).0);
        let udp = PortCheck { port: 53, protocol: Transport::Udp, address: None, absent: false };
        assert!(port(&udp, " 7: 00000000:0035 00000000:0000 07 0").passed);
    }

    #[test]
    fn processes_go_by_the_name_of_their_program() {
        let run = |name: &str, program: &str, uid, user: Option<&str>| ProcessSeen {
            name: name.to_owned(),
            program: program.to_owned(),
            uid,
            user: user.map(str::to_owned),
        };
        let seen = [
            run("nginx", "nginx:", 0, Some("root")),
            run("nginx", "nginx:", 33, Some("www-data")),
            run("a-name-that-is-", "a-name-that-is-long", 7, None),
        ];
        let judge = |name: &str, user: Option<&str>, count, absent| {
            let (name, user) = (name.to_owned(), user.map(str::to_owned));
            let verdict = process(&ProcessCheck { name, user, count, absent }, &seen);
            (verdict.passed, verdict.detail)
        };
        assert!(judge("nginx", None, None, false).0);
        assert!(judge("nginx", None, Some(2), false).0);
        assert_eq!(judge("nginx", None, Some(3), false).1, "2 of nginx run, wanted 3");
        let user = judge("nginx", Some("www-data"), None, false);
        assert_eq!(user, (false, "nginx runs as root (0), wanted www-data".to_owned()));
        assert!(judge("a-name-that-is-long", Some("7"), Some(1), false).0);
        assert!(!judge("nginx", None, None, true).0);
        assert!(judge("sshd", None, None, true).0);
        let none = judge("sshd", None, None, false);
        assert_eq!(none, (false, "no process sshd runs; those that do: a-name-that-is-, nginx".to_owned()));
    }

    #[test]
    fn a_log_is_searched_until_the_text_is_found() {
        let judge = |absent| {
            let check = LogCheck { contains: "ready".to_owned(), absent };
            let mut search = LogSearch::new(&check);
            let ended: Vec<bool> =
                [&b"starting"[..], b"\xff is ready", b"more"].map(|it| search.line(it)).into();
            (ended, search.verdict())
        };
        assert_eq!(
            judge(false),
            (vec![false, true, true], Verdict::passed("the log has `\u{fffd} is ready`"))
        );
        assert_eq!(judge(true).1, Verdict::failed("the log has `\u{fffd} is ready`, and must not"));
        let check = LogCheck { contains: "ready".to_owned(), absent: false };
        assert_eq!(LogSearch::new(&check).verdict(), Verdict::failed("none of 0 lines contains `ready`"));
    }
}
