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
    let epoch = match session.meta("epoch").await? {
        Some(epoch) => epoch,
        None => {
            let epoch = ulid::Ulid::generate().to_string();
            session.set_meta("epoch", &epoch).await?;
            session.set_meta("sequence", "0").await?;
            epoch
        }
    };
    let sequence = session.meta_number("sequence").await?;
    session.script("COMMIT").await?;
    Ok(Identity { epoch, sequence })
}
