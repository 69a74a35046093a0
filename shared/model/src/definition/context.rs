//! The digest of a definition's folder: over its content alone, never over times or commits.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::digest::Digest;

/// One thing in a definition's folder, as whoever reads the disk saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContextEntry {
    /// Relative to the folder, with `/` between its parts.
    pub path: String,
    pub kind: EntryKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// Of the mode bits only this one counts: Git keeps no other.
    Regular {
        digest: Digest,
        executable: bool,
    },
    Directory,
    Symlink {
        target: String,
    },
}

/// The digest of a definition's folder: `server.yaml` and everything that it names, in any order.
pub fn context_digest<'a>(entries: impl IntoIterator<Item = &'a ContextEntry>) -> Digest {
    // A path is there once, so that a map of them is the folder.
    let folder: BTreeMap<_, _> =
        entries.into_iter().map(|entry| (entry.path.as_str(), &entry.kind)).collect();
    let mut text = String::new();
    for (path, kind) in folder {
        let (kind, content) = match kind {
            EntryKind::Regular { digest, executable: false } => ("file", digest.to_string()),
            EntryKind::Regular { digest, executable: true } => ("program", digest.to_string()),
            EntryKind::Directory => ("directory", String::new()),
            EntryKind::Symlink { target } => ("link", target.clone()),
        };
        // The lengths keep a strange name, or target, from passing for another entry.
        text += &format!("{} {path} {kind} {} {content}\n", path.len(), content.len());
    }
    Digest::of(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    fn folders() -> impl Strategy<Value = Vec<ContextEntry>> {
        let kind = prop_oneof![
            (any::<[u8; 32]>(), any::<bool>()).prop_map(|(bytes, executable)| EntryKind::Regular {
                digest: Digest::from_bytes(bytes),
                executable
            }),
            Just(EntryKind::Directory),
            "[a-z/.]{1,6}".prop_map(|target| EntryKind::Symlink { target }),
        ];
        proptest::collection::btree_map("[a-z]{1,3}(/[a-z]{1,3})?", kind, 1..8)
            .prop_map(|folder| folder.into_iter().map(|(path, kind)| ContextEntry { path, kind }).collect())
    }

    fn digest(entries: &[ContextEntry]) -> Digest {
        context_digest(entries)
    }

    proptest! {
        #[test]
        fn the_order_does_not_count(entries in folders(), turn in any::<Index>()) {
            let mut turned = entries.clone();
            turned.rotate_left(turn.index(entries.len()));
            prop_assert_eq!(digest(&entries), digest(&turned));
        }

        #[test]
        fn another_folder_has_another_digest(one in folders(), other in folders()) {
            prop_assert_eq!(one == other, digest(&one) == digest(&other));
        }
    }

    #[test]
    fn the_digest_stays_as_it_is() {
        // Definitions that were applied are compared with it: a change here would look like a change of every server.
        let entry = |path: &str, kind| ContextEntry { path: path.to_owned(), kind };
        let folder = [
            entry("server.yaml", EntryKind::Regular { digest: Digest::of(b"name: web"), executable: false }),
            entry("site", EntryKind::Directory),
            entry("site/run.sh", EntryKind::Regular { digest: Digest::of(b""), executable: true }),
            entry("site/link", EntryKind::Symlink { target: "run.sh".to_owned() }),
        ];
        insta::assert_snapshot!(digest(&folder), @"sha256:e964d4d3f97a2b31c2a3a8c23636471a60955e7ec740fc49db705177792e8c64");
    }
}
