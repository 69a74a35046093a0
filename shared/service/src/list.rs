//! Listings over gRPC, from the changes of a store: the same in every service.

use kiln_api::convert::ListRequest;
use kiln_api::types;
use kiln_store::{Cursor, Document, Entry, Page, Store};

use crate::error::ApiError;

/// The page of a kind that was asked for.
///
/// # Errors
/// [`ApiError::Invalid`] for options that make no sense, [`ApiError::Unavailable`] where the store can't be read.
pub async fn page<S: Store>(
    store: &S,
    kind: &str,
    options: Option<types::ListOptions>,
) -> Result<Page, ApiError> {
    let ListRequest { since, page_size, page_token } = ListRequest::try_from(options)?;
    let since = since.map(|types::Cursor { epoch, sequence }| Cursor { epoch, sequence });
    Ok(store.changes(kind, since.as_ref(), &page_token, page_size).await?)
}

/// What is there on a page.
pub fn documents(page: &Page) -> impl Iterator<Item = &Document> {
    page.entries.iter().filter_map(|entry| match entry {
        Entry::Document(document) => Some(document),
        Entry::Tombstone { .. } => None,
    })
}

/// What closes a page, with what was deleted.
pub fn info(page: &Page) -> types::ListInfo {
    let deleted = page.entries.iter().filter_map(|entry| match entry {
        Entry::Document(_) => None,
        Entry::Tombstone { id, version, .. } => Some(types::Tombstone { id: id.clone(), version: *version }),
    });
    types::ListInfo {
        cursor: Some(types::Cursor { epoch: page.cursor.epoch.clone(), sequence: page.cursor.sequence }),
        next_page_token: page.next_page_token.clone(),
        full: page.full,
        deleted: deleted.collect(),
    }
}

#[cfg(test)]
mod tests {
    use kiln_store::{Batch, Change, SqlStore};

    use super::*;

    async fn commit(store: &SqlStore, change: Change) {
        store.commit(Batch { changes: vec![change], ..Batch::default() }).await.unwrap();
    }

    #[tokio::test]
    async fn who_asks_for_what_changed_learns_what_was_deleted() {
        let store = SqlStore::in_memory().await.unwrap();
        for id in ["a", "b"] {
            let (kind, id, body) = ("server".to_owned(), id.to_owned(), serde_json::json!({}));
            commit(&store, Change::Put { kind, id, expected: 0, schema: 1, body: body.into() }).await;
        }
        let full = page(&store, "server", None).await.unwrap();
        let told = info(&full);
        assert_eq!((documents(&full).count(), told.full, told.deleted.len()), (2, true, 0));

        commit(&store, Change::Delete { kind: "server".to_owned(), id: "a".to_owned(), expected: 1 }).await;
        let options = types::ListOptions { since: told.cursor, ..types::ListOptions::default() };
        let news = page(&store, "server", Some(options)).await.unwrap();
        let told = info(&news);
        assert_eq!((documents(&news).count(), told.full), (0, false));
        assert_eq!(told.deleted.iter().map(|gone| gone.id.as_str()).collect::<Vec<_>>(), ["a"]);
    }
}
