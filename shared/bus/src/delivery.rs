//! What becomes of one delivered message: the same rules on every bus.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;

use crate::headers::{decode, traceparent};
use crate::{Handled, Handler, MAX_ATTEMPTS, Report, ReportHandler, headers};

/// A message as it came, from whichever bus.
pub(crate) struct Message<'a> {
    pub(crate) subject: &'a str,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) payload: &'a [u8],
    /// Names the message for good: `<stream>:<sequence>`.
    pub(crate) key: &'a str,
    /// From 1.
    pub(crate) attempt: u64,
}

/// Whom a consumer hands its messages to.
#[derive(Clone)]
pub(crate) enum Target {
    Events(Arc<dyn Handler>),
    Reports(Arc<dyn ReportHandler>),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Acknowledge,
    /// Give it again, as the next attempt.
    Retry(String),
    /// Give it again, as the same attempt, when the pause is over.
    Pause(String),
    DeadLetter(String),
}

impl Target {
    pub(crate) async fn deliver(&self, message: &Message<'_>) -> Verdict {
        let &Message { subject, headers, payload, key, attempt } = message;
        // Checked before handling: a message that kills its handler would never come to a check afterwards.
        if attempt > MAX_ATTEMPTS {
            return Verdict::DeadLetter(format!("not handled in {MAX_ATTEMPTS} attempts"));
        }
        let handled = match self {
            Self::Events(handler) => match decode(subject, headers, payload) {
                Ok(event) => handler.handle(&event, attempt).await,
                Err(error) => return Verdict::DeadLetter(error.to_string()),
            },
            Self::Reports(handler) => {
                let id = headers.get(headers::ID).map_or(key, |id| id.as_str());
                let report = Report {
                    subject: subject.to_owned(),
                    id: id.to_owned(),
                    payload: payload.to_vec(),
                    traceparent: traceparent(headers),
                };
                handler.handle(&report, attempt).await
            }
        };
        match handled {
            Handled::Done => Verdict::Acknowledge,
            Handled::Later(reason) => Verdict::Pause(reason),
            Handled::Failed(reason) if attempt >= MAX_ATTEMPTS => Verdict::DeadLetter(reason),
            Handled::Failed(reason) => Verdict::Retry(reason),
        }
    }
}

/// Doubles from 100 ms to 10 s: a peer that restarts is back within a second, one that stays away is asked seldom.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(10);

    pub(crate) fn next(&mut self) -> Duration {
        let pause = Self::FIRST * 2_u32.pow(self.failures.min(7));
        self.failures = self.failures.saturating_add(1);
        pause.min(Self::LONGEST)
    }

    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

/// Resolves when the service is told to stop, or whoever would tell it is gone.
pub(crate) async fn stopped(stop: &mut tokio::sync::watch::Receiver<bool>) {
    // An error means that the sender is gone.
    let _ = stop.wait_for(|stop| *stop).await;
}
