//! Who signs: a key in a file, or a command that has the key.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};

use crate::error::Error;
use crate::signature::{KeyId, read_signing_key, read_trusted_key};

/// A command asks a machine or a card; nobody types anything.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(10);
/// A signature in base64 is 88 characters.
const ANSWER: u64 = 4096;

#[derive(Debug)]
pub struct Signer(Kind);

#[derive(Debug)]
enum Kind {
    Key(SigningKey),
    Command { run: Vec<String>, public: VerifyingKey },
}

impl From<SigningKey> for Signer {
    fn from(key: SigningKey) -> Self {
        Self(Kind::Key(key))
    }
}

impl Signer {
    /// A private key: ed25519, PKCS#8, PEM.
    ///
    /// # Errors
    /// It can't be read, or is no such key.
    pub fn file(path: &Path) -> Result<Self, Error> {
        Ok(Self(Kind::Key(read_signing_key(path)?)))
    }

    /// A program with its arguments, which is given what is to be signed on standard input and prints the 64 bytes of the
    /// ed25519 signature in base64; and the public key that its signatures are checked with.
    ///
    /// # Errors
    /// The public key can't be read, or is none.
    pub fn command(run: Vec<String>, public: &Path) -> Result<Self, Error> {
        Ok(Self(Kind::Command { run, public: read_trusted_key(public)? }))
    }

    pub fn public(&self) -> VerifyingKey {
        match &self.0 {
            Kind::Key(key) => key.verifying_key(),
            Kind::Command { public, .. } => *public,
        }
    }

    pub fn id(&self) -> KeyId {
        KeyId::of(&self.public())
    }

    pub(crate) fn sign(&self, bytes: &[u8]) -> Result<Signature, Error> {
        let (run, public) = match &self.0 {
            Kind::Key(key) => return Ok(key.sign(bytes)),
            Kind::Command { run, public } => (run, public),
        };
        let failed = |why: String| Error::Key {
            path: run.first().map(PathBuf::from).unwrap_or_default(),
            why: format!("the command that signs failed: {why}"),
        };
        let answer = asked(run, bytes).map_err(failed)?;
        let signature = BASE64.decode(answer.trim()).ok().and_then(|it| Signature::from_slice(&it).ok());
        let signature = signature.ok_or_else(|| failed("it printed no signature in base64".to_owned()))?;
        // Of another key, it would be found at the launch alone.
        public.verify_strict(bytes, &signature).map_err(|_| {
            failed("its signature is not one of the public key that is named beside it".to_owned())
        })?;
        Ok(signature)
    }
}

fn asked(run: &[String], bytes: &[u8]) -> Result<String, String> {
    let (program, arguments) = run.split_first().ok_or("none is named")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| error.to_string())?;
    let answer = converse(&mut child, bytes);
    if answer.is_err() {
        // Gone already, or it goes now; nothing of it is left to wait for.
        let _ = child.kill();
        let _ = child.wait();
    }
    answer
}

/// What is sent and what is answered both fit into a pipe, so neither side waits for the other to read.
fn converse(child: &mut Child, bytes: &[u8]) -> Result<String, String> {
    let words = |error: std::io::Error| error.to_string();
    match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(bytes).map_err(words)?,
        None => return Err("it takes no input".to_owned()),
    }
    let begin = Instant::now();
    let status = loop {
        match child.try_wait().map_err(words)? {
            Some(status) => break status,
            None if begin.elapsed() > PATIENCE => {
                return Err(format!("it did not end within {} s", PATIENCE.as_secs()));
            }
            None => std::thread::sleep(LOOK),
        }
    };
    if !status.success() {
        return Err(format!("it ended with {status}"));
    }
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ANSWER).read_to_string(&mut answer).map_err(words)?;
    }
    Ok(answer)
}
