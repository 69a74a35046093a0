//! Every call of a server: its span, under the caller's trace, and its count and duration. A call lasts to the end of
//! its answer, which for a stream is long after its beginning.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use http::{HeaderMap, Request, Response};
use hyper::body::{Body as HttpBody, Bytes, Frame, SizeHint};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span, field};

use crate::{access, metrics, trace};

#[derive(Debug, Clone, Copy)]
pub(crate) struct ObserveLayer;

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Observe { inner }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Observe<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Observe<S>
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

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = request.uri().path().to_owned();
        // Health and reflection are asked all the time, and tell nothing.
        if method.starts_with("/grpc.") {
            return Box::pin(self.inner.call(request));
        }
        let span = tracing::info_span!(
            parent: None,
            "call",
            otel.name = method.trim_start_matches('/'),
            otel.kind = "server",
            otel.status_code = field::Empty,
            rpc.system = "grpc",
            rpc.grpc.status_code = field::Empty,
        );
        if let Some(parent) = request.headers().get(trace::HEADER).and_then(|value| value.to_str().ok()) {
            trace::follow(&span, parent);
        }
        let mut call = Call { span: span.clone(), method, begin: Instant::now(), code: None };
        let answer = self.inner.call(request).instrument(span);
        Box::pin(async move {
            let response = answer.await?;
            // A call that fails at once has its status among the headers.
            call.saw(response.headers());
            Ok(response.map(|body| Body::new(Observed { body, call })))
        })
    }
}

/// A call under way; counted when it is dropped.
struct Call {
    span: Span,
    method: String,
    begin: Instant,
    code: Option<Code>,
}

impl Call {
    fn saw(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.code = Some(status.code());
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Dropped before its end: the caller went away.
        let code = self.code.unwrap_or(Code::Cancelled);
        self.span.record("rpc.grpc.status_code", i32::from(code));
        if !matches!(code, Code::Ok | Code::Cancelled) {
            self.span.record("otel.status_code", "ERROR");
        }
        // Any text can be asked for, and each label costs memory for good.
        let method = if access::row(&self.method).is_some() { &self.method } else { "unknown" };
        metrics::grpc_call(method, code, self.begin.elapsed());
    }
}

struct Observed {
    body: Body,
    call: Call,
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let frame = {
            let _entered = this.call.span.enter();
            ready!(Pin::new(&mut this.body).poll_frame(context))
        };
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref() {
                    this.call.saw(trailers);
                }
            }
            Some(Err(status)) => this.call.code = Some(status.code()),
            None => {}
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
