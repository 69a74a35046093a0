//! One question to an instance, from what is written to what is meant.

use super::check::Checker;
use super::node::quoted;
use super::raw;
use super::read::At;
use crate::check::{
    Check, CommandCheck, FileCheck, HttpCheck, LogCheck, PackageCheck, PortCheck, ProcessCheck, TcpCheck,
    Transport, UserCheck,
};

impl Checker<'_> {
    pub(super) fn test(&mut self, test: At<raw::Check>) -> Check {
        let place = self.place(&test);
        let (check, contradiction) = match test.value {
            raw::Check::Http(check) => (http(check), None),
            raw::Check::Tcp(check) => (tcp(check), None),
            raw::Check::Command(check) => (command(check), None),
            raw::Check::Log(check) => (log(check), None),
            raw::Check::File(check) => {
                let more = check.mode.is_some() || check.owner.is_some() || check.contains.is_some();
                let what = quoted(&check.path.0).to_string();
                let wrong = (check.absent && more).then_some((what, "mode, owner and contains"));
                (file(check), wrong)
            }
            raw::Check::Package(check) => {
                let what = format!("the package {}", quoted(&check.name.0));
                let wrong = (check.absent && check.version.is_some()).then_some((what, "version"));
                (package(check), wrong)
            }
            raw::Check::User(check) => {
                let more = check.uid.is_some()
                    || check.group.is_some()
                    || check.home.is_some()
                    || check.shell.is_some();
                let what = format!("the user {}", quoted(&check.name.0));
                let wrong = (check.absent && more).then_some((what, "uid, group, home and shell"));
                (user(check), wrong)
            }
            raw::Check::Port(check) => (port(check), None),
            raw::Check::Process(check) => {
                let what = format!("the process {}", quoted(&check.name.0));
                let more = check.count.is_some() || check.user.is_some();
                let wrong = (check.absent && more).then_some((what, "user and count"));
                (process(check), wrong)
            }
        };
        if let Some((what, more)) = contradiction {
            let message = format!("{what} can't be absent and have properties");
            self.problem(place, message, format!("wanted `absent` alone, or without it {more}"));
        }
        check
    }
}

pub(super) fn http(raw: raw::HttpCheck) -> Check {
    Check::Http(HttpCheck {
        port: raw.port.number(),
        path: raw.path.0,
        status: raw.status.and_then(|status| u16::try_from(status.0).ok()),
        body: raw.body.map(|text| text.0),
    })
}

pub(super) fn tcp(raw: raw::TcpCheck) -> Check {
    Check::Tcp(TcpCheck { port: raw.port.number() })
}

pub(super) fn command(raw: raw::CommandCheck) -> Check {
    Check::Command(CommandCheck {
        run: raw.run.0,
        status: i32::try_from(raw.status.0).unwrap_or_default(),
        stdout: raw.stdout.map(|text| text.0),
    })
}

fn file(raw: raw::FileCheck) -> Check {
    Check::File(FileCheck {
        path: raw.path.0,
        mode: raw.mode.map(|mode| mode.0),
        owner: raw.owner.map(|owner| owner.0),
        contains: raw.contains.map(|text| text.0),
        absent: raw.absent,
    })
}

fn package(raw: raw::PackageCheck) -> Check {
    Check::Package(PackageCheck {
        name: raw.name.0,
        version: raw.version.map(|version| version.0),
        absent: raw.absent,
    })
}

fn user(raw: raw::UserCheck) -> Check {
    Check::User(UserCheck {
        name: raw.name.0,
        uid: raw.uid.map(|uid| uid.0),
        group: raw.group.map(|group| group.0),
        home: raw.home.map(|home| home.0),
        shell: raw.shell.map(|shell| shell.0),
        absent: raw.absent,
    })
}

fn port(raw: raw::PortCheck) -> Check {
    Check::Port(PortCheck {
        port: raw.port.number(),
        protocol: match raw.protocol {
            raw::Transport::Tcp => Transport::Tcp,
            raw::Transport::Udp => Transport::Udp,
        },
        address: raw.address.map(|address| address.0),
        absent: raw.absent,
    })
}

fn process(raw: raw::ProcessCheck) -> Check {
    Check::Process(ProcessCheck {
        name: raw.name.0,
        user: raw.user.map(|user| user.0),
        count: raw.count.map(|count| count.0),
        absent: raw.absent,
    })
}

fn log(raw: raw::LogCheck) -> Check {
    Check::Log(LogCheck { contains: raw.contains.0, absent: raw.absent })
}
