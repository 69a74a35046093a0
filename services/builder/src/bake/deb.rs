//! `.deb` files: an `ar` archive of a control tar and a data tar.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;

use kiln_image::tar::{Kind, Reader};
use kiln_model::lock::LockedPackage;

use super::compression::Compression;
use super::deb822::{self, Paragraph};
use super::error::BakeError;
use super::opened;
use super::packages::PackageStore;

/// Debian's largest control tar is a few MiB.
const CONTROL_LIMIT: u64 = 64 << 20;
const CONTROL_FILES_LIMIT: usize = 64;
const DATA_LIMIT: u64 = 16 << 30;

/// A package file that was opened and whose control part was read.
pub(crate) struct Deb {
    path: PathBuf,
    opened: PathBuf,
    pub(crate) name: String,
    pub(crate) control: Paragraph,
    /// What goes into dpkg's `info` folder, with its permission bits.
    pub(crate) control_files: Vec<(String, u32, Vec<u8>)>,
    data: Member,
}

#[derive(Debug, Clone)]
struct Member {
    offset: u64,
    size: u64,
    compression: Compression,
}

impl Deb {
    /// Reads the control part, and checks that it is the package that the lock names.
    pub(crate) fn open(store: &PackageStore, locked: &LockedPackage) -> Result<Self, BakeError> {
        let path = store.path(&locked.sha256);
        let path = path.as_path();
        let malformed =
            |why: String| BakeError::Package { package: format!("{} {}", locked.name, locked.version), why };
        let mut file = File::open(path).map_err(BakeError::io("open", path))?;
        let (control, data) = members(&mut file).map_err(malformed)?;
        let (text, control_files) = read_control(&file, &control).map_err(malformed)?;
        let mut paragraphs = deb822::parse(&text).map_err(malformed)?;
        let [control] = paragraphs.as_mut_slice() else {
            return Err(malformed("its control file is not one paragraph".to_owned()));
        };
        let is = |field: &str| control.get(field).unwrap_or_default().to_owned();
        if is("Package") != locked.name
            || is("Version") != locked.version
            || is("Architecture") != locked.architecture
        {
            return Err(malformed(format!(
                "its control file says {} {} {}",
                is("Package"),
                is("Version"),
                is("Architecture")
            )));
        }
        Ok(Self {
            path: path.to_owned(),
            opened: store.opened_path(&locked.sha256),
            name: locked.name.clone(),
            control: std::mem::take(control),
            control_files,
            data,
        })
    }

    pub(crate) fn field(&self, name: &str) -> &str {
        self.control.get(name).unwrap_or_default()
    }

    pub(crate) fn control_file(&self, name: &str) -> Option<&[u8]> {
        self.control_files.iter().find(|(file, ..)| file == name).map(|(_, _, content)| content.as_slice())
    }

    /// Absolute paths of its configuration files. Those that are to go on an upgrade are not in the package.
    pub(crate) fn conffiles(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(self.control_file("conffiles").unwrap_or_default()).into_owned();
        text.lines().map(str::trim).filter(|line| line.starts_with('/')).map(str::to_owned).collect()
    }

    /// How dpkg names its files: with the architecture where several can be installed side by side.
    pub(crate) fn info_name(&self) -> String {
        if self.field("Multi-Arch") == "same" {
            format!("{}:{}", self.name, self.field("Architecture"))
        } else {
            self.name.clone()
        }
    }

    /// Compressed, in bytes.
    pub(crate) fn data_size(&self) -> u64 {
        self.data.size
    }

    /// Its files. The first time they are kept as well, in a form that is quicker to read: xz takes longer than all else.
    pub(crate) fn data(&self) -> Result<Reader<BufReader<Box<dyn Read + Send>>>, BakeError> {
        let stream: Box<dyn Read + Send> = match opened::read(&self.opened) {
            Some(stream) => Box::new(stream.take(DATA_LIMIT)),
            None => Box::new(self.keeping()?),
        };
        Ok(Reader::new(BufReader::with_capacity(1 << 16, stream)))
    }

    fn keeping(&self) -> Result<io::Take<opened::Keeping<Box<dyn Read + Send>>>, BakeError> {
        let file = File::open(&self.path).map_err(BakeError::io("open", &self.path))?;
        let stream = open_member(&file, &self.data).map_err(BakeError::io("read", &self.path))?;
        Ok(opened::Keeping::new(stream, &self.opened).take(DATA_LIMIT))
    }

    /// Keeps its files for a later `data`, or nothing once they are not `wanted` any more.
    pub(crate) fn keep(&self, wanted: &dyn Fn() -> bool) -> Result<(), BakeError> {
        let mut stream = self.keeping()?;
        let mut buffer = vec![0; 1 << 16];
        while wanted() && stream.get_ref().keeps() {
            if stream.read(&mut buffer).map_err(BakeError::io("read", &self.path))? == 0 {
                break;
            }
        }
        Ok(())
    }
}

fn open_member(file: &File, member: &Member) -> io::Result<Box<dyn Read + Send>> {
    let mut file = file.try_clone()?;
    file.seek(SeekFrom::Start(member.offset))?;
    let raw = BufReader::with_capacity(1 << 16, file.take(member.size));
    member.compression.open(raw)
}

/// The control and the data member: `debian-binary` first, then these two, others with a name that begins with `_` aside.
fn members(file: &mut File) -> Result<(Member, Member), String> {
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
        let field =
            |range: std::ops::Range<usize>| String::from_utf8_lossy(&header[range]).trim_end().to_owned();
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
    let stream = open_member(file, member).map_err(|e| e.to_string())?;
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
