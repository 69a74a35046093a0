//! Which role each method takes. What has no row here is refused to everybody.

use super::caller::{Caller, Role};
use crate::error::ApiError;

/// The page of a service's metrics, beside the methods.
pub const METRICS: &str = "/metrics";

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// As in the path of a call: `/kiln.builder.v1.BuilderService/Apply`.
    pub method: &'static str,
    /// The least role of people that may; none may where there is none.
    pub people: Option<Role>,
    pub services: &'static [Role],
    /// A call changes something rather than looks: it has an id of its own, and leaves an audit record.
    pub changes: bool,
}

impl Row {
    const fn that_changes(self) -> Self {
        Self { changes: true, ..self }
    }

    pub fn takes(&self, role: Role) -> bool {
        if role.is_person() {
            self.people.is_some_and(|least| role >= least)
        } else {
            self.services.contains(&role)
        }
    }

    /// The roles in words: `admin`, or `viewer and up, console`.
    fn roles(&self) -> String {
        let people = self.people.map(|role| match role {
            Role::Admin => role.to_string(),
            least => format!("{least} and up"),
        });
        let services = self.services.iter().map(ToString::to_string);
        people.into_iter().chain(services).collect::<Vec<_>>().join(", ")
    }
}

const fn of(method: &'static str, people: Role, services: &'static [Role]) -> Row {
    Row { method, people: Some(people), services, changes: false }
}

/// For services alone: people reach the same end through the service that decides it.
const fn inner(method: &'static str, services: &'static [Role]) -> Row {
    Row { method, people: None, services, changes: false }
}

use Role::{Admin, Builder, Console, Deployer, Monitor, Node, Operator, Viewer};

const SERVICES: &[Role] = &[Builder, Deployer, Monitor, Node, Console];

/// Looking is for viewers. What changes a fleet, or fetches from where it is told, is for operators; what gives up what
/// can't be had again, for admins. What is only right as a step of a rollout is for the service that plans it.
pub const TABLE: &[Row] = &[
    of("/kiln.builder.v1.BuilderService/Apply", Operator, &[]).that_changes(),
    of("/kiln.builder.v1.BuilderService/Remove", Admin, &[]).that_changes(),
    of("/kiln.builder.v1.BuilderService/InspectSource", Operator, &[Monitor]),
    of("/kiln.builder.v1.BuilderService/Plan", Operator, &[Monitor]),
    of("/kiln.builder.v1.BuilderService/Build", Operator, &[]).that_changes(),
    of("/kiln.builder.v1.BuilderService/CancelBuild", Operator, &[]).that_changes(),
    of("/kiln.builder.v1.BuilderService/GetBuild", Viewer, &[Console]),
    of("/kiln.builder.v1.BuilderService/ListBuilds", Viewer, &[Console]),
    of("/kiln.builder.v1.BuilderService/WatchBuild", Viewer, &[Console]),
    of("/kiln.builder.v1.BuilderService/GetServer", Viewer, &[Console]),
    of("/kiln.builder.v1.BuilderService/ListServers", Viewer, &[Monitor, Console]),
    of("/kiln.builder.v1.BuilderService/ListSources", Viewer, &[Monitor, Console]),
    of("/kiln.builder.v1.BuilderService/ListRevisions", Viewer, &[Deployer, Console]),
    of("/kiln.builder.v1.BuilderService/GetImage", Viewer, &[Console]),
    of("/kiln.builder.v1.BuilderService/ExportImage", Viewer, &[]),
    of("/kiln.builder.v1.BuilderService/ReadDocument", Viewer, &[Console]),
    of("/kiln.builder.v1.BuilderService/CompareImages", Viewer, &[Console]),
    of("/kiln.builder.v1.BuilderService/Collect", Operator, &[]).that_changes(),
    inner("/kiln.builder.v1.BuilderService/Hold", &[Deployer]).that_changes(),
    of("/kiln.deployer.v1.DeployerService/Rollback", Operator, &[]).that_changes(),
    of("/kiln.deployer.v1.DeployerService/AbortRollout", Operator, &[]).that_changes(),
    of("/kiln.deployer.v1.DeployerService/GetFleet", Viewer, &[Console]),
    of("/kiln.deployer.v1.DeployerService/ListFleets", Viewer, &[Builder, Console]),
    of("/kiln.deployer.v1.DeployerService/WatchFleet", Viewer, &[Console]),
    of("/kiln.deployer.v1.DeployerService/ListReleases", Viewer, &[Builder, Console]),
    of("/kiln.deployer.v1.DeployerService/ListRollouts", Viewer, &[Console]),
    of("/kiln.deployer.v1.DeployerService/ListInstances", Viewer, &[Monitor, Console]),
    of("/kiln.monitor.v1.MonitorService/ReportSignal", Operator, &[]).that_changes(),
    of("/kiln.monitor.v1.MonitorService/ApproveSignal", Operator, &[]).that_changes(),
    of("/kiln.monitor.v1.MonitorService/ListSignals", Viewer, &[Builder, Deployer, Console]),
    of("/kiln.monitor.v1.MonitorService/ListHealth", Viewer, &[Deployer, Console]),
    // The other replicas hear what one sees.
    of("/kiln.monitor.v1.MonitorService/GetServerStatus", Viewer, &[Monitor, Console]),
    of("/kiln.monitor.v1.MonitorService/WatchHealth", Viewer, &[Deployer, Monitor, Console]),
    inner("/kiln.engine.v1.EngineService/Launch", &[Builder, Deployer]).that_changes(),
    inner("/kiln.engine.v1.EngineService/Retire", &[Builder, Deployer]).that_changes(),
    inner("/kiln.engine.v1.EngineService/Route", &[Deployer]).that_changes(),
    of("/kiln.engine.v1.EngineService/ListInstances", Viewer, &[Builder, Deployer, Monitor, Console]),
    of("/kiln.engine.v1.EngineService/WatchInstances", Viewer, &[Deployer, Monitor, Console]),
    // A check can be a command that runs inside of an instance.
    inner("/kiln.engine.v1.EngineService/Check", &[Builder, Deployer, Monitor]),
    inner("/kiln.engine.v1.EngineService/Verify", &[Deployer]),
    of("/kiln.engine.v1.EngineService/Logs", Viewer, &[Builder, Deployer, Console]),
    of("/kiln.audit.v1.AuditService/ListRecords", Operator, &[]),
    of("/kiln.audit.v1.AuditService/CheckSeals", Operator, &[]),
    of("/grpc.health.v1.Health/Check", Viewer, SERVICES),
    of("/grpc.health.v1.Health/Watch", Viewer, SERVICES),
    of("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Viewer, &[]),
    of(METRICS, Viewer, &[Console]),
];

pub fn row(method: &str) -> Option<&'static Row> {
    TABLE.iter().find(|row| row.method == method)
}

/// # Errors
/// [`ApiError::Denied`] says who, the method and the roles that would do.
pub(super) fn check(caller: &Caller, method: &str) -> Result<(), ApiError> {
    // Whoever asks for it: a text of any length.
    let shown: String = method.trim_start_matches('/').chars().take(120).collect();
    let Some(row) = row(method) else {
        return Err(ApiError::Denied {
            reason: format!("{caller} may not call {shown}: the table of roles has no such method"),
            what_to_do: "call a method that the reflection lists".to_owned(),
        });
    };
    if caller.role().is_none_or(|role| row.takes(role)) {
        return Ok(());
    }
    Err(ApiError::Denied {
        reason: format!("{caller} may not call {shown}: it takes the role {}", row.roles()),
        what_to_do: "ask an admin of the site for a certificate or a token with such a role".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_method_has_one_row() {
        let methods: BTreeSet<_> = TABLE.iter().map(|row| row.method).collect();
        assert_eq!(methods.len(), TABLE.len());
    }

    #[test]
    fn people_of_a_higher_role_may_what_those_of_a_lower_may() {
        for row in TABLE {
            assert!(!row.takes(Viewer) || row.takes(Operator), "{row:?}");
            assert!(!row.takes(Operator) || row.takes(Admin), "{row:?}");
            assert!(row.services.iter().all(|role| !role.is_person()), "{row:?}");
        }
    }

    #[test]
    fn a_refusal_says_who_what_and_which_role_would_do() {
        let ada = Caller::by_token(&"ada".parse().unwrap(), Viewer);
        let refused = check(&ada, "/kiln.builder.v1.BuilderService/Remove").unwrap_err().to_string();
        assert_eq!(
            refused,
            "ada (viewer, by token) may not call kiln.builder.v1.BuilderService/Remove: it takes the role admin"
        );
        let refused = check(&ada, "/kiln.engine.v1.EngineService/Launch").unwrap_err().to_string();
        assert!(refused.ends_with("it takes the role builder, deployer"), "{refused}");
        let refused = check(&ada, &format!("/{}", "x".repeat(10_000))).unwrap_err().to_string();
        assert!(refused.len() < 300, "{refused}");
        // Also to whoever has every role.
        assert!(check(&Caller::local("root", 1), "/kiln.builder.v1.BuilderService/Nothing").is_err());
    }
}
