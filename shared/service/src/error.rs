//! Errors of the API: what failed, on what, why and what to do, as `google.rpc` details; and back into words.

use std::error::Error as StdError;
use std::time::Duration;

use kiln_api::convert::Invalid;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Names the details as Kiln's.
const DOMAIN: &str = "kiln";
const RETRY: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The request itself is wrong.
    #[error("{field}: {why}")]
    Invalid { field: String, why: String, what_to_do: String },
    #[error("there is no {what} `{id}`")]
    NotFound { what: &'static str, id: String },
    /// It exists, and is another one than was asked for.
    #[error("{what} `{id}` exists: {why}")]
    AlreadyExists { what: &'static str, id: String, why: String },
    /// What the caller expects is no longer so, or somebody else is changing it: look again, and decide anew.
    #[error("{0}")]
    Conflict(String),
    /// Not in this state of things.
    #[error("{reason}")]
    Precondition { reason: String, what_to_do: String },
    /// Nobody that the site knows.
    #[error("{reason}")]
    UnknownCaller { reason: String, what_to_do: String },
    /// Known, and not in a role that may.
    #[error("{reason}")]
    Denied { reason: String, what_to_do: String },
    /// Too much at once. Trying again is safe, a while later.
    #[error("{reason}")]
    Exhausted { reason: String, what_to_do: String },
    /// A store or a peer is away. Trying again is safe.
    #[error("{0}")]
    Unavailable(String),
    /// What is no part of Kiln is away: a repository, an archive. Trying again is safe.
    #[error("{reason}")]
    OutsideAway { reason: String, what_to_do: String },
    /// A defect of Kiln. The text is the whole chain of errors.
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    pub fn invalid(field: impl Into<String>, why: impl Into<String>, what_to_do: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), why: why.into(), what_to_do: what_to_do.into() }
    }

    pub fn not_found(what: &'static str, id: impl Into<String>) -> Self {
        Self::NotFound { what, id: id.into() }
    }

    pub fn precondition(reason: impl Into<String>, what_to_do: impl Into<String>) -> Self {
        Self::Precondition { reason: reason.into(), what_to_do: what_to_do.into() }
    }

    pub(crate) fn unknown_caller(reason: impl Into<String>, what_to_do: impl Into<String>) -> Self {
        Self::UnknownCaller { reason: reason.into(), what_to_do: what_to_do.into() }
    }

    pub fn internal(error: &(dyn StdError + 'static)) -> Self {
        Self::Internal(chain(error))
    }
}

/// An error with all its causes, on one line.
pub fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their cause in their own text.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

impl From<Invalid> for ApiError {
    fn from(Invalid { field, reason }: Invalid) -> Self {
        let what_to_do =
            format!("give another `{field}`; `kiln.*.v1` in the `proto` folder says what it can be");
        Self::Invalid { field, why: reason, what_to_do }
    }
}

impl From<kiln_store::Error> for ApiError {
    fn from(error: kiln_store::Error) -> Self {
        use kiln_store::Error as E;
        match error {
            E::Conflict { .. } | E::Stale { .. } | E::Answered(_) => Self::Conflict(error.to_string()),
            E::BadPageToken(token) => Self::Invalid {
                field: "options.page_token".to_owned(),
                why: format!("`{token}` is not one that this service gave"),
                what_to_do: "begin the list anew, without a page token".to_owned(),
            },
            E::Unavailable { .. } => Self::Unavailable(error.to_string()),
            E::Schema { .. } | E::Unreadable { .. } => Self::Internal(error.to_string()),
        }
    }
}

impl From<kiln_bus::Error> for ApiError {
    fn from(error: kiln_bus::Error) -> Self {
        use kiln_bus::Error as E;
        match error {
            E::Unavailable { .. } => Self::Unavailable(error.to_string()),
            E::Undecodable { .. } | E::Unsuitable { .. } => Self::Internal(error.to_string()),
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let message = error.to_string();
        let mut details = ErrorDetails::new();
        let advise = |details: &mut ErrorDetails, what_to_do: String| {
            if !what_to_do.is_empty() {
                details.set_localized_message("en", what_to_do);
            }
        };
        let (code, reason) = match error {
            ApiError::Invalid { field, why, what_to_do } => {
                details.add_bad_request_violation(field, why);
                advise(&mut details, what_to_do);
                (Code::InvalidArgument, "INVALID")
            }
            ApiError::NotFound { what, id } => {
                if what == "server" {
                    advise(&mut details, "`kiln status` lists the servers".to_owned());
                }
                details.set_resource_info(what, id, "", &message);
                (Code::NotFound, "NOT_FOUND")
            }
            ApiError::AlreadyExists { what, id, why } => {
                details.set_resource_info(what, id, "", why);
                (Code::AlreadyExists, "ALREADY_EXISTS")
            }
            ApiError::Conflict(_) => {
                advise(
                    &mut details,
                    "look at it again, then repeat the call with a new request id".to_owned(),
                );
                (Code::Aborted, "CONFLICT")
            }
            ApiError::Precondition { reason, what_to_do } => {
                details.add_precondition_failure_violation("STATE", "", reason);
                advise(&mut details, what_to_do);
                (Code::FailedPrecondition, "PRECONDITION")
            }
            ApiError::UnknownCaller { reason: _, what_to_do } => {
                advise(&mut details, what_to_do);
                (Code::Unauthenticated, "UNKNOWN_CALLER")
            }
            ApiError::Denied { reason: _, what_to_do } => {
                advise(&mut details, what_to_do);
                (Code::PermissionDenied, "DENIED")
            }
            ApiError::Exhausted { reason, what_to_do } => {
                details.add_quota_failure_violation("", reason);
                details.set_retry_info(Some(RETRY));
                advise(&mut details, what_to_do);
                (Code::ResourceExhausted, "EXHAUSTED")
            }
            ApiError::Unavailable(_) => {
                details.set_retry_info(Some(RETRY));
                (Code::Unavailable, "UNAVAILABLE")
            }
            ApiError::OutsideAway { reason: _, what_to_do } => {
                details.set_retry_info(Some(RETRY));
                advise(&mut details, what_to_do);
                (Code::Unavailable, "OUTSIDE_AWAY")
            }
            ApiError::Internal(chain) => {
                tracing::error!(error = %chain, "an API call failed by a defect");
                (Code::Internal, "INTERNAL")
            }
        };
        details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
        Self::with_error_details(code, message, details)
    }
}

/// A status in words for people: what failed, and what to do.
pub fn describe(status: &Status) -> String {
    let details = status.get_error_details();
    let mut text = match (status.message(), status.code()) {
        ("", code) => code.description().to_owned(),
        // The transport's own words are for developers; a service that is away is the rule.
        (message, Code::Unavailable) if details.error_info().is_none() => {
            format!(
                "the service can't be reached ({message}); `kiln status` shows what runs, `kiln up` starts it"
            )
        }
        (message, _) => message.to_owned(),
    };
    if let Some(message) = details.localized_message() {
        text = format!("{text}; {}", message.message);
    }
    if details.retry_info().is_some() {
        text.push_str("; try again");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_field_reason_and_advice() {
        let status: Status = ApiError::invalid("server", "`We b` is not a name", "use a-z, 0-9, `-`").into();
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "server");
        assert_eq!(details.error_info().unwrap().domain, "kiln");
        assert_eq!(describe(&status), "server: `We b` is not a name; use a-z, 0-9, `-`");
    }

    #[test]
    fn what_may_be_tried_again_says_so() {
        let status: Status = ApiError::Unavailable("the broker is away".to_owned()).into();
        assert_eq!(describe(&status), "the broker is away; try again");
        assert!(describe(&Status::unavailable("tcp connect error")).contains("kiln up"));
    }

    #[test]
    fn a_chain_names_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("building failed")]
        struct Outer(#[source] std::io::Error);
        assert_eq!(chain(&Outer(std::io::Error::other("disk full"))), "building failed: disk full");
    }
}
