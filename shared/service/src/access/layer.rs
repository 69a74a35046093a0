//! The layer that every call goes through before any handler: who calls, whether they may, and how much of it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::{Access, Admitted, Peer, Permit, Places};
use crate::error::ApiError;

#[derive(Debug, Clone)]
pub(crate) struct AccessLayer {
    pub(crate) access: Arc<Access>,
    pub(crate) places: Places,
}

impl<S> Layer<S> for AccessLayer {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Guarded { inner, access: Arc::clone(&self.access), places: self.places.clone() }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Guarded<S> {
    inner: S,
    access: Arc<Access>,
    places: Places,
}

impl<S> Service<Request<Body>> for Guarded<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let admitted = match request.extensions().get::<Peer>() {
            Some(peer) => self.access.admit(peer, request.headers(), request.uri().path()),
            None => Err(ApiError::Internal("a connection came past the door".to_owned())),
        };
        let (permit, mut refusal) = match admitted {
            Ok(Admitted { caller, permit, token }) => {
                request.extensions_mut().insert(caller);
                (permit, self.access.refusal(token))
            }
            Err(refused) => {
                let refused = Status::from(refused).into_http();
                return Box::pin(std::future::ready(Ok(refused)));
            }
        };
        let (request, place) = self.places.bound(request);
        let answer = self.inner.call(request);
        Box::pin(async move {
            let _place = place;
            let response = tokio::select! {
                response = answer => response?,
                refused = &mut refusal => return Ok(Status::from(refused).into_http()),
            };
            Ok(response.map(|body| Body::new(Answer { body, refusal, _under_way: permit })))
        })
    }
}

/// The answer to a call, which is under way to its end.
struct Answer {
    body: Body,
    refusal: BoxFuture<'static, ApiError>,
    _under_way: Permit,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        // Before the body, which may have something to say each time.
        if let Poll::Ready(refused) = this.refusal.as_mut().poll(context) {
            (this.body, this.refusal) = (Body::empty(), Box::pin(std::future::pending()));
            // Told as at the end of any answer: a body that fails would only reset the stream.
            let mut trailers = HeaderMap::new();
            let told = Status::from(refused).add_header(&mut trailers);
            return Poll::Ready(Some(told.map(|()| Frame::trailers(trailers))));
        }
        Pin::new(&mut this.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
