//! W3C trace context as text: what documents, events and messages carry of the trace that they belong to.

use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

pub(crate) const HEADER: &str = "traceparent";

/// One header and nothing else.
struct Carrier(Option<String>);

impl Injector for Carrier {
    fn set(&mut self, key: &str, value: String) {
        if key == HEADER {
            self.0 = Some(value);
        }
    }
}

impl Extractor for Carrier {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.as_deref().filter(|_| key == HEADER)
    }

    fn keys(&self) -> Vec<&str> {
        vec![HEADER]
    }
}

/// The trace context of the current span; empty where there is none.
pub fn current() -> String {
    of(&Span::current())
}

/// The trace context of a span; empty where it has none.
pub fn of(span: &Span) -> String {
    let mut carrier = Carrier(None);
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    carrier.0.unwrap_or_default()
}

/// Puts a span, which was not entered yet, under a trace context. A malformed one leaves it as it is.
pub fn follow(span: &Span, traceparent: &str) {
    if traceparent.is_empty() {
        return;
    }
    let carrier = Carrier(Some(traceparent.to_owned()));
    let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &carrier);
    if let Err(error) = span.set_parent(parent) {
        tracing::debug!(%error, "a span could not be put under its trace");
    }
}

/// A span of this name under a trace context; the root of a trace of its own where that is empty.
pub fn span_under(traceparent: &str, name: &str) -> Span {
    let span = tracing::info_span!(parent: None, "work", otel.name = name);
    follow(&span, traceparent);
    span
}
