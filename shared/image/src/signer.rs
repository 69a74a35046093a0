//! Who signs: a key in a file, or a command that has the key.

use std::io::{self, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};
use rustix::io::ioctl_fionbio;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

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
    /// It has answered when it ends, within 30 seconds: what it left running in its process group is killed then, and what
    /// that would still have printed is not waited for.
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
        let answer = asked(run, bytes, PATIENCE).map_err(failed)?;
        let signature =
            BASE64.decode(answer.trim_ascii()).ok().and_then(|it| Signature::from_slice(&it).ok());
        let signature = signature.ok_or_else(|| failed("it printed no signature in base64".to_owned()))?;
        // Of another key, it would be found at the launch alone.
        public.verify_strict(bytes, &signature).map_err(|_| {
            failed("its signature is not one of the public key that is named beside it".to_owned())
        })?;
        Ok(signature)
    }
}

fn asked(run: &[String], bytes: &[u8], patience: Duration) -> Result<Vec<u8>, String> {
    let words = |error: io::Error| error.to_string();
    let (program, arguments) = run.split_first().ok_or("none is named")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(words)?;
    let ended = converse(&mut child, bytes, patience);
    // The group lives as long as its leader has not been waited for, so it is no other one's.
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    let status = child.wait().map_err(words)?;
    ended?;
    if !status.success() {
        return Err(format!("it ended with {status}"));
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        // All that it printed is there. Whoever left its group may hold the other end open for good.
        ioctl_fionbio(&stdout, true).map_err(|errno| words(errno.into()))?;
        match stdout.take(ANSWER).read_to_end(&mut answer) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(words(error)),
            _ => {}
        }
    }
    Ok(answer)
}

/// Gives it what to sign, and sees it end, without taking its status. What is sent and what is answered both fit into a pipe,
/// so neither side waits for the other to read; who prints more than that waits until the time is over.
fn converse(child: &mut Child, bytes: &[u8], patience: Duration) -> Result<(), String> {
    let words = |error: io::Error| error.to_string();
    match child.stdin.take() {
        Some(mut stdin) => stdin.write_all(bytes).map_err(words)?,
        None => return Err("it takes no input".to_owned()),
    }
    let begin = Instant::now();
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    loop {
        match waitid(WaitId::Pid(Pid::from_child(child)), look) {
            Ok(Some(_)) => return Ok(()),
            Err(errno) => return Err(words(errno.into())),
            Ok(None) if begin.elapsed() > patience => {
                return Err(format!("it did not end within {patience:?}"));
            }
            Ok(None) => std::thread::sleep(LOOK),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn shell(does: &str) -> Vec<String> {
        ["/bin/sh", "-c", does].map(str::to_owned).into()
    }

    /// The number of a process that a script wrote into a file.
    fn noted(file: &Path) -> u32 {
        std::fs::read_to_string(file).unwrap().trim().parse().unwrap()
    }

    fn ends(process: u32) {
        let begin = Instant::now();
        // Also one that nobody has waited for has ended.
        let state = || std::fs::read_to_string(format!("/proc/{process}/stat"));
        while state().is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(begin.elapsed() < LONG, "process {process} runs on");
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn what_a_command_leaves_running_holds_nobody_up_and_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join("left");
        let begin = Instant::now();
        let does = format!("cat > /dev/null; sleep 300 & echo $! > {}; echo signed", left.display());
        assert_eq!(asked(&shell(&does), b"sign", PATIENCE), Ok(b"signed\n".to_vec()));
        ends(noted(&left));
        // Out of its group it is not found, and is not waited for either.
        let does = "cat > /dev/null; setsid sleep 20 & echo signed";
        assert_eq!(asked(&shell(does), b"sign", PATIENCE), Ok(b"signed\n".to_vec()));
        assert!(begin.elapsed() < LONG, "{:?}", begin.elapsed());
    }

    #[test]
    fn a_command_that_does_not_end_is_killed_with_all_that_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let (own, started) = (folder.path().join("own"), folder.path().join("started"));
        let (own_path, started_path) = (own.display(), started.display());
        let patience = Duration::from_millis(500);
        for then in ["wait", "yes"] {
            let does = format!(
                "cat > /dev/null; echo $$ > {own_path}; sleep 300 & echo $! > {started_path}; {then}"
            );
            let refused = asked(&shell(&does), b"sign", patience).unwrap_err();
            assert_eq!(refused, "it did not end within 500ms");
            ends(noted(&own));
            ends(noted(&started));
        }
    }

    #[test]
    fn no_more_of_an_answer_is_kept_than_a_signature_could_need() {
        let answer = asked(&shell("cat > /dev/null; head -c 60000 /dev/zero"), b"sign", PATIENCE).unwrap();
        assert_eq!(answer.len() as u64, ANSWER);
    }
}
