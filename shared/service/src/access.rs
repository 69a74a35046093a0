//! Who may do what: who a caller is, by the connection alone; which role each method takes; how much one caller may ask.

mod caller;
mod layer;
mod rate;
mod table;
mod tokens;

use std::path::PathBuf;
use std::time::{Instant, SystemTime};

use http::{HeaderMap, header};
use kiln_model::name::SiteName;
use tonic::Request;

pub use caller::{Caller, Identity, PersonName, Role, Way};
pub(crate) use layer::AccessLayer;
pub use rate::Rate;
pub(crate) use rate::{Permit, Rates};
pub use table::{METRICS, Row, TABLE, row};
pub use tokens::{Secret, Token, TokenFile, Tokens};

use crate::error::ApiError;
use crate::reloaded::Reloaded;

/// What is known of whoever is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) enum Peer {
    /// On the Unix socket, whose folder lets in none but the site's own user.
    Local(Caller),
    /// With a certificate of the site's authority; why it names nobody, where it does not.
    Certificate(Result<Caller, String>),
    /// Over TLS, without a certificate: a token must say who it is.
    Unnamed,
}

/// What decides whether a call is let in.
#[derive(Debug)]
pub(crate) struct Access {
    tokens: Reloaded<Tokens>,
    rates: Rates,
}

impl Access {
    pub(crate) fn new(site: SiteName, tokens: PathBuf, people: Rate, others: Rate) -> Self {
        let read = move |paths: &[PathBuf]| Ok(Tokens::read(&site, paths));
        Self { tokens: Reloaded::empty(vec![tokens], read), rates: Rates::new(people, others) }
    }

    /// Who calls, where they may: known, of a role that the method takes, and within their rate.
    ///
    /// # Errors
    /// Says who, what was asked for, and what would do.
    pub(crate) fn admit(
        &self,
        peer: &Peer,
        headers: &HeaderMap,
        method: &str,
    ) -> Result<(Caller, Permit), ApiError> {
        let caller = self.caller(peer, headers)?;
        if caller.until.is_some_and(|until| until <= SystemTime::now()) {
            return Err(ApiError::unknown_caller(
                format!("the certificate of {} has ended", caller.name()),
                "connect anew with a renewed one: `kiln pki issue`, then `kiln login`",
            ));
        }
        // Also what is refused counts: asking is work.
        let permit = self.rates.enter(&caller, Instant::now())?;
        table::check(&caller, method)?;
        Ok((caller, permit))
    }

    fn caller(&self, peer: &Peer, headers: &HeaderMap) -> Result<Caller, ApiError> {
        const TODO: &str = "`kiln login` with a certificate of this site or with a token";
        match peer {
            Peer::Local(caller) | Peer::Certificate(Ok(caller)) => Ok(caller.clone()),
            Peer::Certificate(Err(why)) => Err(ApiError::unknown_caller(
                format!("the certificate names nobody of this site: {why}"),
                TODO,
            )),
            Peer::Unnamed => {
                let Some(value) = headers.get(header::AUTHORIZATION) else {
                    let why = "there is neither a client certificate nor a token on this connection";
                    return Err(ApiError::unknown_caller(why, TODO));
                };
                let token = value.to_str().ok().and_then(|text| text.strip_prefix("Bearer "));
                let found = token.map(|token| self.tokens.get().find(token, jiff::Timestamp::now()));
                found
                    .unwrap_or(Err("it has not the form `Bearer kiln_…`"))
                    .map_err(|why| ApiError::unknown_caller(format!("the token is refused: {why}"), TODO))
            }
        }
    }
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
