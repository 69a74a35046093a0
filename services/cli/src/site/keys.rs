//! The site's keys: one that signs images, one for each user of the broker.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use ed25519_dalek::SigningKey;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _};
use kiln_bus::User;
use kiln_model::name::SiteName;
use kiln_service::config::Paths;
use zeroize::Zeroizing;

use crate::failure::{During as _, Failure, Outcome};

/// Makes what is missing; what there is stays.
pub(crate) fn ensure(paths: Paths<'_>) -> Outcome {
    let path = paths.signing_key();
    if !path.exists() {
        let what = "making the key that signs images";
        let mut secret = Zeroizing::new([0; 32]);
        // The kernel's own source, asked directly: what is signed with it must not be guessed.
        File::open("/dev/urandom")
            .and_then(|mut it| std::io::Read::read_exact(&mut it, secret.as_mut_slice()))
            .during(what)?;
        let key = SigningKey::from_bytes(&secret);
        let public = key.verifying_key().to_public_key_pem(LineEnding::LF);
        let public = public.map_err(|error| Failure::failed(what, error))?;
        let private = key.to_pkcs8_pem(LineEnding::LF).map_err(|error| Failure::failed(what, error))?;
        // The public half first: with the private one there, both are.
        write(&paths.signing_pub(), &public)?;
        write(&path, &private)?;
    }
    for user in User::ALL {
        let path = paths.nats_seed(user);
        if !path.exists() {
            let key = kiln_bus::new_key().map_err(|error| {
                Failure::failed(format!("making the key of the broker's user {user}"), error)
            })?;
            write(&path, &Zeroizing::new([key.seed.as_str(), "\n"].concat()))?;
        }
    }
    Ok(())
}

/// The broker's section of users, from the keys that there are.
pub(crate) fn accounts_section(paths: Paths<'_>, site: &SiteName) -> Outcome<String> {
    let mut users = Vec::new();
    for user in User::ALL {
        let path = paths.nats_seed(user);
        let seed = kiln_secret::read(&path).during(format_args!("reading {}", path.display()))?;
        let pair = nkeys::KeyPair::from_seed(seed.trim())
            .map_err(|error| Failure::failed(format!("the key {}", path.display()), error))?;
        users.push((user, pair.public_key()));
    }
    Ok(kiln_bus::accounts_section(site, &users))
}

/// Whole or not at all, and for root's eyes alone.
pub(crate) fn write(path: &Path, content: &(impl AsRef<[u8]> + ?Sized)) -> Outcome {
    let what = format!("writing {}", path.display());
    let aside = path.with_extension("new");
    let mut options = File::options();
    options.create(true).write(true).truncate(true).mode(0o600);
    options
        .open(&aside)
        .and_then(|mut file| file.write_all(content.as_ref()).and_then(|()| file.sync_all()))
        .and_then(|()| std::fs::rename(&aside, path))
        .during(what)
}
