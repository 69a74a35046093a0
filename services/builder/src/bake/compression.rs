//! Streams that may be compressed.

use std::io::{self, BufRead, Read};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    /// By the first bytes of a stream, whatever its name is.
    pub(crate) fn of(head: &[u8]) -> Self {
        const MAGIC: [(&[u8], Compression); 3] = [
            (&[0x1f, 0x8b], Compression::Gzip),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
        ];
        let found = MAGIC.iter().find(|(magic, _)| head.starts_with(magic));
        found.map_or(Self::None, |(_, compression)| *compression)
    }

    pub(crate) fn open(self, raw: impl BufRead + Send + 'static) -> io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::None => Box::new(raw),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(raw)),
            Self::Xz => Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(raw)),
            Self::Zstd => Box::new(zstd::Decoder::with_buffer(raw)?),
        })
    }
}
