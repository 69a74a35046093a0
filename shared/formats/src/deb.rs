//! `.deb` files: an `ar` archive of a control tar and a data tar.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::Range;

use kiln_image::tar::{Kind, Reader};

use crate::compression::Compression;
use crate::deb822::{self, Paragraph};

/// Debian's largest control tar is a few MiB.
const CONTROL_LIMIT: u64 = 64 << 20;
const CONTROL_FILES_LIMIT: usize = 64;
/// Bytes of a data tar, without compression.
pub const DATA_LIMIT: u64 = 16 << 30;

/// What a package's file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    pub control: Paragraph,
    /// What goes into dpkg's `info` folder, with its permission bits.
    pub control_files: Vec<(String, u32, Vec<u8>)>,
    /// Its files.
    pub data: Member,
}

/// A part of a package's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    offset: u64,
    size: u64,
    compression: Compression,
}

impl Package {
    /// Reads the control part.
    ///
    /// # Errors
    /// In words, where it is no package, or can't be read.
    pub fn read(file: &File) -> Result<Self, String> {
        let (control, data) = members(file)?;
        let (text, control_files) = read_control(file, &control)?;
        let mut paragraphs = deb822::parse(&text)?;
        match paragraphs.as_mut_slice() {
            [control] => Ok(Self { control: std::mem::take(control), control_files, data }),
            _ => Err("its control file is not one paragraph".to_owned()),
        }
    }
}

impl Member {
    /// Compressed, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A tar, without compression.
    ///
    /// # Errors
    /// The file can't be read, or is compressed in another way than its name says.
    pub fn open(&self, file: &File) -> io::Result<Box<dyn Read + Send>> {
        let mut file = file.try_clone()?;
        file.seek(SeekFrom::Start(self.offset))?;
        let raw = BufReader::with_capacity(1 << 16, file.take(self.size));
        self.compression.open(raw)
    }
}

/// The control and the data member: `debian-binary` first, then these two, others with a name that begins with `_` aside.
fn members(mut file: &File) -> Result<(Member, Member), String> {
    let text = |error: io::Error| error.to_string();
    let mut magic = [0; 8];
    file.read_exact(&mut magic).map_err(text)?;
    if &magic != b"!<arch>\n" {
        return Err("it is not an ar archive".to_owned());
    }
    let length = file.metadata().map_err(text)?.len();
    let mut offset = 8;
    let (mut version, mut control) = (false, None);
    while offset < length {
        file.seek(SeekFrom::Start(offset)).map_err(text)?;
        let mut header = [0; 60];
        file.read_exact(&mut header).map_err(text)?;
        if &header[58..] != b"`\n" {
            return Err("a member of its ar archive has no header".to_owned());
        }
        let field = |range: Range<usize>| String::from_utf8_lossy(&header[range]).trim_end().to_owned();
        let name = field(0..16);
        let name = name.strip_suffix('/').unwrap_or(&name);
        let size: u64 = field(48..58).parse().map_err(|_| "a member's size is not a number".to_owned())?;
        let begin = offset + 60;
        if size > length - begin {
            return Err(format!("its member {name} ends too early"));
        }
        offset = begin + size + size % 2;
        let member = |stem: &str| -> Option<Result<Member, String>> {
            let compression = match name.strip_prefix(stem)? {
                "" => Compression::None,
                ".gz" => Compression::Gzip,
                ".xz" => Compression::Xz,
                ".zst" => Compression::Zstd,
                other => return Some(Err(format!("{stem} is compressed in an unknown way: {other}"))),
            };
            Some(Ok(Member { offset: begin, size, compression }))
        };
        if !version {
            let mut format = [0; 4];
            file.read_exact(&mut format).map_err(text)?;
            if name != "debian-binary" || &format != b"2.0\n" {
                return Err("it is not in format 2.0".to_owned());
            }
            version = true;
        } else if let Some(found) = member("control.tar") {
            control = Some(found?);
        } else if let Some(found) = member("data.tar") {
            return Ok((control.ok_or("it has no control.tar before its data.tar")?, found?));
        } else if !name.starts_with('_') {
            return Err(format!("it has an unknown member: {name}"));
        }
    }
    Err("it has no data.tar".to_owned())
}

type ControlFiles = Vec<(String, u32, Vec<u8>)>;

fn read_control(file: &File, member: &Member) -> Result<(String, ControlFiles), String> {
    let stream = member.open(file).map_err(|e| e.to_string())?;
    let mut tar = Reader::new(BufReader::new(stream.take(CONTROL_LIMIT)));
    let mut text = None;
    let mut files = Vec::new();
    while let Some(entry) = tar.next_entry().map_err(|e| format!("control.tar: {e}"))? {
        if entry.path.is_empty() || entry.kind != Kind::File {
            continue;
        }
        let name =
            String::from_utf8(entry.path).map_err(|_| "a control file's name is not text".to_owned())?;
        // A slash, or a dot, would make it another file of dpkg's database than this package's.
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            return Err(format!("a control file has the name {}", name.escape_debug()));
        }
        let mut content = Vec::new();
        tar.read_to_end(&mut content).map_err(|e| format!("control.tar: {e}"))?;
        if name == "control" {
            text = Some(String::from_utf8(content).map_err(|_| "its control file is not UTF-8".to_owned())?);
        } else if name == "list" || files.len() == CONTROL_FILES_LIMIT {
            return Err(format!("control.tar: {name} does not belong there"));
        } else {
            files.push((name, entry.mode, content));
        }
    }
    Ok((text.ok_or("it has no control file")?, files))
}
