use std::collections::BTreeMap;
use std::io::{self, Read};

use super::{BLOCK, Entry, Kind, PATH_LIMIT, Problem, clean_path};

/// Extended attributes of one file can be 64 KiB each; nobody needs more of them than this.
const EXTENSION_LIMIT: u64 = 256 << 10;

/// Reads ustar, GNU long names and PAX records, and refuses what is not well-formed.
pub struct Reader<R> {
    inner: R,
    /// Of the current entry's content and padding.
    left: u64,
    padding: u64,
}

#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<i64>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl<R: Read> Reader<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, left: 0, padding: 0 }
    }

    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The next entry; what is left of the current one's content is skipped.
    ///
    /// # Errors
    /// The stream ends too early, or holds something that is not well-formed.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, Problem> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            self.skip_rest()?;
            let Some(header) = self.header()? else {
                if extended {
                    return Err(Problem::refused(b"", "an extension header without its entry"));
                }
                self.only_zeros_follow()?;
                return Ok(None);
            };
            let name = header_name(&header);
            let size = number(&header[124..136])
                .ok_or_else(|| Problem::refused(&name, "its size is not a number"))?;
            match header[156] {
                b'L' => {
                    let text = self.extension(&name, size)?;
                    set_once(&mut extensions.path, without_end(text), &name)?;
                }
                b'K' => {
                    let text = self.extension(&name, size)?;
                    set_once(&mut extensions.link, without_end(text), &name)?;
                }
                b'x' => {
                    let records = self.extension(&name, size)?;
                    pax(&records, &mut extensions).map_err(|why| Problem::refused(&name, why))?;
                }
                b'g' => {
                    let mut global = Extensions::default();
                    let records = self.extension(&name, size)?;
                    pax(&records, &mut global).map_err(|why| Problem::refused(&name, why))?;
                    let says_nothing = global.path.is_none()
                        && global.link.is_none()
                        && global.size.is_none()
                        && global.uid.is_none()
                        && global.gid.is_none()
                        && global.mtime.is_none()
                        && global.xattrs.is_empty();
                    if !says_nothing {
                        return Err(Problem::refused(&name, "a global header that changes what follows"));
                    }
                    continue;
                }
                flag => return self.entry(&header, flag, name, size, extensions).map(Some),
            }
            extended = true;
        }
    }

    fn entry(
        &mut self,
        header: &[u8; BLOCK],
        flag: u8,
        name: Vec<u8>,
        header_size: u64,
        extensions: Extensions,
    ) -> Result<Entry, Problem> {
        let raw = extensions.path.unwrap_or(name);
        let refused = |why: &str| Problem::refused(&raw, why);
        let kind = match flag {
            // An old way to write a directory.
            b'0' | 0 if raw.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::Hardlink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(refused("sparse files are not taken")),
            _ => return Err(refused("it is of an unknown type")),
        };
        let size = match extensions.size {
            // Where both are given and differ, one reader goes on at another place than the next one.
            Some(size) if header_size != 0 && header_size != size => {
                return Err(refused("its two sizes differ"));
            }
            Some(size) => size,
            None => header_size,
        };
        if kind != Kind::File && size != 0 {
            return Err(refused("it has content, but is not a file"));
        }
        let path = clean_path(&raw).map_err(refused)?;
        let link = extensions.link.unwrap_or_else(|| text(&header[157..257]));
        let link = match kind {
            Kind::Hardlink => match clean_path(&link) {
                Ok(link) if link.is_empty() => return Err(refused("a hard link to nothing")),
                Ok(link) => link,
                Err(_) => return Err(refused("a hard link to outside")),
            },
            Kind::Symlink if link.is_empty() => return Err(refused("a symbolic link to nothing")),
            Kind::Symlink if link.len() >= PATH_LIMIT => {
                return Err(refused("a symbolic link of 4096 bytes or more"));
            }
            Kind::Symlink => link,
            _ => Vec::new(),
        };
        if path.is_empty() && kind != Kind::Directory {
            return Err(refused("the root is not a directory"));
        }
        let field = |range: std::ops::Range<usize>, what: &'static str| {
            number(&header[range]).and_then(|n| u32::try_from(n).ok()).ok_or_else(|| refused(what))
        };
        let mode = field(100..108, "its mode is not a number")? & 0o7777;
        let uid = extensions.uid.map_or_else(|| field(108..116, "its owner is not a number"), Ok)?;
        let gid = extensions.gid.map_or_else(|| field(116..124, "its group is not a number"), Ok)?;
        let mtime = match extensions.mtime {
            Some(mtime) => mtime,
            None => number(&header[136..148])
                .and_then(|n| i64::try_from(n).ok())
                .ok_or_else(|| refused("its time is not a number"))?,
        };
        // -1 means "leave as it is" to chown(2).
        if uid == u32::MAX || gid == u32::MAX {
            return Err(refused("its owner is out of range"));
        }
        self.begin(size);
        Ok(Entry { path, kind, size, mode, uid, gid, mtime, link, xattrs: extensions.xattrs })
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
    }

    fn extension(&mut self, name: &[u8], size: u64) -> Result<Vec<u8>, Problem> {
        if size > EXTENSION_LIMIT {
            return Err(Problem::refused(name, "an extension header of more than 256 KiB"));
        }
        self.begin(size);
        let mut content = Vec::new();
        self.read_to_end(&mut content)?;
        Ok(content)
    }

    fn skip_rest(&mut self) -> Result<(), Problem> {
        let rest = self.left + self.padding;
        let skipped = io::copy(&mut (&mut self.inner).take(rest), &mut io::sink())?;
        if skipped != rest {
            return Err(truncated().into());
        }
        self.left = 0;
        self.padding = 0;
        Ok(())
    }

    /// `None` at the end mark.
    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, Problem> {
        let mut header = [0; BLOCK];
        self.inner.read_exact(&mut header).map_err(|_| truncated())?;
        if header.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let wanted = number(&header[148..156]);
        let blank = 8 * u64::from(b' ');
        let sum = |bytes: &[u8]| bytes.iter().map(|b| u64::from(*b)).sum::<u64>();
        if wanted != Some(sum(&header[..148]) + blank + sum(&header[156..])) {
            return Err(Problem::refused(&text(&header[..100]), "its header's checksum is wrong"));
        }
        Ok(Some(header))
    }

    fn only_zeros_follow(&mut self) -> Result<(), Problem> {
        let mut second = [0; BLOCK];
        self.inner.read_exact(&mut second).map_err(|_| truncated())?;
        let mut block = second.to_vec();
        loop {
            if block.iter().any(|b| *b != 0) {
                return Err(Problem::refused(b"", "something follows the end of the archive"));
            }
            block.resize(1 << 14, 0);
            let n = self.inner.read(&mut block)?;
            if n == 0 {
                return Ok(());
            }
            block.truncate(n);
        }
    }
}

/// The current entry's content.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 || buffer.is_empty() {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.inner.read(&mut buffer[..most])?;
        if n == 0 {
            return Err(truncated());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends too early")
}

fn set_once(slot: &mut Option<Vec<u8>>, value: Vec<u8>, name: &[u8]) -> Result<(), Problem> {
    if slot.replace(value).is_some() {
        return Err(Problem::refused(name, "it has two long names"));
    }
    Ok(())
}

/// Up to the first NUL.
fn text(field: &[u8]) -> Vec<u8> {
    field.split(|b| *b == 0).next().unwrap_or_default().to_vec()
}

/// GNU tar ends a long name by a NUL; one inside stays, and is refused with the path.
fn without_end(mut name: Vec<u8>) -> Vec<u8> {
    if name.last() == Some(&0) {
        name.pop();
    }
    name
}

fn header_name(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = text(&header[..100]);
    // GNU's magic is `ustar  `, and it keeps times where POSIX has the prefix.
    let prefix = if &header[257..263] == b"ustar\0" { text(&header[345..500]) } else { Vec::new() };
    if prefix.is_empty() { name } else { [prefix.as_slice(), b"/", name.as_slice()].concat() }
}

/// Octal digits, or GNU's binary form where the first bit is set. Negative numbers are refused.
fn number(field: &[u8]) -> Option<u64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let mut bytes = field.to_vec();
        bytes[0] &= 0x7f;
        let (high, low) = bytes.split_at(bytes.len().saturating_sub(8));
        // Without the flag a positive number has nothing but zeros in front of the last eight bytes.
        return high.iter().all(|b| *b == 0).then(|| low.iter().fold(0, |n, b| n << 8 | u64::from(*b)));
    }
    let digits = field.split(|b| *b == 0).next()?.trim_ascii();
    let mut value: u64 = 0;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(u64::from(digit - b'0'))?;
    }
    Some(value)
}

/// Records `<length> <key>=<value>\n`, where the length counts the whole record.
fn pax(mut records: &[u8], into: &mut Extensions) -> Result<(), &'static str> {
    const MALFORMED: &str = "a malformed PAX record";
    while !records.is_empty() {
        let space = records.iter().position(|b| *b == b' ').ok_or(MALFORMED)?;
        let length: usize =
            decimal(&records[..space]).and_then(|n| usize::try_from(n).ok()).ok_or(MALFORMED)?;
        if length <= space + 1 || length > records.len() || records[length - 1] != b'\n' {
            return Err(MALFORMED);
        }
        let record = &records[space + 1..length - 1];
        records = &records[length..];
        let equals = record.iter().position(|b| *b == b'=').ok_or(MALFORMED)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let small = |value| decimal(value).and_then(|n| u32::try_from(n).ok()).ok_or(MALFORMED);
        let twice = match key {
            b"path" => into.path.replace(value.to_vec()).is_some(),
            b"linkpath" => into.link.replace(value.to_vec()).is_some(),
            b"size" => into.size.replace(decimal(value).ok_or(MALFORMED)?).is_some(),
            b"uid" => into.uid.replace(small(value)?).is_some(),
            b"gid" => into.gid.replace(small(value)?).is_some(),
            b"mtime" => {
                let whole = value.split(|b| *b == b'.').next().unwrap_or_default();
                let seconds = decimal(whole).and_then(|n| i64::try_from(n).ok());
                into.mtime.replace(seconds.ok_or("its time is not a number, or before 1970")?).is_some()
            }
            _ if key.starts_with(b"GNU.sparse") => return Err("sparse files are not taken"),
            _ => match key.strip_prefix(b"SCHILY.xattr.") {
                Some(b"") => return Err(MALFORMED),
                Some(name) => into.xattrs.insert(name.to_vec(), value.to_vec()).is_some(),
                None => false,
            },
        };
        if twice {
            return Err("a PAX record that is there twice");
        }
    }
    Ok(())
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0_u64, |n, b| {
        b.is_ascii_digit().then(|| n.checked_mul(10)?.checked_add(u64::from(b - b'0')))?
    })
}
