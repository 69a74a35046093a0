//! The secrets in a backup: encrypted with ChaCha20-Poly1305, by a key that is kept apart from it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom as _, SystemRandom};
use zeroize::Zeroizing;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::site::keys;

/// The first word of a key's file.
const HEAD: &str = "kiln-backup-key-1";
const LENGTH: usize = 32;

/// One key serves many backups: each seals with a nonce of its own, out of 96 random bits.
pub(crate) struct Key(LessSafeKey);

impl Key {
    /// The key in a file; a new one where there is no file. True where it was made.
    pub(crate) fn ensure(path: &Path) -> Outcome<(Self, bool)> {
        if path.exists() {
            return Ok((Self::read(path)?, false));
        }
        let mut secret = Zeroizing::new([0; LENGTH]);
        SystemRandom::new()
            .fill(secret.as_mut_slice())
            .map_err(|_| Failure::failed("making a backup key", "the kernel gives no random numbers"))?;
        let text = secret.iter().fold(Zeroizing::new(format!("{HEAD} ")), |mut text, byte| {
            text.push_str(&format!("{byte:02x}"));
            text
        });
        keys::write(path, &text)?;
        Ok((Self::of(&secret)?, true))
    }

    pub(crate) fn read(path: &Path) -> Outcome<Self> {
        let what = format!("the backup key {}", path.display());
        let mode = std::fs::metadata(path).during(&what)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(Failure::new(Code::Refused, what, "others may look into it")
                .todo(format!("chmod 600 {}", path.display())));
        }
        let text = kiln_secret::read(path).during(&what)?;
        let secret = text.trim().strip_prefix(HEAD).and_then(|digits| parse(digits.trim()));
        let wrong = || Failure::new(Code::Invalid, &what, format!("it is not `{HEAD}` and 64 digits"));
        let secret = secret.ok_or_else(wrong)?;
        Self::of(&secret)
    }

    fn of(secret: &[u8; LENGTH]) -> Outcome<Self> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, secret)
            .map_err(|_| Failure::failed("reading a backup key", "it has another length"))?;
        Ok(Self(LessSafeKey::new(key)))
    }

    /// `about` is sealed with it: what was sealed with one list of parts can't be put beside another.
    pub(super) fn seal(&self, about: &str, content: &[u8]) -> Outcome<Vec<u8>> {
        let failed = |_| Failure::failed("sealing the keys", "the cipher refused");
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(failed)?;
        let mut sealed = nonce.to_vec();
        let mut body = content.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        self.0.seal_in_place_append_tag(nonce, Aad::from(about), &mut body).map_err(failed)?;
        sealed.append(&mut body);
        Ok(sealed)
    }

    pub(super) fn open(&self, about: &str, sealed: &[u8]) -> Outcome<Zeroizing<Vec<u8>>> {
        let wrong = || {
            // The cipher can't tell the one from the other.
            let why = "they were sealed with another key, or the backup was changed after it was made: its settings, \
                       its stores or another part are not those that the keys were sealed with";
            Failure::new(Code::Refused, "opening the keys in the backup", why).reason("bad_seal").todo(
                "name the key file that the backup was made with: --key FILE; where it is that one, do not use this \
                 file, and take another copy of it or an older backup",
            )
        };
        let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or_else(wrong)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| wrong())?;
        let mut body = Zeroizing::new(body.to_vec());
        let length = self.0.open_in_place(nonce, Aad::from(about), &mut body).map_err(|_| wrong())?.len();
        body.truncate(length);
        Ok(body)
    }
}

fn parse(digits: &str) -> Option<Zeroizing<[u8; LENGTH]>> {
    let mut secret = Zeroizing::new([0; LENGTH]);
    if digits.len() != 2 * LENGTH || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in secret.iter_mut().enumerate() {
        *byte = u8::from_str_radix(digits.get(2 * index..2 * index + 2)?, 16).ok()?;
    }
    Some(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_is_opened_by_its_key_alone_and_about_the_same_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("key"), folder.path().join("other"));
        let (key, made) = Key::ensure(&path).unwrap();
        assert!(made && !Key::ensure(&path).unwrap().1);
        let sealed = key.seal("home", b"secret").unwrap();
        assert!(!sealed.windows(6).any(|part| part == b"secret"));
        assert_ne!(key.seal("home", b"secret").unwrap(), sealed);
        assert_eq!(Key::read(&path).unwrap().open("home", &sealed).unwrap().as_slice(), b"secret");
        assert!(key.open("else", &sealed).is_err());
        assert!(Key::ensure(&other).unwrap().0.open("home", &sealed).is_err());
        let mut changed = sealed.clone();
        changed[20] ^= 1;
        assert!(key.open("home", &changed).is_err() && key.open("home", b"short").is_err());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(Key::read(&path).is_err());
        std::fs::write(&other, "kiln-backup-key-1 00").unwrap();
        assert!(Key::read(&other).is_err());
    }
}
