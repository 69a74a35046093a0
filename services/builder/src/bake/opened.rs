//! A package's files as a tar compressed by zstd, behind the blake3 of what follows.
//!
//! Made on the side when a package is first unpacked. Never synced: one that a crash has cut has another hash, and is as good
//! as none.

use std::fs;
use std::io::{self, Cursor, Read, Write as _};
use std::path::{Path, PathBuf};

use super::whole;

const HASH: usize = 32;
/// Of files; a larger package is read from its own archive each time, as it would be held in memory here.
const LIMIT: u64 = 512 << 20;
/// The fastest that is still smaller than half.
const LEVEL: i32 = 1;

/// Nothing where it is not there, or not whole.
pub(crate) fn read(path: &Path) -> Option<impl Read + Send + 'static> {
    let content = fs::read(path).ok()?;
    let (hash, rest) = content.split_at_checked(HASH)?;
    if blake3::hash(rest).as_bytes() != hash {
        return None;
    }
    let mut content = Cursor::new(content);
    content.set_position(HASH as u64);
    zstd::Decoder::with_buffer(content).ok()
}

/// Hands a stream on, and keeps what went by when it has ended.
pub(crate) struct Keeping<R> {
    inner: R,
    encoder: Option<zstd::Encoder<'static, Vec<u8>>>,
    size: u64,
    path: PathBuf,
}

impl<R: Read> Keeping<R> {
    pub(crate) fn new(inner: R, path: &Path) -> Self {
        Self { inner, encoder: zstd::Encoder::new(Vec::new(), LEVEL).ok(), size: 0, path: path.to_owned() }
    }

    /// False once it was kept, or is too large to be.
    pub(crate) fn keeps(&self) -> bool {
        self.encoder.is_some()
    }

    fn put(&self, content: &[u8]) -> io::Result<()> {
        whole::write(&self.path, &[blake3::hash(content).as_bytes(), content])
    }
}

impl<R: Read> Read for Keeping<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.size += n as u64;
        if n == 0 && !buffer.is_empty() {
            // A store that can't be written costs time, not the bake.
            if let Some(encoder) = self.encoder.take()
                && let Err(error) = encoder.finish().and_then(|content| self.put(&content))
            {
                tracing::warn!(path = %self.path.display(), %error, "a package's files are not kept for the next bake");
            }
        } else if self.size > LIMIT {
            self.encoder = None;
        } else if let Some(encoder) = &mut self.encoder {
            encoder.write_all(&buffer[..n])?;
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_by_can_be_read_again_unless_it_was_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("opened");
        let content: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let mut through = Vec::new();
        Keeping::new(content.as_slice(), &path).read_to_end(&mut through).unwrap();
        assert_eq!(through, content);
        let mut again = Vec::new();
        super::read(&path).unwrap().read_to_end(&mut again).unwrap();
        assert_eq!(again, content);

        let kept = fs::read(&path).unwrap();
        fs::write(&path, &kept[..kept.len() - 1]).unwrap();
        assert!(super::read(&path).is_none());
        fs::write(&path, &kept[..10]).unwrap();
        assert!(super::read(&path).is_none());

        // A stream that was not read to its end is not kept.
        let other = folder.path().join("other");
        Keeping::new(content.as_slice(), &other).read_exact(&mut [0; 1000]).unwrap();
        assert!(!other.exists());
    }
}
