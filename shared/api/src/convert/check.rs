use kiln_model::check::{
    Check, CheckResult, CommandCheck, FileCheck, HttpCheck, LogCheck, PackageCheck, PortCheck, ProcessCheck,
    TcpCheck, Transport, UserCheck,
};

use super::{
    Invalid, enumeration, from_duration, from_timestamp, non_empty, optional_text, port, to_duration,
    to_timestamp,
};
use crate::types;
use crate::types::check::Kind;

impl From<Check> for types::Check {
    fn from(check: Check) -> Self {
        let kind = match check {
            Check::Http(http) => Kind::Http(types::HttpCheck {
                port: http.port.into(),
                path: http.path,
                status: http.status.unwrap_or_default().into(),
                body: http.body.unwrap_or_default(),
            }),
            Check::Tcp(tcp) => Kind::Tcp(types::TcpCheck { port: tcp.port.into() }),
            Check::Command(command) => Kind::Command(types::CommandCheck {
                run: command.run,
                status: command.status,
                stdout: command.stdout.unwrap_or_default(),
            }),
            Check::File(file) => Kind::File(types::FileCheck {
                path: file.path,
                mode: file.mode.unwrap_or_default(),
                owner: file.owner.unwrap_or_default(),
                contains: file.contains.unwrap_or_default(),
                absent: file.absent,
            }),
            Check::Package(package) => Kind::Package(types::PackageCheck {
                name: package.name,
                version: package.version.unwrap_or_default(),
                absent: package.absent,
            }),
            Check::User(user) => Kind::User(types::UserCheck {
                name: user.name,
                uid: user.uid,
                group: user.group.unwrap_or_default(),
                home: user.home.unwrap_or_default(),
                shell: user.shell.unwrap_or_default(),
                absent: user.absent,
            }),
            Check::Port(port) => Kind::Port(types::PortCheck {
                port: port.port.into(),
                protocol: types::Transport::from(port.protocol).into(),
                address: port.address.map(|address| address.to_string()).unwrap_or_default(),
                absent: port.absent,
            }),
            Check::Process(process) => Kind::Process(types::ProcessCheck {
                name: process.name,
                user: process.user.unwrap_or_default(),
                count: process.count.unwrap_or_default(),
                absent: process.absent,
            }),
            Check::Log(log) => Kind::Log(types::LogCheck { contains: log.contains, absent: log.absent }),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<types::Check> for Check {
    type Error = Invalid;

    fn try_from(check: types::Check) -> Result<Self, Invalid> {
        Ok(match check.kind.ok_or_else(|| Invalid::new("kind", "is missing"))? {
            Kind::Http(http) => Self::Http(HttpCheck {
                port: port("http.port", http.port)?,
                path: http.path,
                status: match http.status {
                    0 => None,
                    status => Some(u16::try_from(status).map_err(|_| {
                        Invalid::new("http.status", format!("is {status}, wanted 100 to 599"))
                    })?),
                },
                body: non_empty(http.body),
            }),
            Kind::Tcp(tcp) => Self::Tcp(TcpCheck { port: port("tcp.port", tcp.port)? }),
            Kind::Command(command) => Self::Command(CommandCheck {
                run: command.run,
                status: command.status,
                stdout: non_empty(command.stdout),
            }),
            Kind::File(file) => Self::File(FileCheck {
                path: file.path,
                mode: non_empty(file.mode),
                owner: non_empty(file.owner),
                contains: non_empty(file.contains),
                absent: file.absent,
            }),
            Kind::Package(package) => Self::Package(PackageCheck {
                name: package.name,
                version: non_empty(package.version),
                absent: package.absent,
            }),
            Kind::User(user) => Self::User(UserCheck {
                name: user.name,
                uid: user.uid,
                group: non_empty(user.group),
                home: non_empty(user.home),
                shell: non_empty(user.shell),
                absent: user.absent,
            }),
            Kind::Port(check) => Self::Port(PortCheck {
                port: port("port.port", check.port)?,
                protocol: enumeration::<types::Transport, _>("port.protocol", check.protocol)?,
                address: optional_text("port.address", &check.address)?,
                absent: check.absent,
            }),
            Kind::Process(process) => Self::Process(ProcessCheck {
                name: process.name,
                user: non_empty(process.user),
                count: (process.count > 0).then_some(process.count),
                absent: process.absent,
            }),
            Kind::Log(log) => Self::Log(LogCheck { contains: log.contains, absent: log.absent }),
        })
    }
}

impl From<Transport> for types::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Self::Tcp,
            Transport::Udp => Self::Udp,
        }
    }
}

impl TryFrom<types::Transport> for Transport {
    type Error = Invalid;

    fn try_from(transport: types::Transport) -> Result<Self, Invalid> {
        match transport {
            types::Transport::Tcp => Ok(Self::Tcp),
            types::Transport::Udp => Ok(Self::Udp),
            types::Transport::Unspecified => Err(Invalid::new("protocol", "is not said")),
        }
    }
}

impl From<CheckResult> for types::CheckResult {
    fn from(result: CheckResult) -> Self {
        Self {
            passed: result.passed,
            detail: result.detail,
            took: Some(to_duration(result.took)),
            time: Some(to_timestamp(result.time)),
        }
    }
}

impl TryFrom<types::CheckResult> for CheckResult {
    type Error = Invalid;

    fn try_from(result: types::CheckResult) -> Result<Self, Invalid> {
        Ok(Self {
            passed: result.passed,
            detail: result.detail,
            took: from_duration("took", result.took)?,
            time: from_timestamp("time", result.time)?,
        })
    }
}
