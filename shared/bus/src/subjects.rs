//! The one place that makes subjects and names of streams. All parts are checked names or texts of this program, so
//! none can hold a wildcard.

use kiln_model::event::Service;
use kiln_model::name::SiteName;

use crate::Interest;

/// The events that a service is given. They stand here, as the admin makes the consumers: whoever may make one may have
/// its messages sent to any subject.
pub const fn interests(service: Service) -> &'static [Interest] {
    use Service as S;
    match service {
        S::Builder => &[
            Interest { service: S::Monitor, entity: "server" },
            Interest { service: S::Deployer, entity: "rollout" },
        ],
        S::Deployer => &[
            Interest { service: S::Builder, entity: "revision" },
            Interest { service: S::Monitor, entity: "instance" },
            Interest { service: S::Monitor, entity: "server" },
        ],
        S::Monitor => &[
            Interest { service: S::Deployer, entity: "instance" },
            Interest { service: S::Builder, entity: "definition" },
            Interest { service: S::Builder, entity: "revision" },
            Interest { service: S::Builder, entity: "plan" },
        ],
        S::Node => &[],
    }
}

/// The three streams of a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Events,
    Reports,
    DeadLetters,
}

impl Stream {
    pub(crate) const ALL: [Self; 3] = [Self::Events, Self::Reports, Self::DeadLetters];

    /// `KILN_HOME`. Site names are labels, so upper case and `-` keep them apart.
    pub(crate) fn name(self, site: &SiteName) -> String {
        let site = site.as_str().to_ascii_uppercase();
        match self {
            Self::Events => format!("KILN_{site}"),
            Self::Reports => format!("KILN_IN_{site}"),
            Self::DeadLetters => format!("KILN_DEAD_{site}"),
        }
    }

    pub(crate) fn subjects(self, site: &SiteName) -> String {
        match self {
            Self::Events => format!("kiln.v1.{site}.>"),
            Self::Reports => report_filter(site),
            Self::DeadLetters => format!("kiln.dead.v1.{site}.>"),
        }
    }
}

pub(crate) fn report_filter(site: &SiteName) -> String {
    format!("kiln.in.v1.{site}.>")
}

pub(crate) fn filters(site: &SiteName, interests: &[Interest]) -> Vec<String> {
    let filter = |Interest { service, entity }: &Interest| format!("kiln.v1.{site}.{service}.{entity}.>");
    interests.iter().map(filter).collect()
}

/// Where a message that `durable` could not handle goes: what it was about, behind who failed.
pub(crate) fn dead_letter(site: &SiteName, durable: &str, subject: &str) -> String {
    let about = [format!("kiln.v1.{site}."), format!("kiln.in.v1.{site}.")]
        .iter()
        .find_map(|prefix| subject.strip_prefix(prefix.as_str()))
        .unwrap_or("_");
    format!("kiln.dead.v1.{site}.{durable}.{about}")
}

/// Whether a filter with `*` and `>` takes a subject.
pub(crate) fn matches(filter: &str, subject: &str) -> bool {
    let mut subject = subject.split('.');
    for wanted in filter.split('.') {
        match (wanted, subject.next()) {
            (">", found) => return found.is_some(),
            ("*", Some(_)) => {}
            (wanted, Some(found)) if wanted == found => {}
            _ => return false,
        }
    }
    subject.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_take_what_nats_would() {
        let takes = [("a.>", "a.b"), ("a.>", "a.b.c"), ("a.*.c", "a.b.c"), ("a.b", "a.b"), (">", "a")];
        for (filter, subject) in takes {
            assert!(matches(filter, subject), "{filter} {subject}");
        }
        for (filter, subject) in
            [("a.>", "a"), ("a.*", "a.b.c"), ("a.b", "a.c"), ("a.b.c", "a.b"), ("a.*.c", "a.c")]
        {
            assert!(!matches(filter, subject), "{filter} {subject}");
        }
    }

    #[test]
    fn a_dead_letter_names_who_failed_and_on_what() {
        let site = "home".parse().unwrap();
        assert_eq!(
            dead_letter(&site, "deployer", "kiln.v1.home.builder.build.failed.web"),
            "kiln.dead.v1.home.deployer.builder.build.failed.web"
        );
        assert_eq!(
            dead_letter(&site, "monitor", "kiln.in.v1.home.report"),
            "kiln.dead.v1.home.monitor.report"
        );
    }
}
