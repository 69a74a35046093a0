//! What changes in a store, for loops that keep up with it.

use kiln_store::{Cursor, Entry, Error, Store};

const PAGE: u32 = 500;

/// Follows the changes of one kind of document.
#[derive(Debug)]
pub struct Follower {
    kind: &'static str,
    cursor: Option<Cursor>,
}

impl Follower {
    pub fn new(kind: &'static str) -> Self {
        Self { kind, cursor: None }
    }

    /// What changed since the last call; everything at the first.
    ///
    /// # Errors
    /// The store refuses; the next call gives the same again.
    pub async fn changes<S: Store>(&mut self, store: &S) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        let mut token = String::new();
        loop {
            let page = store.changes(self.kind, self.cursor.as_ref(), &token, PAGE).await?;
            entries.extend(page.entries);
            if page.next_page_token.is_empty() {
                self.cursor = Some(page.cursor);
                return Ok(entries);
            }
            token = page.next_page_token;
        }
    }
}
