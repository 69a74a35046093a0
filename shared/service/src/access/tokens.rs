//! The tokens of people, by their hashes. Whoever reads the file can't use what is in it.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use jiff::Timestamp;
use kiln_model::name::SiteName;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

use super::caller::{Caller, Identity, PersonName, Role};

/// Tells what leaked: scanners of repositories and logs look for it.
const PREFIX: &str = "kiln_";
const BYTES: usize = 32;

/// What is kept of a secret.
pub(super) type Hash = [u8; 32];

/// A secret of 256 random bits. It is shown once, to whoever makes it.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Of bytes from the kernel's source of randomness.
    pub fn of(random: &[u8; BYTES]) -> Self {
        let digits = Zeroizing::new(hex::encode(random));
        Self(Zeroizing::new([PREFIX, digits.as_str()].concat()))
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }

    fn hash(text: &str) -> Hash {
        Sha256::digest(text.as_bytes()).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A token as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Names it in lists and to revoke it: the first digits of its hash.
    pub id: String,
    pub name: PersonName,
    pub role: Role,
    /// SHA-256 of the secret, in hexadecimal digits.
    pub hash: String,
    pub created: Timestamp,
    pub expires: Timestamp,
}

impl Token {
    /// # Errors
    /// Where the role is no person's.
    pub fn new(
        secret: &Secret,
        name: PersonName,
        role: Role,
        created: Timestamp,
        expires: Timestamp,
    ) -> Result<Self, String> {
        Identity::person(name.clone(), role)?;
        let hash = hex::encode(Secret::hash(&secret.0));
        Ok(Self { id: hash[..8].to_owned(), name, role, hash, created, expires })
    }
}

/// `keys/tokens.toml` as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenFile {
    #[serde(default)]
    pub token: Vec<Token>,
}

impl TokenFile {
    /// # Errors
    /// Names what is wrong in it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let file: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        let mut ids = BTreeSet::new();
        for token in &file.token {
            Identity::person(token.name.clone(), token.role)?;
            if hex::decode(&token.hash).map_or(0, |hash| hash.len()) != BYTES {
                return Err(format!("the hash of token {} is not one of 64 hexadecimal digits", token.id));
            }
            if !ids.insert(&token.id) {
                return Err(format!("two tokens have the id {}", token.id));
            }
        }
        Ok(file)
    }

    /// # Errors
    /// Where it can't be written as TOML, which its types rule out.
    pub fn to_text(&self) -> Result<String, String> {
        toml::to_string(self).map_err(|error| error.to_string())
    }
}

/// The tokens that are good, as a server knows them.
#[derive(Debug, Default)]
pub struct Tokens {
    known: Vec<(Vec<u8>, Token)>,
}

impl Tokens {
    pub fn of(file: TokenFile) -> Self {
        let hashed = |token: Token| (hex::decode(&token.hash).unwrap_or_default(), token);
        Self { known: file.token.into_iter().map(hashed).collect() }
    }

    /// No file: no tokens. A file that can't be read: none either, for it may be there to revoke one.
    pub(crate) fn read(site: &SiteName, paths: &[PathBuf]) -> Self {
        let path = paths.first().filter(|path| path.exists());
        let read = path.map(|path| crate::reloaded::text(path).and_then(|text| TokenFile::parse(&text)));
        match read {
            Some(Ok(file)) => Self::of(file),
            Some(Err(error)) => {
                tracing::error!(%error, %site, ?path, "no token is good until this file can be read");
                Self::default()
            }
            None => Self::default(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whose a token is, and by which hash it is found again.
    ///
    /// # Errors
    /// Why it is refused, which tells nothing of other tokens.
    pub(super) fn find(&self, token: &str, now: Timestamp) -> Result<(Caller, Hash), &'static str> {
        if token.len() != PREFIX.len() + 2 * BYTES || !token.starts_with(PREFIX) {
            return Err("it has not the form of one");
        }
        let hash = Secret::hash(token);
        Ok((self.of_hash(&hash, now)?, hash))
    }

    /// # Errors
    /// As [`Tokens::find`].
    pub(super) fn of_hash(&self, hash: &Hash, now: Timestamp) -> Result<Caller, &'static str> {
        // Every one is compared, and each in the same time.
        let found = self.known.iter().fold(None, |found, known| {
            if bool::from(known.0.as_slice().ct_eq(hash.as_slice())) { Some(known) } else { found }
        });
        let (_, token) = found.ok_or("it is unknown or was revoked")?;
        if token.expires <= now {
            return Err("it has expired");
        }
        Ok(Caller::by_token(&token.name, token.role))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn token(random: u8, name: &str, role: Role) -> (Secret, Token) {
        let secret = Secret::of(&[random; BYTES]);
        let (created, expires) = (time("2026-01-01T00:00:00Z"), time("2026-02-01T00:00:00Z"));
        let token = Token::new(&secret, name.parse().unwrap(), role, created, expires).unwrap();
        (secret, token)
    }

    #[test]
    fn a_token_is_known_until_it_expires_or_is_revoked() {
        let (ada, of_ada) = token(1, "ada", Role::Operator);
        let (bob, of_bob) = token(2, "bob", Role::Viewer);
        let file = TokenFile { token: vec![of_ada.clone(), of_bob] };
        let text = file.to_text().unwrap();
        assert!(!text.contains(ada.reveal()) && !text.contains(&ada.reveal()[5..]), "{text}");
        let tokens = Tokens::of(TokenFile::parse(&text).unwrap());
        let (good, late) = (time("2026-01-31T23:59:59Z"), time("2026-02-01T00:00:00Z"));
        let (caller, hash) = tokens.find(ada.reveal(), good).unwrap();
        assert_eq!(tokens.of_hash(&hash, good).as_ref(), Ok(&caller));
        assert!(tokens.of_hash(&hash, late).unwrap_err().contains("expired"));
        assert_eq!((caller.name(), caller.role()), ("ada", Some(Role::Operator)));
        assert_eq!(tokens.find(bob.reveal(), good).unwrap().0.name(), "bob");
        assert!(tokens.find(ada.reveal(), late).unwrap_err().contains("expired"));
        let revoked = Tokens::of(TokenFile { token: vec![of_ada] });
        assert!(revoked.find(bob.reveal(), good).unwrap_err().contains("revoked"));
        for bad in ["", "kiln_", &ada.reveal()[1..], &format!("{}0", ada.reveal()), &"x".repeat(1 << 20)] {
            assert!(tokens.find(bad, good).is_err());
        }
        // The hash is no token.
        assert!(tokens.find(&format!("kiln_{}", file.token[0].hash), good).is_err());
        assert!(!format!("{ada:?}").contains("0101"));
    }

    #[test]
    fn a_file_that_can_t_be_read_lets_nobody_in() {
        let (secret, good) = token(1, "ada", Role::Admin);
        assert!(Token::new(&secret, "ada".parse().unwrap(), Role::Node, good.created, good.expires).is_err());
        let text = TokenFile { token: vec![good] }.to_text().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens.toml");
        for (bad, why) in [
            (text.replace("\"admin\"", "\"builder\""), "a service's role"),
            (text.replace("\"admin\"", "\"god\""), "an unknown role"),
            (text.replace("hash = \"", "hash = \"zz"), "no hash"),
            (format!("{text}{text}"), "twice the same"),
            (text.replace("expires", "until"), "an unknown key"),
        ] {
            assert!(TokenFile::parse(&bad).is_err(), "{why}");
            std::fs::write(&path, &bad).unwrap();
            let tokens = Tokens::read(&"home".parse().unwrap(), std::slice::from_ref(&path));
            assert!(tokens.find(secret.reveal(), time("2026-01-02T00:00:00Z")).is_err(), "{why}");
        }
    }
}
