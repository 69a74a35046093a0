use kiln_model::revision::{ImageRevision, Revision, RevisionContent};

use super::{Invalid, from_timestamp, required, text, to_timestamp};
use crate::types;

/// `version` is that of the document which holds the revision: the caller sets it.
impl From<Revision> for types::Revision {
    fn from(revision: Revision) -> Self {
        let head = Self {
            server: revision.server.to_string(),
            generation: revision.generation,
            created: Some(to_timestamp(revision.created)),
            ..Self::default()
        };
        match revision.content {
            RevisionContent::Removed { cause } => Self { removed: true, cause: Some(cause.into()), ..head },
            RevisionContent::Image(image) => Self {
                definition_digest: image.definition_digest.to_string(),
                image_digest: image.image_digest.to_string(),
                run_digest: image.run_digest.to_string(),
                run: Some(image.run.into()),
                update: Some(image.update.into()),
                build: image.build.to_string(),
                commit: image.commit,
                packages: image.packages,
                cause: Some(image.cause.into()),
                ..head
            },
        }
    }
}

impl TryFrom<types::Revision> for Revision {
    type Error = Invalid;

    fn try_from(revision: types::Revision) -> Result<Self, Invalid> {
        let cause = required("cause", revision.cause)?;
        let content = if revision.removed {
            RevisionContent::Removed { cause }
        } else {
            RevisionContent::Image(Box::new(ImageRevision {
                definition_digest: text("definition_digest", &revision.definition_digest)?,
                image_digest: text("image_digest", &revision.image_digest)?,
                run_digest: text("run_digest", &revision.run_digest)?,
                run: required("run", revision.run)?,
                update: required("update", revision.update)?,
                build: text("build", &revision.build)?,
                commit: revision.commit,
                packages: revision.packages,
                cause,
            }))
        };
        Ok(Self {
            server: text("server", &revision.server)?,
            generation: revision.generation,
            content,
            created: from_timestamp("created", revision.created)?,
        })
    }
}
