//! A connection over TLS that no certificate says the caller of.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Refused calls that a connection is kept for. Who has the wrong token tries a few times at most.
const REFUSALS: u32 = 10;

/// Whose calls have to say by a token who makes them.
#[derive(Debug)]
pub(crate) struct Stranger {
    /// Why the certificate names nobody. None where there is no certificate.
    pub(super) certificate: Option<String>,
    is_known: AtomicBool,
    refusals: AtomicU32,
}

impl Stranger {
    pub(crate) fn new(certificate: Option<String>) -> Self {
        Self { certificate, is_known: AtomicBool::new(false), refusals: AtomicU32::new(0) }
    }

    pub(super) fn showed_good_token(&self) {
        self.is_known.store(true, Ordering::Relaxed);
    }

    pub(super) fn was_refused(&self) {
        self.refusals.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether a good token was shown.
    pub(super) fn is_known(&self) -> bool {
        self.is_known.load(Ordering::Relaxed)
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.refusals.load(Ordering::Relaxed) >= REFUSALS
    }
}
