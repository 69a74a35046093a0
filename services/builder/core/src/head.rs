//! Taking definitions over from their source, and giving servers up.

use jiff::Timestamp;
use kiln_model::cause::Cause;
use kiln_model::definition::Mode;
use kiln_model::revision::{Revision, RevisionContent};

use crate::build::Build;
use crate::definition::DefinitionRef;
use crate::quarantine::Quarantine;
use crate::server::{Refused, Server};
use crate::source::{Pending, SourceId};
use crate::time::after;
use crate::{Illegal, Told};

/// A definition as it was found in a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub source: SourceId,
    pub folder: String,
    pub definition: DefinitionRef,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Created,
    Changed,
    Unchanged,
}

/// Who takes a definition over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// A person: at once, and whatever the policy says.
    Hand,
    /// A signal: after the debounce.
    Signal,
}

/// Takes a definition over. `awaited` is the build that the server awaits.
pub fn take_over(
    server: Option<Server>,
    name: &kiln_model::name::ServerName,
    found: Found,
    cause: Cause,
    by: By,
    awaited: Option<&Build>,
    now: Timestamp,
) -> (Server, Outcome, Vec<Told>) {
    let due = match by {
        By::Hand => now,
        By::Signal => after(now, found.definition.update.debounce.as_duration()),
    };
    let Some(mut server) = server else {
        let mut server = Server {
            name: name.clone(),
            source: found.source,
            folder: found.folder,
            head: found.definition,
            generation: 0,
            builds: 0,
            in_force: None,
            building: None,
            wanted: None,
            quarantine: Quarantine::default(),
            handled: Vec::new(),
            automatic: Vec::new(),
            parent_followed: None,
            failure: None,
            refused: None,
            orphaned: false,
            removed: false,
        };
        server.want(cause, due);
        return (server, Outcome::Created, vec![Told::DefinitionApplied]);
    };
    let Found { source, folder, definition } = found;
    let outcome = match (server.removed, server.head.digest == definition.digest) {
        (true, _) => Outcome::Created,
        (false, false) => Outcome::Changed,
        (false, true) => Outcome::Unchanged,
    };
    server.source = source;
    server.folder = folder;
    server.orphaned = false;
    server.removed = false;
    server.refused = None;
    server.head = definition;
    if outcome == Outcome::Unchanged {
        // A person who applies again what failed wants another try. That the awaited build was cancelled, or failed, may not
        // have been taken in yet.
        let failed = server.failure.is_some() || awaited.is_some_and(|build| !build.state.holds_slot());
        if by == By::Hand && failed {
            server.want(cause, due);
        }
        return (server, outcome, Vec::new());
    }
    // Convicted content that comes back asks for nothing: what goes on is the last good definition, as before.
    if !server.is_quarantined() {
        server.want(cause, due);
    }
    (server, outcome, vec![Told::DefinitionApplied])
}

/// Whether a definition that a signal found may be taken over without a person.
///
/// `asked` are the signals about this server. One that a person approved holds for the content that was approved, so a
/// later commit needs an approval of its own.
pub fn may_take_over(server: &Server, found: &DefinitionRef, asked: &[&Pending]) -> bool {
    if server.removed {
        return false;
    }
    match server.head.update.definition {
        Mode::Auto => true,
        Mode::Approve => asked.iter().any(|pending| pending.fingerprint == found.digest.to_string()),
        Mode::Never => false,
    }
}

/// It is no longer in its source. None where that is known.
pub fn orphan(server: &mut Server) -> Option<Told> {
    if server.removed || server.orphaned {
        return None;
    }
    server.orphaned = true;
    server.refused = None;
    Some(Told::DefinitionOrphaned)
}

/// Its definition is in the source again, as it is in force.
pub fn seen_unchanged(server: &mut Server) -> bool {
    let news = server.orphaned || server.refused.is_some();
    server.orphaned = false;
    server.refused = None;
    news
}

/// The source holds a definition that can't be taken. The one in force stays. None where this is known.
pub fn refuse(server: &mut Server, refused: Refused) -> Option<Told> {
    let known = server
        .refused
        .as_ref()
        .is_some_and(|known| known.digest == refused.digest && known.problem == refused.problem);
    if server.removed || known {
        return None;
    }
    let problem = refused.problem.clone();
    server.orphaned = false;
    server.refused = Some(refused);
    Some(Told::DefinitionRefused { problem })
}

/// A person gives the server up: its fleet is retired.
///
/// # Errors
/// [`Illegal::Refused`] where it was removed before.
pub fn remove(
    mut server: Server,
    cause: Cause,
    now: Timestamp,
) -> Result<(Server, Revision, Vec<Told>), Illegal> {
    if server.removed {
        return Err(Illegal::Refused { reason: format!("server {} was removed before", server.name) });
    }
    server.generation += 1;
    server.removed = true;
    server.orphaned = false;
    server.wanted = None;
    server.building = None;
    server.in_force = None;
    server.failure = None;
    server.refused = None;
    let revision = Revision {
        server: server.name.clone(),
        generation: server.generation,
        content: RevisionContent::Removed { cause },
        created: now,
    };
    let told = vec![Told::DefinitionRemoved, Told::RevisionCreated(Box::new(revision.clone()))];
    Ok((server, revision, told))
}
