//! Images on their way out: as the tar of an OCI layout, which also carries what `docker load` looks for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use kiln_model::digest::Digest;
use serde_json::json;

use crate::contents::NodeKind;
use crate::error::Error;
use crate::extract::CAPABILITY;
use crate::index::{Entry as IndexEntry, Index, MANIFEST_TYPE, NAME};
use crate::store::ImageStore;
use crate::tar::{Entry, Kind, Writer};

impl ImageStore {
    /// Writes the image as the tar of an OCI layout that holds nothing else, under the name `name`.
    ///
    /// # Errors
    /// The image is not in the store, or it can't be written.
    pub fn export(&self, digest: &Digest, name: &str, writer: impl Write) -> Result<(), Error> {
        let image = self.image(digest)?;
        let index = Index::of(vec![IndexEntry {
            media_type: MANIFEST_TYPE.to_owned(),
            digest: *digest,
            size: image.size,
            artifact_type: None,
            annotations: BTreeMap::from([(NAME.to_owned(), name.to_owned())]),
        }]);
        let index = serde_json::to_vec(&index)
            .map_err(|e| Error::malformed(format!("index of image {digest}"), e.to_string()))?;
        let blob = |digest: &Digest| format!("blobs/sha256/{}", digest.hex());
        let layers: Vec<String> = image.layers.iter().map(|layer| blob(&layer.diff_id)).collect();
        let docker =
            json!([{"Config": blob(&image.config_digest), "RepoTags": [name], "Layers": layers}]).to_string();

        let failed = || Error::io("export image", self.blob_path(digest));
        let mut tar = Writer::new(writer);
        let mut put = |path: &str, content: &[u8]| {
            tar.append(&file(path, content.len() as u64), &mut &*content).map_err(failed())
        };
        put("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        put("index.json", &index)?;
        put("manifest.json", docker.as_bytes())?;
        let blobs: BTreeSet<Digest> =
            image.layers.iter().map(|layer| layer.diff_id).chain([*digest, image.config_digest]).collect();
        for digest in &blobs {
            let (content, size) = self.open_blob(digest)?;
            tar.append(&file(&blob(digest), size), &mut content.take(size)).map_err(failed())?;
        }
        tar.finish().and_then(|mut writer| writer.flush()).map_err(failed())
    }

    /// Writes the image's root file system as one tar, as a process in it finds it: without layers, and with the names of one
    /// file as hard links where they are in one layer.
    ///
    /// # Errors
    /// The image is not in the store, a layer can't be read, or the tar can't be written.
    pub fn export_root(&self, digest: &Digest, writer: impl Write) -> Result<(), Error> {
        let contents = self.contents(digest)?;
        let mut tar = Writer::new(writer);
        let mut names: HashMap<(usize, u64), Vec<u8>> = HashMap::new();
        for found in contents.found() {
            let path = found.path;
            let failed = || Error::io("export", Path::new("/").join(OsStr::from_bytes(path)));
            let stat = found.stat()?;
            let mut entry = Entry {
                path: path.to_vec(),
                kind: Kind::Directory,
                size: 0,
                mode: found.node.mode,
                uid: found.node.uid,
                gid: found.node.gid,
                mtime: stat.st_mtime,
                link: Vec::new(),
                xattrs: BTreeMap::new(),
            };
            match &found.node.kind {
                NodeKind::Directory => {}
                NodeKind::Fifo => entry.kind = Kind::Fifo,
                NodeKind::Symlink { target } => {
                    entry.kind = Kind::Symlink;
                    entry.link.clone_from(target);
                }
                NodeKind::File { size } => {
                    let first = names.entry((found.layer, stat.st_ino)).or_insert_with(|| path.to_vec());
                    if first != path {
                        entry.kind = Kind::Hardlink;
                        entry.link.clone_from(first);
                    } else {
                        entry.kind = Kind::File;
                        entry.size = *size;
                        let capabilities = found.node.capabilities.clone();
                        entry.xattrs.extend(capabilities.map(|value| (CAPABILITY.to_vec(), value)));
                        tar.append(&entry, &mut found.open()?.take(*size)).map_err(failed())?;
                        continue;
                    }
                }
            }
            tar.append(&entry, &mut io::empty()).map_err(failed())?;
        }
        tar.finish().and_then(|mut writer| writer.flush()).map_err(Error::io("export image", digest.hex()))
    }

    /// Of the blobs that these images and what refers to them have and no other image has, the bytes. What is not there counts
    /// for nothing.
    ///
    /// # Errors
    /// An image that stays can't be read.
    pub fn bytes_of_only(&self, images: &[Digest]) -> Result<u64, Error> {
        let mut kept = BTreeSet::new();
        for other in self.images()?.iter().filter(|other| !images.contains(other)) {
            kept.extend(self.blobs_of(other)?);
        }
        let mut doomed = BTreeSet::new();
        for image in images.iter().filter(|image| self.has_blob(image)) {
            doomed.extend(self.blobs_of(image)?);
        }
        let sizes = doomed.difference(&kept).filter_map(|blob| fs::metadata(self.blob_path(blob)).ok());
        Ok(sizes.map(|found| found.len()).sum())
    }

    /// Removes an image with what refers to it, and the layers that no other image has. The caller knows that nobody uses it.
    ///
    /// # Errors
    /// The image is not in the store, or something can't be removed; what was named in the index is gone from it then.
    pub fn delete(&self, digest: &Digest) -> Result<(), Error> {
        let image = self.image(digest)?;
        let referrers: Vec<Digest> = self.referrers_of(digest)?.into_iter().map(|it| it.digest).collect();
        let mut doomed: BTreeSet<Digest> = BTreeSet::from([*digest, image.config_digest]);
        for referrer in &referrers {
            doomed.extend(self.referrer_blobs(referrer)?);
        }
        self.change_index(|entries| {
            entries.retain(|e| e.digest != *digest && !referrers.contains(&e.digest));
        })?;
        let mut kept = BTreeSet::new();
        for other in self.images()? {
            let other = self.image(&other)?;
            kept.insert(other.config_digest);
            kept.extend(other.layers.iter().map(|layer| layer.diff_id));
        }
        for layer in image.layers.iter().map(|layer| layer.diff_id).filter(|layer| !kept.contains(layer)) {
            self.remove_layer_tree(&layer)?;
            doomed.insert(layer);
        }
        for blob in doomed.difference(&kept) {
            let path = self.blob_path(blob);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn file(path: &str, size: u64) -> Entry {
    Entry {
        path: path.as_bytes().to_vec(),
        kind: Kind::File,
        size,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: 0,
        link: Vec::new(),
        xattrs: BTreeMap::new(),
    }
}
