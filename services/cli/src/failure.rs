//! What went wrong, for a person and for a program: what failed, on what, why, what to do.

use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use serde::Serialize;
use tonic::{Code as GrpcCode, Status};
use tonic_types::StatusExt as _;

/// Exit codes; `kiln --help` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    Failed = 1,
    NotFound = 3,
    Refused = 4,
    Unavailable = 5,
    Invalid = 64,
    /// As a shell says of what Ctrl-C ended.
    Interrupted = 130,
}

impl Code {
    const fn word(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::NotFound => "not_found",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
            Self::Invalid => "invalid",
            Self::Interrupted => "interrupted",
        }
    }
}

pub(crate) type Outcome<T = ()> = Result<T, Failure>;

#[derive(Debug)]
pub(crate) enum Failure {
    Said(Box<Said>),
    /// Whoever read our output went away; there is nobody left to tell.
    ClosedPipe,
    /// What is wrong was printed already, as the command's own output.
    Shown(Code),
}

#[derive(Debug)]
pub(crate) struct Said {
    code: Code,
    /// A word for programs, such as `not_found` or `stale_release`.
    reason: String,
    what: String,
    why: String,
    todo: String,
    /// The same for programs, a piece for each thing that is wrong.
    violations: Vec<Violation>,
}

/// One thing that is wrong, and where: a field of the request, or a place in a file of a definition.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Violation {
    field: String,
    description: String,
    #[serde(flatten)]
    place: Option<Place>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Place {
    file: String,
    line: u32,
    column: u32,
}

impl Place {
    /// `web/server.yaml:3:5`
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.rsplitn(3, ':');
        let (column, line) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        Some(Self { file: parts.next()?.to_owned(), line, column })
    }
}

impl Failure {
    pub(crate) fn new(code: Code, what: impl Display, why: impl Display) -> Self {
        Self::Said(Box::new(Said {
            code,
            reason: code.word().to_owned(),
            what: what.to_string(),
            why: why.to_string(),
            todo: String::new(),
            violations: Vec::new(),
        }))
    }

    pub(crate) fn failed(what: impl Display, why: impl Display) -> Self {
        Self::new(Code::Failed, what, why)
    }

    pub(crate) fn todo(mut self, todo: impl Display) -> Self {
        if let Self::Said(said) = &mut self {
            said.todo = todo.to_string();
        }
        self
    }

    pub(crate) fn reason(mut self, reason: &str) -> Self {
        if let Self::Said(said) = &mut self {
            said.reason = reason.to_owned();
        }
        self
    }

    pub(crate) fn is_unavailable(&self) -> bool {
        matches!(self, Self::Said(said) if said.code == Code::Unavailable)
    }

    pub(crate) fn is_invalid(&self) -> bool {
        matches!(self, Self::Said(said) if said.code == Code::Invalid)
    }

    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Said(said) if said.code == Code::NotFound)
    }

    /// One line: what failed and why.
    pub(crate) fn line(&self) -> String {
        match self {
            Self::Said(said) => join(&said.what, &said.why),
            Self::ClosedPipe => "the output was closed".to_owned(),
            Self::Shown(code) => code.word().to_owned(),
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Said(said) => ExitCode::from(said.code as u8),
            Self::ClosedPipe => ExitCode::SUCCESS,
            Self::Shown(code) => ExitCode::from(*code as u8),
        }
    }

    /// As it goes to standard error; nothing where it was shown already.
    pub(crate) fn render(&self, json: bool) -> Option<String> {
        let Self::Said(said) = self else { return None };
        if json {
            let document = serde_json::json!({
                "error": {
                    "code": said.code as u8,
                    "reason": said.reason,
                    "message": said.what,
                    "why": said.why,
                    "what_to_do": said.todo,
                    "violations": said.violations,
                }
            });
            return Some(document.to_string());
        }
        let mut text = format!("error: {}", join(&said.what, &said.why));
        if !said.todo.is_empty() {
            text.push_str(&format!("\n   do: {}", said.todo));
        }
        Some(text)
    }
}

fn join(what: &str, why: &str) -> String {
    if why.is_empty() { what.to_owned() } else { format!("{what}: {why}") }
}

/// Names what was being done when a call, a file operation or a conversion failed.
pub(crate) trait During<T> {
    fn during(self, what: impl Display) -> Outcome<T>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl Display) -> Outcome<T> {
        self.map_err(|error| {
            let failure = Failure::failed(what, &error);
            if error.kind() == io::ErrorKind::PermissionDenied {
                failure.reason("permission_denied").todo("run it as root: sudo kiln …")
            } else {
                failure
            }
        })
    }
}

impl<T> During<T> for Result<T, Status> {
    fn during(self, what: impl Display) -> Outcome<T> {
        self.map_err(|status| of_status(what, &status))
    }
}

fn of_status(what: impl Display, status: &Status) -> Failure {
    let code = match status.code() {
        GrpcCode::NotFound => Code::NotFound,
        GrpcCode::FailedPrecondition
        | GrpcCode::AlreadyExists
        | GrpcCode::Aborted
        | GrpcCode::PermissionDenied
        | GrpcCode::Unauthenticated
        | GrpcCode::ResourceExhausted => Code::Refused,
        GrpcCode::Unavailable | GrpcCode::DeadlineExceeded => Code::Unavailable,
        GrpcCode::InvalidArgument | GrpcCode::OutOfRange => Code::Invalid,
        _ => Code::Failed,
    };
    if let Some(why) = tls_refusal(status) {
        return Failure::new(Code::Refused, what, why)
            .reason("tls")
            .todo("kiln login, with a certificate that is good and the site's authority.pem");
    }
    let details = status.get_error_details();
    let mut why = status.message().trim().to_owned();
    let mut todo = details.localized_message().map(|it| it.message.clone()).unwrap_or_default();
    let of_fields = details
        .bad_request()
        .into_iter()
        .flat_map(|bad| &bad.field_violations)
        .map(|violation| (violation.field.as_str(), violation.description.as_str()));
    let of_states = details
        .precondition_failure()
        .into_iter()
        .flat_map(|failed| &failed.violations)
        .map(|violation| (violation.subject.as_str(), violation.description.as_str()));
    let mut violations = Vec::new();
    for (field, description) in of_fields.chain(of_states) {
        violations.push(Violation {
            field: field.to_owned(),
            description: description.to_owned(),
            place: Place::parse(field),
        });
        // Services put the first violation into the message as well; it is not said twice.
        if !description.is_empty() && !why.contains(description) && !todo.contains(description) {
            why.push_str(&if field.is_empty() {
                format!("\n  {description}")
            } else {
                format!("\n  {field}: {description}")
            });
        }
    }
    if code == Code::Unavailable && details.error_info().is_none() {
        // The transport's own words are for developers; that a service is away is the rule.
        "the service does not answer".clone_into(&mut why);
    }
    if todo.is_empty() && code == Code::Unavailable {
        "kiln up, which starts what does not run".clone_into(&mut todo);
    }
    let mut failure = Failure::new(code, what, why).todo(todo);
    if let Failure::Said(said) = &mut failure {
        said.violations = violations;
    }
    match details.error_info() {
        Some(info) if !info.reason.is_empty() => failure.reason(&info.reason.to_lowercase()),
        _ => failure,
    }
}

/// Why one end did not believe the other's certificate, where that is what happened: no service is away then.
fn tls_refusal(status: &Status) -> Option<String> {
    let chain = kiln_service::error::chain(status);
    for (mark, whose) in [
        (
            "received fatal alert: CertificateRequired",
            "the site has no tokens, and takes nobody without a certificate",
        ),
        ("received fatal alert", "the service does not take this certificate"),
        ("invalid peer certificate", "the service's certificate is not to be trusted"),
        (" answers where the ", "the wrong service"),
    ] {
        if let Some(at) = chain.find(mark) {
            let words = chain[at..].split('"').next().unwrap_or_default();
            return Some(format!("{whose}: {}", words.trim()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn a_status_becomes_an_exit_code_with_its_details() {
        let mut details = ErrorDetails::new();
        details.set_error_info("STALE_RELEASE", "kiln", std::collections::HashMap::new());
        details.set_localized_message("en", "run `kiln status web` and try again");
        let status = Status::with_error_details(GrpcCode::FailedPrecondition, "web is at r3", details);
        let failure = Err::<(), _>(status).during("rolling web back").unwrap_err();
        assert_eq!(failure.exit_code(), ExitCode::from(4));
        assert_eq!(
            failure.render(true).unwrap(),
            r#"{"error":{"code":4,"message":"rolling web back","reason":"stale_release","violations":[],"what_to_do":"run `kiln status web` and try again","why":"web is at r3"}}"#
        );
        let text = failure.render(false).unwrap();
        assert_eq!(text, "error: rolling web back: web is at r3\n   do: run `kiln status web` and try again");
    }

    #[test]
    fn programs_are_told_the_place_of_each_fault() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("web/server.yaml:3:5", "unknown key `form`");
        details.add_bad_request_violation("source.git", "is missing");
        let status = Status::with_error_details(GrpcCode::InvalidArgument, "2 faults", details);
        let failure = Err::<(), _>(status).during("applying web").unwrap_err();
        assert_eq!(failure.exit_code(), ExitCode::from(64));
        let document: serde_json::Value = serde_json::from_str(&failure.render(true).unwrap()).unwrap();
        assert_eq!(
            document["error"]["violations"],
            serde_json::json!([
                {
                    "field": "web/server.yaml:3:5",
                    "description": "unknown key `form`",
                    "file": "web/server.yaml",
                    "line": 3,
                    "column": 5,
                },
                { "field": "source.git", "description": "is missing" },
            ])
        );
    }

    #[test]
    fn a_certificate_that_is_not_believed_is_no_service_that_is_away() {
        let of = |words: &str| Status::from_error(Box::new(std::io::Error::other(words.to_owned())));
        for (words, why) in [
            ("received fatal alert: CertificateExpired", "does not take this certificate"),
            ("received fatal alert: CertificateRequired", "the site has no tokens"),
            (
                "invalid peer certificate: UnknownIssuer",
                "not to be trusted: invalid peer certificate: UnknownIssuer",
            ),
            ("node answers where the monitor should", "the wrong service"),
        ] {
            let failure = Err::<(), _>(of(words)).during("listing the servers").unwrap_err();
            assert_eq!(failure.exit_code(), ExitCode::from(4));
            assert!(failure.line().contains(why), "{}", failure.line());
        }
        let away = Err::<(), _>(Status::unavailable("tcp connect error")).during("listing").unwrap_err();
        assert_eq!(away.exit_code(), ExitCode::from(5));
    }

    #[test]
    fn a_closed_pipe_says_nothing_and_is_no_failure() {
        assert!(Failure::ClosedPipe.render(false).is_none());
        assert_eq!(Failure::ClosedPipe.exit_code(), ExitCode::SUCCESS);
    }
}
