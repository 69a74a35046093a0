//! Who may do what: who a caller is, by the connection alone; which role each method takes; how much one caller may ask.

mod caller;
mod layer;
mod rate;
mod sizes;
mod stranger;
mod table;
mod tokens;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;
use http::{HeaderMap, header};
use kiln_model::name::SiteName;
use tonic::Request;

pub use caller::{Caller, Identity, PersonName, Role, Way};
pub(crate) use layer::AccessLayer;
pub use rate::Rate;
pub(crate) use rate::{Permit, Rates};
pub(crate) use sizes::Places;
pub(crate) use stranger::Stranger;
pub use table::{METRICS, Row, TABLE, row};
use tokens::Hash;
pub use tokens::{Secret, Token, TokenFile, Tokens};

use crate::audit::Refusals;
use crate::error::ApiError;
use crate::reloaded::Reloaded;

/// Between two looks at the token of a call under way. A second, with the time in which its file is not looked at again.
const AGAIN: Duration = Duration::from_millis(500);
/// For whoever is known to nobody.
const TODO: &str = "`kiln login` with a certificate of this site or with a token";

/// What is known of whoever is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// On the Unix socket, whose folder lets in none but the site's own user, or with a certificate of the site's
    /// authority.
    Known(Caller),
    /// Anybody else, over TLS.
    Stranger(Arc<Stranger>),
}

impl Peer {
    /// Whether it was ever said who it is.
    pub(crate) fn is_known(&self) -> bool {
        match self {
            Self::Known(_) => true,
            Self::Stranger(stranger) => stranger.is_known(),
        }
    }

    /// Whether more of its calls were refused than a connection is kept for.
    pub(crate) fn is_given_up(&self) -> bool {
        match self {
            Self::Known(_) => false,
            Self::Stranger(stranger) => stranger.is_given_up(),
        }
    }
}

/// A call that was let in.
#[derive(Debug)]
pub(crate) struct Admitted {
    caller: Caller,
    permit: Permit,
    /// Of the token that says who calls, where it is one that does.
    token: Option<Hash>,
}

/// What decides whether a call is let in.
#[derive(Debug)]
pub(crate) struct Access {
    tokens: Reloaded<Tokens>,
    rates: Rates,
    /// Who is told of calls that a role does not take.
    refusals: Option<Refusals>,
}

impl Access {
    pub(crate) fn new(site: SiteName, tokens: PathBuf, rates: Rates, refusals: Option<Refusals>) -> Self {
        let read = move |paths: &[PathBuf]| Ok(Tokens::read(&site, paths));
        Self { tokens: Reloaded::empty(vec![tokens], read), rates, refusals }
    }

    /// Who calls, where they may: known, of a role that the method takes, and within their rate.
    ///
    /// # Errors
    /// Says who, what was asked for, and what would do.
    pub(crate) fn admit(&self, peer: &Peer, headers: &HeaderMap, method: &str) -> Result<Admitted, ApiError> {
        let (caller, token) = match peer {
            Peer::Known(caller) => (caller.clone(), None),
            Peer::Stranger(stranger) => {
                let (caller, token) =
                    self.by_token(stranger, headers).inspect_err(|_| stranger.was_refused())?;
                stranger.showed_good_token();
                (caller, Some(token))
            }
        };
        if caller.until.is_some_and(|until| until <= SystemTime::now()) {
            return Err(ApiError::unknown_caller(
                format!("the certificate of {} has ended", caller.name()),
                "connect anew with a renewed one: `kiln pki issue`, then `kiln login`",
            ));
        }
        // Also what is refused counts: asking is work. A stranger has no rate: its connection ends after a few.
        let permit = self.rates.enter(&caller, Instant::now())?;
        table::check(&caller, method).inspect_err(|_| self.tell_refused(&caller, method))?;
        Ok(Admitted { caller, permit, token })
    }

    /// Looking costs nobody anything, and what no method is says nothing of what somebody tried.
    fn tell_refused(&self, caller: &Caller, method: &str) {
        if let (Some(refusals), Some(row)) = (&self.refusals, row(method).filter(|row| row.changes)) {
            refusals.tell(caller, row);
        }
    }

    fn by_token(&self, stranger: &Stranger, headers: &HeaderMap) -> Result<(Caller, Hash), ApiError> {
        if let Some(why) = &stranger.certificate {
            let why = format!("the certificate names nobody of this site: {why}");
            return Err(ApiError::unknown_caller(why, TODO));
        }
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            let why = "there is neither a client certificate nor a token on this connection";
            return Err(ApiError::unknown_caller(why, TODO));
        };
        let token = value.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
        let now = jiff::Timestamp::now();
        // One that is unknown may have been made just now.
        let find = |token| self.tokens.get().find(token, now).or_else(|_| self.tokens.now().find(token, now));
        let found = token.map(find);
        found.unwrap_or(Err("it has not the form `Bearer kiln_…`")).map_err(refused)
    }

    /// Why a call under way may not go on, as soon as its token is good no more. Never comes for one without.
    fn refusal(self: &Arc<Self>, token: Option<Hash>) -> BoxFuture<'static, ApiError> {
        let Some(token) = token else { return Box::pin(std::future::pending()) };
        let access = Arc::clone(self);
        Box::pin(async move {
            loop {
                tokio::time::sleep(AGAIN).await;
                if let Err(why) = access.tokens.get().of_hash(&token, jiff::Timestamp::now()) {
                    return refused(why);
                }
            }
        })
    }
}

fn refused(why: &str) -> ApiError {
    ApiError::unknown_caller(format!("the token is refused: {why}"), TODO)
}

/// Whoever made a call, as its connection told.
///
/// # Errors
/// [`ApiError::Internal`] for a request that no server let in.
pub fn caller<T>(request: &Request<T>) -> Result<&Caller, ApiError> {
    let missing = || ApiError::Internal("a call came past the layer that says who calls".to_owned());
    request.extensions().get::<Caller>().ok_or_else(missing)
}

/// The caller's name, which goes into audit records and causes.
///
/// # Errors
/// As [`caller`].
pub fn actor<T>(request: &Request<T>) -> Result<String, ApiError> {
    Ok(caller(request)?.name().to_owned())
}

/// A request as a server hands it on that comes from a user of this machine: for those who call a handler without one.
pub fn from_local<T>(user: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(Caller::local(user, 0));
    request
}
