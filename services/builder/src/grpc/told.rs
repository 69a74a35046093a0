//! Calls that take a while and tell what happens, until they give their outcome.

use std::sync::Arc;
use std::time::Duration;

use kiln_service::error::ApiError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::Instrument as _;

use super::Streamed;
use crate::bake::LogSink;

/// Lines that a slow reader may lag behind. More are left out for it: work does not wait for who looks on.
const AHEAD: usize = 256;

/// Beyond what an archive that still answers needs.
const BOUND: Duration = Duration::from_secs(600);

/// Does `work` for as long as the caller listens: a caller that goes ends it where it is. What it says goes out by `line`,
/// and its outcome last.
pub(super) fn told<T: Send + 'static, F>(
    line: impl Fn(String) -> T + Send + Sync + 'static,
    work: impl FnOnce(LogSink) -> F + Send + 'static,
) -> Streamed<T>
where
    F: Future<Output = Result<T, ApiError>> + Send,
{
    let (items, stream) = mpsc::channel(AHEAD);
    let lines = items.clone();
    let listener: LogSink = Arc::new(move |text: &str| {
        if let Err(error) = lines.try_send(Ok(line(text.to_owned()))) {
            tracing::debug!(%error, "a line was left out");
        }
    });
    let telling = async move {
        tokio::select! {
            biased;
            outcome = tokio::time::timeout(BOUND, work(listener)) => {
                let outcome = outcome.unwrap_or_else(|_| {
                    Err(ApiError::OutsideAway {
                        reason: format!("there was no outcome within {} s", BOUND.as_secs()),
                        what_to_do: "see that the archives answer, and try again".to_owned(),
                    })
                });
                // Nobody listens any more where this fails.
                let _ = items.send(outcome.map_err(Status::from)).await;
            }
            () = items.closed() => {}
        }
    };
    tokio::spawn(telling.in_current_span());
    Box::pin(ReceiverStream::new(stream))
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;

    use super::*;

    const OUTCOME: &str = "the outcome";

    fn lines_and(count: usize, outcome: Result<(), ApiError>) -> Streamed<String> {
        told(String::from, move |listener| async move {
            (0..count).for_each(|number| listener(&number.to_string()));
            outcome.map(|()| OUTCOME.to_owned())
        })
    }

    #[tokio::test]
    async fn lines_come_before_the_outcome_and_too_many_do_not_hold_it_up() {
        for (said, heard) in [(0, 0), (3, 3), (AHEAD + 10, AHEAD)] {
            let items: Vec<_> = lines_and(said, Ok(())).collect().await;
            let (last, lines) = items.split_last().unwrap();
            assert_eq!(last.as_ref().unwrap(), OUTCOME);
            assert_eq!(lines.len(), heard);
        }
        let items: Vec<_> =
            lines_and(1, Err(ApiError::not_found("server", "web".to_owned()))).collect().await;
        assert_eq!(items[1].as_ref().unwrap_err().code(), tonic::Code::NotFound);
    }

    #[tokio::test(start_paused = true)]
    async fn what_never_ends_is_ended() {
        let mut stream: Streamed<String> = told(String::from, |_| std::future::pending());
        let ended = tokio::time::timeout(BOUND * 2, stream.next()).await.unwrap().unwrap();
        assert_eq!(ended.unwrap_err().code(), tonic::Code::Unavailable);
    }

    #[tokio::test]
    async fn a_caller_that_goes_ends_the_work() {
        let (ended, told_end) = tokio::sync::oneshot::channel::<()>();
        let mut stream: Streamed<String> = told(String::from, |listener| async move {
            let _held = ended;
            listener("begun");
            std::future::pending().await
        });
        stream.next().await.unwrap().unwrap();
        drop(stream);
        let bound = std::time::Duration::from_secs(10);
        assert!(tokio::time::timeout(bound, told_end).await.unwrap().is_err(), "it was dropped");
    }
}
