//! Secrets on their way from where they are kept into memory that is wiped when it is let go.

use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result};
use std::path::Path;

use zeroize::Zeroizing;

/// Bytes of a file that holds a secret: a key, a token, a password, or docker's `config.json` with many of them.
pub const MOST: usize = 1 << 20;
/// As much again is asked for at the end of a file, to see that it is one.
const ROOM: usize = 64;

/// The text of a file.
///
/// # Errors
/// It can't be read, is longer than [`MOST`], or is no text.
pub fn read(path: &Path) -> Result<Zeroizing<String>> {
    text(read_bytes(path)?)
}

/// The content of a file.
///
/// # Errors
/// It can't be read, or is longer than [`MOST`].
pub fn read_bytes(path: &Path) -> Result<Zeroizing<Vec<u8>>> {
    let file = File::open(path)?;
    let found = file.metadata()?;
    // A pipe does not say how much comes. Wiping takes its time, so that keys, which are small, have small buffers.
    let most = if found.is_file() { usize::try_from(found.len()).unwrap_or(MOST).min(MOST) } else { MOST };
    bytes_from(file, most)
}

/// The text of what may be a pipe.
///
/// # Errors
/// It can't be read, is longer than [`MOST`], or is no text.
pub fn read_from(from: impl Read) -> Result<Zeroizing<String>> {
    text(read_bytes_from(from)?)
}

/// The content of what may be a pipe.
///
/// # Errors
/// It can't be read, or is longer than [`MOST`].
pub fn read_bytes_from(from: impl Read) -> Result<Zeroizing<Vec<u8>>> {
    bytes_from(from, MOST)
}

/// At most so many.
fn bytes_from(from: impl Read, most: usize) -> Result<Zeroizing<Vec<u8>>> {
    // Large enough never to be moved: what is left behind by that would not be wiped.
    let mut bytes = Zeroizing::new(Vec::with_capacity(most + ROOM));
    from.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most {
        return Err(Error::new(ErrorKind::FileTooLarge, format!("there are more than {most} bytes")));
    }
    Ok(bytes)
}

/// The same memory, taken for a text.
fn text(mut bytes: Zeroizing<Vec<u8>>) -> Result<Zeroizing<String>> {
    let text = String::from_utf8(std::mem::take(&mut *bytes));
    text.map(Zeroizing::new).map_err(|error| {
        drop(Zeroizing::new(error.into_bytes()));
        Error::new(ErrorKind::InvalidData, "it is no text")
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_whole_and_what_is_too_long_or_no_text_is_refused_without_its_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        for text in ["", "s", &"secret".repeat(1000), &"x".repeat(MOST)] {
            std::fs::write(&path, text).unwrap();
            assert!(*read(&path).unwrap() == text, "{} bytes", text.len());
        }
        std::fs::write(&path, "s".repeat(MOST + 1)).unwrap();
        assert_eq!(read(&path).unwrap_err().kind(), ErrorKind::FileTooLarge);
        std::fs::write(&path, b"secret\xff").unwrap();
        let error = read(&path).unwrap_err();
        assert!(error.kind() == ErrorKind::InvalidData && !error.to_string().contains("secret"), "{error}");
        assert_eq!(*read_bytes(&path).unwrap(), b"secret\xff");
    }

    /// Gives a byte at a time, and sees where it lands.
    struct Slow<'a>(&'a mut Vec<usize>, usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
            if self.1 == 0 {
                return Ok(0);
            }
            buffer[0] = b's';
            self.1 -= 1;
            self.0.push(buffer.as_ptr().addr());
            Ok(1)
        }
    }

    #[test]
    fn nothing_is_left_where_it_is_not_wiped() {
        for size in [1, 1000, 4096] {
            let mut places = Vec::new();
            let text = text(bytes_from(Slow(&mut places, size), 4096).unwrap()).unwrap();
            let begin = text.as_ptr().addr();
            assert!(places.iter().all(|at| (begin..begin + size).contains(at)), "a part of it lay elsewhere");
        }
    }
}
