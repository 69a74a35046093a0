//! The layout of a store's tables, and how it goes forward.

#[cfg(test)]
pub(crate) mod tests;

use crate::Error;
use crate::session::{Backend, Session};

/// One step forward. Its statements run once in the life of a store.
#[derive(Clone, Copy)]
pub(crate) struct Migration {
    /// From 1, each one more than the step before.
    pub(crate) layout: u64,
    /// The lowest layout that a program may know to work with the tables as they are after this step. A step that only adds
    /// what has a default leaves it where it was; one after which an older program would read or write something wrong
    /// raises it to its own layout.
    pub(crate) readable_from: u64,
    pub(crate) statements: &'static str,
}

/// What a store says of itself when it is opened.
pub(crate) struct Identity {
    pub(crate) epoch: String,
    pub(crate) sequence: u64,
    /// Where it went on at its last restore; 0 for none.
    pub(crate) restored: u64,
}

/// Brings the tables to the newest layout that this program knows, in one transaction and behind the lock of writers.
///
/// # Errors
/// [`Error::Unavailable`] where the store was written by a program that is too new for this one.
pub(crate) async fn prepare(session: &mut Session<'_>, backend: &dyn Backend) -> Result<Identity, Error> {
    let migrations = backend.migrations();
    session.script(backend.begin()).await?;
    session.script(backend.foundation()).await?;
    let found = session.meta_number("layout").await?;
    let known = migrations.last().map_or(0, |newest| newest.layout);
    if found > known {
        let readable_from = match session.meta_number("readable_from").await? {
            0 => found,
            said => said,
        };
        if readable_from > known {
            let reason = format!(
                "its layout is {found}, which programs that know {readable_from} or newer can read, and this one \
                 knows {known}: use the Kiln that wrote it, or a newer one"
            );
            return Err(Error::Unavailable { what: "open", place: backend.place().to_owned(), reason });
        }
    }
    for step in migrations.iter().filter(|step| step.layout > found) {
        session.script(step.statements).await?;
        session.set_meta("layout", &step.layout.to_string()).await?;
        session.set_meta("readable_from", &step.readable_from.to_string()).await?;
    }
    let identity = identify(session, backend).await?;
    session.script("COMMIT").await?;
    Ok(identity)
}

/// A new store, and one that was restored, begins an epoch.
async fn identify(session: &mut Session<'_>, backend: &dyn Backend) -> Result<Identity, Error> {
    let sequence = session.meta_number("sequence").await?;
    let Some(epoch) = session.meta("epoch").await? else {
        let seen = backend.witness().and_then(|witness| Some((witness.seen()?, &witness.path)));
        if let Some((seen, path)) = seen {
            let reason = format!(
                "it is empty, and stood at {} when it was here last: it was truncated or deleted; put a copy of it \
                 in its place, or remove {} to begin with nothing",
                seen.sequence,
                path.display()
            );
            return Err(Error::Unavailable { what: "open", place: backend.place().to_owned(), reason });
        }
        return new_epoch(session, sequence, 0).await;
    };
    match backend.witness().and_then(|witness| witness.goes_on_from(&epoch, sequence, now())) {
        None => Ok(Identity { epoch, sequence, restored: session.meta_number("restored").await? }),
        Some(from) => {
            tracing::warn!(
                store = backend.place(),
                old = epoch,
                at = sequence,
                goes_on_from = from,
                "the store is not the one that was here last: it was restored, and begins a new epoch"
            );
            new_epoch(session, from, from).await
        }
    }
}

/// In seconds. No store commits once a second for all of its life, so the clock is past every sequence.
pub(crate) fn now() -> u64 {
    u64::try_from(jiff::Timestamp::now().as_second()).unwrap_or_default()
}

/// Gives a store its epoch: at its creation, and whenever it was brought back to a state that it had before. Then it goes
/// on from a sequence that is past all that anybody may have been told.
pub(crate) async fn new_epoch(
    session: &mut Session<'_>,
    sequence: u64,
    restored: u64,
) -> Result<Identity, Error> {
    let epoch = ulid::Ulid::generate().to_string();
    session.set_meta("epoch", &epoch).await?;
    session.set_meta("sequence", &sequence.to_string()).await?;
    if restored > 0 {
        session.set_meta("restored", &restored.to_string()).await?;
    }
    Ok(Identity { epoch, sequence, restored })
}

/// Begins a transaction with new, empty tables of a layout in it, for rows that are carried over.
pub(crate) async fn create(
    session: &mut Session<'_>,
    backend: &dyn Backend,
    layout: u64,
) -> Result<(), Error> {
    session.script(backend.begin()).await?;
    session.script(backend.foundation()).await?;
    for step in backend.migrations().iter().filter(|step| step.layout <= layout) {
        session.script(step.statements).await?;
    }
    Ok(())
}
