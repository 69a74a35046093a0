//! `.deb` files of the package store.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use kiln_formats::deb::{DATA_LIMIT, Member, Package};
use kiln_formats::deb822::Paragraph;
use kiln_image::tar::Reader;
use kiln_model::lock::LockedPackage;

use super::error::BakeError;
use super::opened;
use super::packages::PackageStore;

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

impl Deb {
    /// Reads the control part, and checks that it is the package that the lock names.
    pub(crate) fn open(store: &PackageStore, locked: &LockedPackage) -> Result<Self, BakeError> {
        let path = store.path(&locked.sha256);
        let path = path.as_path();
        let malformed =
            |why: String| BakeError::Package { package: format!("{} {}", locked.name, locked.version), why };
        let file = File::open(path).map_err(BakeError::io("open", path))?;
        let Package { control, control_files, data } = Package::read(&file).map_err(malformed)?;
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
            control,
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
        self.data.size()
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
        let stream = self.data.open(&file).map_err(BakeError::io("read", &self.path))?;
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
