//! What a Containerfile makes: by buildah, in the sandbox, out of images that are pinned. What comes out is taken like any image
//! that others have made.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use kiln_formats::containerfile;
use kiln_model::definition::Reach;
use kiln_model::lock::Containerfile;
use kiln_model::repository::ImageReference;

use super::context::Contents;
use super::error::BakeError;
use super::foreign::{Images, Unpacked};
use super::provision::quoted;
use super::sandbox::{Access, Folder, Job, Rights, Sandbox};
use super::secrets::{self, Secrets};
use super::tree::{SHIFT, Tree};
use super::work::{mount_shifted, unmount_below};
use super::{files, reach};

const PROGRAM: &str = "/usr/bin/buildah";
/// Of the machine's own, where there is no `/bin` beside `/usr/bin`, as on Debian.
const OF_USR: [&str; 4] = ["bin", "sbin", "lib", "lib64"];
const AUTHORITIES: &str = "/etc/ssl/certs";
/// Where the build sees the context, the Containerfile, what it begins with, and where it puts what it makes.
const CONTEXT: &str = "/kiln/context";
const TOLD: &str = "/kiln/told";
const BASES: &str = "/kiln/bases";
const MADE: &str = "/kiln/made";
/// In the last of these.
const LAYOUT: &str = "image";
/// Which images may be used is not asked in there: none comes from elsewhere.
const POLICY: &str = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;
const STORAGE: &str =
    "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/containers\"\ngraphroot = \"/var/lib/containers\"\n";

/// One step that a Containerfile is.
pub(crate) struct Build<'a> {
    pub(crate) sandbox: &'a Sandbox<'a>,
    pub(crate) images: &'a Images<'a>,
    pub(crate) of: &'a Containerfile,
    /// Tells the step's folders from those of others.
    pub(crate) at: usize,
    pub(crate) step: &'a str,
    /// Seconds: that of all files that it makes.
    pub(crate) time: i64,
}

impl Build<'_> {
    /// Into an empty folder.
    pub(crate) fn run(&self, to: &Path) -> Result<Unpacked, BakeError> {
        if !Path::new(PROGRAM).exists() {
            return Err(BakeError::Machine {
                what: PROGRAM.to_owned(),
                why: "it builds Containerfiles, and is not there".to_owned(),
                remedy: "run `apt install buildah` on the builder's machine".to_owned(),
            });
        }
        let folder = |what: &str| self.sandbox.work.folder(&format!("{what}{}", self.at), SHIFT);
        let names = self.names();
        let (context, told) = (folder("context")?, folder("told")?);
        self.put_files(&context, &told, &names)?;
        // On the disk, by the layers that are kept there already.
        let (bases, bases_root) = (self.put_bases(&names)?, folder("bases")?);
        mount_shifted(bases.path(), &bases_root, true)?;
        let (root, made) = (folder("root")?, folder("made")?);
        furnish(&root)?;
        let ran = self.build(&root, &names, [context, told, bases_root.clone(), made.clone()]);
        unmount_below(&bases_root).map_err(BakeError::io("unmount", &bases_root))?;
        ran?;
        let unpacked = self.images.unpack_layout(&made, LAYOUT, to, self.sandbox.config.limits.tree)?;
        // In what it made they may be compressed.
        Secrets::read(&self.of.secrets, self.sandbox.config)?.look_for(self.step, to)?;
        Ok(unpacked)
    }

    /// What each image is called in there.
    fn names(&self) -> BTreeMap<&str, String> {
        let names = self.of.images.keys().enumerate();
        names.map(|(at, image)| (image.as_str(), format!("localhost/kiln-{at}"))).collect()
    }

    fn put_files(
        &self,
        context: &Path,
        told: &Path,
        names: &BTreeMap<&str, String>,
    ) -> Result<(), BakeError> {
        let tree = Tree::open(context, SHIFT).map_err(BakeError::io("open", context))?;
        files::put(&tree, &self.of.files, self.images.contents)?;
        let text = read(&self.of.file, &self.of.files, self.images.contents)?;
        let renamed = containerfile::renamed(&text, &self.of.args, self.images.architecture, names)
            .map_err(|refused| not_understood(&self.of.file, &refused))?;
        let path = told.join("Containerfile");
        fs::write(&path, renamed).map_err(BakeError::io("write", &path))
    }

    /// A folder for each image, as buildah's transport `dir` has it.
    fn put_bases(&self, names: &BTreeMap<&str, String>) -> Result<tempfile::TempDir, BakeError> {
        let folder = self.images.contents.folder()?;
        for (at, image) in names.keys().enumerate() {
            let Some(digest) = self.of.images.get(*image) else { continue };
            self.images.put_folder(&reference(image)?, digest, &folder.path().join(at.to_string()))?;
        }
        Ok(folder)
    }

    fn build(
        &self,
        root: &Path,
        names: &BTreeMap<&str, String>,
        [context, told, bases, made]: [PathBuf; 4],
    ) -> Result<(), BakeError> {
        let seen = |outside: PathBuf, inside, access| Folder { outside, inside, access };
        let env = [
            ("PATH".to_owned(), "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
            ("HOME".to_owned(), "/root".to_owned()),
            ("TMPDIR".to_owned(), "/var/tmp".to_owned()),
        ];
        let mut folders = vec![
            seen("/usr".into(), "/usr", Access::ReadAndRun),
            seen(context, CONTEXT, Access::Read),
            seen(told, TOLD, Access::Read),
            seen(bases, BASES, Access::Read),
            seen(made.clone(), MADE, Access::Write),
        ];
        if Path::new(AUTHORITIES).is_dir() {
            folders.push(seen(AUTHORITIES.into(), AUTHORITIES, Access::Read));
        }
        let job = Job {
            step: self.step,
            root,
            script: &self.script(names),
            env: &env.into(),
            folders: &folders,
            hide_ischroot: false,
            own_run: true,
            resolver: None,
            rights: Rights::Containers,
        };
        let reach = Reach { network: true, secrets: self.of.secrets.clone() };
        reach::run(self.sandbox, &reach::Step { at: self.at, reach: &reach, upper: &made }, &job)
    }

    fn script(&self, names: &BTreeMap<&str, String>) -> String {
        let mut script = "mkdir -p /var/tmp /var/lib/containers\n".to_owned();
        for (at, name) in names.values().enumerate() {
            script += &format!("buildah tag \"$(buildah pull --quiet dir:{BASES}/{at})\" {name}\n");
        }
        script += &format!(
            "buildah build --pull-never --isolation chroot --format oci --platform linux/{} --timestamp {} \
             --tag localhost/kiln-made --file {TOLD}/Containerfile",
            self.images.architecture, self.time
        );
        for (name, value) in &self.of.args {
            script += &format!(" --build-arg {}", quoted(&format!("{name}={value}")));
        }
        for name in &self.of.secrets {
            script += &format!(" --secret {}", quoted(&format!("id={name},src={}/{name}", secrets::INSIDE)));
        }
        if let Some(target) = &self.of.target {
            script += &format!(" --target {}", quoted(target));
        }
        script
            + &format!(
                " {CONTEXT}\nbuildah push --quiet --disable-compression localhost/kiln-made oci:{MADE}/{LAYOUT}\n"
            )
    }
}

/// What buildah needs around it; all else is the machine's `/usr`.
fn furnish(root: &Path) -> Result<(), BakeError> {
    let failed = || BakeError::io("furnish", root);
    for name in OF_USR {
        symlink(format!("usr/{name}"), root.join(name)).map_err(failed())?;
    }
    let tree = Tree::open(root, SHIFT).map_err(failed())?;
    for folder in ["usr", "root"] {
        tree.folder(folder.as_bytes()).map_err(|errno| failed()(errno.into()))?;
    }
    for (path, content) in [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", "root:x:0:\n"),
        ("etc/containers/policy.json", POLICY),
        ("etc/containers/registries.conf", ""),
        ("etc/containers/storage.conf", STORAGE),
    ] {
        tree.write(path.as_bytes(), 0o644, content.as_bytes()).map_err(failed())?;
    }
    Ok(())
}

/// The text of a Containerfile among the files of its context.
pub(crate) fn read(
    file: &str,
    files: &[kiln_model::lock::LockedFile],
    contents: &Contents,
) -> Result<String, BakeError> {
    use kiln_model::lock::LockedFileKind::Regular;
    let wrong = |why: &str| BakeError::Definition {
        what: format!("Containerfile {}", file.escape_debug()),
        why: why.to_owned(),
        remedy: "name a Containerfile of the definition's folder".to_owned(),
    };
    let found = files.iter().find(|it| it.dest.strip_prefix('/') == Some(file));
    let digest = match found.map(|it| &it.kind) {
        Some(Regular { size, .. }) if *size > containerfile::LIMIT => {
            return Err(wrong(&format!("it has more than {} bytes", containerfile::LIMIT)));
        }
        Some(Regular { digest, .. }) => digest,
        Some(_) => return Err(wrong("it is not a file")),
        None => return Err(wrong("it is not there")),
    };
    std::io::read_to_string(contents.get(digest)?).map_err(|error| wrong(&error.to_string()))
}

/// An image as a Containerfile names it.
pub(crate) fn reference(image: &str) -> Result<ImageReference, BakeError> {
    ImageReference::as_docker_reads(image).map_err(|_| BakeError::Definition {
        what: format!("image {}", image.escape_debug()),
        why: "a Containerfile names it, and it is neither a stage above nor the name of an image".to_owned(),
        remedy: "name it as docker and buildah do, such as registry.example/app:1.2".to_owned(),
    })
}

pub(crate) fn not_understood(file: &str, refused: &containerfile::Refused) -> BakeError {
    BakeError::Definition {
        what: format!("Containerfile {}", file.escape_debug()),
        why: refused.to_string(),
        remedy: "mend the line".to_owned(),
    }
}
