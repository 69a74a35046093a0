//! How large the messages of a call may be, and how many large ones are in memory at once.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::future::BoxFuture;
use http::Request;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;

use crate::error::ApiError;

/// The one method that takes large messages, with its service's own bound: packed folders. All others share this one, also
/// where their service has a higher one: whoever may only look must not fill the memory.
const LARGE: &str = "/kiln.builder.v1.BuilderService/Apply";
const MESSAGES: usize = 4 << 20;
/// With the five bytes that go before a message, and a stream's few small ones.
const SMALL: usize = MESSAGES + 1024;

/// The places for large messages on one server.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    all: usize,
    free: Arc<Semaphore>,
    patience: Duration,
}

/// Keeps the place of a call's large message, once it has one.
pub(super) type Kept = Arc<OnceLock<OwnedSemaphorePermit>>;

impl Places {
    pub(crate) fn new(all: usize, patience: Duration) -> Self {
        Self { all, free: Arc::new(Semaphore::new(all)), patience }
    }

    /// The call with its body bounded, and what keeps the body's place until the answer is ready: what was read is in
    /// memory that long.
    pub(super) fn bound(&self, request: Request<Body>) -> (Request<Body>, Kept) {
        let kept = Kept::default();
        if request.uri().path() == LARGE {
            let (places, place) = (self.clone(), Arc::clone(&kept));
            let large = |body| Body::new(Large { body, read: 0, places, kept: place, asking: None });
            return (request.map(large), kept);
        }
        let small = request.map(|body| {
            Body::new(Limited::new(body, SMALL).map_err(|error| match error.downcast::<Status>() {
                Ok(status) => *status,
                Err(_) => Status::out_of_range(format!("a message may have {MESSAGES} bytes at most")),
            }))
        });
        (small, kept)
    }

    async fn take(self) -> Result<OwnedSemaphorePermit, ApiError> {
        // Nobody closes the semaphore.
        if let Ok(Ok(place)) = tokio::time::timeout(self.patience, self.free.acquire_owned()).await {
            return Ok(place);
        }
        Err(ApiError::Exhausted {
            reason: format!(
                "{} messages of more than {MESSAGES} bytes are worked on already, as many as may be at once, and none was done \
                 within {:?}",
                self.all, self.patience
            ),
            what_to_do: "send it again when they are done".to_owned(),
        })
    }
}

/// A body that may be large. What any call may send is read at once; for more it needs a place, so that a call which sends
/// little never waits, however long it takes.
struct Large {
    body: Body,
    read: usize,
    places: Places,
    kept: Kept,
    asking: Option<BoxFuture<'static, Result<OwnedSemaphorePermit, ApiError>>>,
}

impl HttpBody for Large {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.read > SMALL && this.kept.get().is_none() {
            let asking = this.asking.get_or_insert_with(|| Box::pin(this.places.clone().take()));
            match ready!(asking.as_mut().poll(context)) {
                Ok(place) => drop(this.kept.set(place)),
                Err(refused) => return Poll::Ready(Some(Err(refused.into()))),
            }
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame {
            this.read += frame.data_ref().map_or(0, Bytes::len);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
