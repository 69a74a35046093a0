use std::io::{self, Read, Write};

use super::{BLOCK, Entry, Kind};

/// Writes ustar headers with PAX records only for what does not fit them, so that the same entries give the same bytes.
pub struct Writer<W> {
    inner: W,
    buffer: Vec<u8>,
}

impl<W: Write> Writer<W> {
    pub fn new(inner: W) -> Self {
        Self { inner, buffer: vec![0; 1 << 17] }
    }

    /// # Errors
    /// It can't be written, or the content has not the entry's size.
    pub fn append(&mut self, entry: &Entry, content: &mut impl Read) -> io::Result<()> {
        let mut path = entry.path.clone();
        if entry.kind == Kind::Directory {
            path.push(b'/');
        }
        let mut records = Vec::new();
        let split = split_name(&path);
        if split.is_none() {
            record(&mut records, b"path", &path);
        }
        if entry.link.len() > 100 {
            record(&mut records, b"linkpath", &entry.link);
        }
        // Eleven octal digits for sizes, seven for owners.
        if entry.size >= 1 << 33 {
            record(&mut records, b"size", entry.size.to_string().as_bytes());
        }
        if entry.uid >= 1 << 21 {
            record(&mut records, b"uid", entry.uid.to_string().as_bytes());
        }
        if entry.gid >= 1 << 21 {
            record(&mut records, b"gid", entry.gid.to_string().as_bytes());
        }
        for (name, value) in &entry.xattrs {
            record(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        if !records.is_empty() {
            let header = header((b"", b"PaxHeader"), b'x', 0o644, 0, 0, records.len() as u64, 0, b"");
            self.inner.write_all(&header)?;
            self.inner.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        let flag = match entry.kind {
            Kind::File => b'0',
            Kind::Hardlink => b'1',
            Kind::Symlink => b'2',
            Kind::CharDevice => b'3',
            Kind::BlockDevice => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
        };
        let name = split.unwrap_or_else(|| (b"", &path[..path.len().min(100)]));
        let header = header(
            name,
            flag,
            entry.mode,
            if entry.uid < 1 << 21 { entry.uid } else { 0 },
            if entry.gid < 1 << 21 { entry.gid } else { 0 },
            if entry.size < 1 << 33 { entry.size } else { 0 },
            u64::try_from(entry.mtime).unwrap_or(0),
            &entry.link[..entry.link.len().min(100)],
        );
        self.inner.write_all(&header)?;
        let mut left = entry.size;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let n = content.read(&mut self.buffer[..most])?;
            if n == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "a file became shorter while it was read",
                ));
            }
            self.inner.write_all(&self.buffer[..n])?;
            left -= n as u64;
        }
        self.pad(entry.size)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let rest = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        if rest > 0 {
            self.inner.write_all(&[0; BLOCK][rest..])?;
        }
        Ok(())
    }

    /// Writes the end mark.
    ///
    /// # Errors
    /// It can't be written.
    pub fn finish(mut self) -> io::Result<W> {
        self.inner.write_all(&[0; 2 * BLOCK])?;
        Ok(self.inner)
    }
}

/// The length at its beginning counts itself.
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Prefix and name for the two fields of a ustar header, at the last slash that lets both fit.
fn split_name(path: &[u8]) -> Option<(&[u8], &[u8])> {
    if path.len() <= 100 {
        return Some((b"", path));
    }
    (0..path.len().min(156))
        .rev()
        .filter(|at| path[*at] == b'/')
        .map(|at| (&path[..at], &path[at + 1..]))
        .find(|(prefix, name)| !prefix.is_empty() && (1..=100).contains(&name.len()))
}

#[allow(clippy::too_many_arguments)] // The fields of one header.
fn header(
    (prefix, name): (&[u8], &[u8]),
    flag: u8,
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    mtime: u64,
    link: &[u8],
) -> [u8; BLOCK] {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name);
    put(100, format!("{mode:07o}\0").as_bytes());
    put(108, format!("{uid:07o}\0").as_bytes());
    put(116, format!("{gid:07o}\0").as_bytes());
    put(124, format!("{size:011o}\0").as_bytes());
    put(136, format!("{mtime:011o}\0").as_bytes());
    put(148, b"        ");
    put(156, &[flag]);
    put(157, link);
    put(257, b"ustar\x0000");
    put(329, b"0000000\0");
    put(337, b"0000000\0");
    put(345, prefix);
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header
}
