use kiln_model::check::{Check, CheckResult, CommandCheck, FileCheck, HttpCheck, TcpCheck};

use super::{Invalid, from_duration, from_timestamp, non_empty, port, to_duration, to_timestamp};
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
        })
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
