//! Who we are to a registry, as docker's `config.json` says it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use oci_client::secrets::RegistryAuth;
use serde::Deserialize;
use zeroize::{Zeroize as _, ZeroizeOnDrop, Zeroizing};

use crate::Error;

/// User and password, wiped when they are let go. The client of registries copies them for as long as it lives.
pub(crate) struct Credentials(RegistryAuth);

impl Credentials {
    pub(crate) const fn anonymous() -> Self {
        Self(RegistryAuth::Anonymous)
    }

    pub(crate) const fn expose(&self) -> &RegistryAuth {
        &self.0
    }
}

impl Drop for Credentials {
    fn drop(&mut self) {
        match &mut self.0 {
            RegistryAuth::Anonymous => {}
            RegistryAuth::Basic(user, password) => {
                user.zeroize();
                password.zeroize();
            }
            RegistryAuth::Bearer(token) => token.zeroize(),
        }
    }
}

impl ZeroizeOnDrop for Credentials {}

#[derive(Deserialize)]
struct Config<'a> {
    #[serde(default, borrow)]
    auths: BTreeMap<String, Auth<'a>>,
}

#[derive(Deserialize)]
struct Auth<'a> {
    /// `user:password` in base64, where the file is, which is wiped.
    #[serde(borrow)]
    auth: Cow<'a, str>,
}

/// What the file says of a registry.
///
/// # Errors
/// It can't be read, or says nothing of this one.
pub(crate) fn of(host: &str, path: &Path) -> Result<Credentials, Error> {
    let wrong = |why: String| Error::Credentials { path: path.to_owned(), why };
    let text = kiln_secret::read(path).map_err(|error| wrong(error.to_string()))?;
    parse(host, &text).map_err(wrong)
}

fn parse(host: &str, text: &str) -> Result<Credentials, String> {
    // The words of the parser may hold what it stumbled over.
    let config: Config = serde_json::from_str(text)
        .map_err(|error| format!("line {}: it is no `config.json` with `auths`", error.line()))?;
    let auth = config.auths.get(host).ok_or_else(|| format!("`auths` says nothing of {host}"))?;
    let decoded = BASE64.decode(auth.auth.as_bytes()).map(Zeroizing::new);
    let decoded = decoded.map_err(|_| format!("`auth` of {host} is not base64"))?;
    let both = std::str::from_utf8(&decoded).ok().and_then(|text| text.split_once(':'));
    let (user, password) = both.ok_or_else(|| format!("`auth` of {host} is not `user:password`"))?;
    Ok(Credentials(RegistryAuth::Basic(user.to_owned(), password.to_owned())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const fn is_wiped<T: ZeroizeOnDrop>() {}
    const _: () = is_wiped::<Credentials>();

    #[test]
    fn docker_s_file_says_who_we_are_and_no_error_says_the_password() {
        let text =
            r#"{"auths": {"registry.example": {"auth": "a2lsbjpzM2NyZXQ6eA=="}, "x": {"auth": "c2VjcmV0"}}}"#;
        let found = parse("registry.example", text).unwrap();
        assert!(*found.expose() == RegistryAuth::Basic("kiln".to_owned(), "s3cret:x".to_owned()));
        for (host, text) in [
            ("other", text),
            ("x", text),
            ("x", "{"),
            ("x", r#"{"auths": {"x": "c2VjcmV0"}}"#),
            ("x", r#"{"auths": {"x": {"auth": "secret!"}}}"#),
        ] {
            let error = parse(host, text).err().unwrap();
            assert!(!error.contains("secret") && !error.contains("c2Vj"), "{error}");
        }
    }
}
