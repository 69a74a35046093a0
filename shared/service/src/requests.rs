//! Mutating calls that can be repeated: the answer is kept with the request's id, in the same commit as what it did.

use kiln_model::digest::Digest;
use kiln_model::name::RequestId;
use kiln_store::{Batch, Error as StoreError, Store, StoredAnswer};
use prost::Message;

use crate::error::ApiError;

/// Times that a call decides anew where others change the same documents.
const TRIES: u32 = 8;

/// An id for a new call.
pub fn new_id() -> String {
    ulid::Ulid::generate().to_string()
}

/// The answer that a request was given before, where it was. Asked first by a call that looks at the world before it
/// decides: a repeated one is answered with Git, archives and peers away.
///
/// # Errors
/// [`ApiError::Invalid`] for an id that is none, or that was used for another request.
pub async fn answered<S, M, A>(store: &S, request_id: &str, request: &M) -> Result<Option<A>, ApiError>
where
    S: Store,
    M: Message,
    A: Message + Default,
{
    let (id, request_digest) = identity(request_id, request)?;
    match store.answer(&id).await? {
        Some(stored) => replay(&stored, &request_digest).map(Some),
        None => Ok(None),
    }
}

fn identity(request_id: &str, request: &impl Message) -> Result<(RequestId, Digest), ApiError> {
    let id = request_id.parse().map_err(|error| {
        ApiError::invalid("request_id", format!("{error}"), "give each call an id of its own")
    })?;
    // Maps are sorted in the generated types, so equal requests have equal bytes.
    Ok((id, Digest::of(&request.encode_to_vec())))
}

/// Decides and commits once per request id. A repeated call gets the first one's answer; the same id with another
/// request is refused. `decide` gives the change and the answer; it is asked again where the documents that it read
/// were changed in between, so it must have no effects of its own.
///
/// # Errors
/// What `decide` refuses; [`ApiError::Invalid`] for an id that is none; [`ApiError::Conflict`] where others keep
/// changing the same documents.
pub async fn once<S, M, A, D>(
    store: &S,
    request_id: &str,
    request: &M,
    mut decide: impl FnMut() -> D,
) -> Result<A, ApiError>
where
    S: Store,
    M: Message,
    A: Message + Default,
    D: Future<Output = Result<(Batch, A), ApiError>>,
{
    let (id, request_digest) = identity(request_id, request)?;
    for _ in 0..TRIES {
        if let Some(stored) = store.answer(&id).await? {
            return replay(&stored, &request_digest);
        }
        let (mut batch, answer) = decide().await?;
        batch.answer =
            Some(StoredAnswer { request: id.clone(), request_digest, answer: answer.encode_to_vec() });
        match store.commit(batch).await {
            Ok(_) => return Ok(answer),
            // Answered: by a copy of this call that ran beside; its answer is given in the next turn.
            Err(StoreError::Conflict { .. } | StoreError::Answered(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ApiError::Conflict(format!("others kept changing the same documents, {TRIES} times over")))
}

fn replay<A: Message + Default>(stored: &StoredAnswer, request_digest: &Digest) -> Result<A, ApiError> {
    if stored.request_digest != *request_digest {
        return Err(ApiError::invalid(
            "request_id",
            format!("`{}` was used for another request", stored.request),
            "give each call an id of its own",
        ));
    }
    A::decode(stored.answer.as_slice()).map_err(|error| ApiError::internal(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_api::builder::{RemoveRequest, Server};
    use kiln_store::{Change, SqlStore};
    use std::sync::atomic::{AtomicU64, Ordering};

    fn put(expected: u64) -> Batch {
        let (kind, id) = ("server".to_owned(), "web".to_owned());
        let change = Change::Put { kind, id, expected, schema: 1, body: serde_json::json!({}).into() };
        Batch { changes: vec![change], ..Batch::default() }
    }

    fn remove(server: &str) -> RemoveRequest {
        RemoveRequest { request_id: "r1".to_owned(), server: server.to_owned() }
    }

    #[tokio::test]
    async fn a_repeated_call_does_nothing_twice() {
        let store = SqlStore::in_memory().await.unwrap();
        let decided = AtomicU64::new(0);
        let request = remove("web");
        let call = || {
            once(&store, "r1", &request, || async {
                decided.fetch_add(1, Ordering::SeqCst);
                Ok((put(0), Server { name: "web".to_owned(), ..Server::default() }))
            })
        };
        assert_eq!(call().await.unwrap().name, "web");
        assert_eq!(call().await.unwrap().name, "web");
        assert_eq!(decided.load(Ordering::SeqCst), 1);
        assert_eq!(answered::<_, _, Server>(&store, "r1", &request).await.unwrap().unwrap().name, "web");
        assert!(answered::<_, _, Server>(&store, "r2", &request).await.unwrap().is_none());
        assert!(answered::<_, _, Server>(&store, "r1", &remove("db")).await.is_err());
        assert_eq!(store.get("server", "web").await.unwrap().unwrap().version, 1);
    }

    #[tokio::test]
    async fn an_id_is_for_one_request() {
        let store = SqlStore::in_memory().await.unwrap();
        let decide = || std::future::ready(Ok((Batch::default(), Server::default())));
        once(&store, "r1", &remove("web"), decide).await.unwrap();
        let refused = once(&store, "r1", &remove("db"), decide).await.unwrap_err();
        assert!(matches!(refused, ApiError::Invalid { field, .. } if field == "request_id"));
        for bad in ["", "a b", "../x"] {
            assert!(once(&store, bad, &remove("db"), decide).await.is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_stale_read_is_decided_anew() {
        let store = SqlStore::in_memory().await.unwrap();
        store.commit(put(0)).await.unwrap();
        let reads = AtomicU64::new(0);
        // The first decision is made on version 0, which is not so any more.
        let answer: Server = once(&store, "r1", &remove("web"), || {
            let expected = reads.fetch_add(1, Ordering::SeqCst);
            std::future::ready(Ok((put(expected), Server::default())))
        })
        .await
        .unwrap();
        assert_eq!(answer, Server::default());
        assert_eq!(store.get("server", "web").await.unwrap().unwrap().version, 2);
    }

    #[tokio::test]
    async fn two_copies_of_a_call_act_once() {
        let store = SqlStore::in_memory().await.unwrap();
        let request = remove("web");
        let call = || {
            once(&store, "r1", &request, || {
                std::future::ready(Ok((put(0), Server { version: 7, ..Server::default() })))
            })
        };
        let (a, b) = tokio::join!(call(), call());
        assert_eq!((a.unwrap().version, b.unwrap().version), (7, 7));
        assert_eq!(store.get("server", "web").await.unwrap().unwrap().version, 1);
    }
}
