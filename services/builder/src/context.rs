//! Definitions in a source: found, read, checked against the files they name, and kept by the digest of their content.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use kiln_builder_core::definition::StoredDefinition;
use kiln_model::definition::{
    ContextEntry, Definition, DefinitionErrors, EntryKind, ImageSpec, Named, Step, WrongPath, context_digest,
    parse, wrong_name, wrong_paths,
};
use kiln_model::digest::Digest;
use kiln_model::name::{NodeName, ServerName};
use kiln_service::aside::aside;
use serde::Serialize;

use crate::tree::{MAX_SIZE, Node, Tree, link_target};

const FILE: &str = "server.yaml";
/// More servers in one source are several sources.
pub const MAX_SERVERS: usize = 1000;
/// What all definitions of a source name, each for itself: where folders lie in folders, a file can be several's.
const MAX_NAMED: u64 = 4 * MAX_SIZE;

/// A folder with a `server.yaml`, as it is in a source.
#[derive(Debug, Clone)]
pub struct Found {
    /// Inside the source; `.` for its top.
    pub folder: String,
    pub read: Result<Readable, Faulty>,
}

/// One that can be taken.
#[derive(Debug, Clone)]
pub struct Readable {
    pub stored: StoredDefinition,
    /// `server.yaml` and the files it names, and nothing else: what lies beside them changes no digest.
    pub files: Tree,
}

/// One that can't.
#[derive(Debug, Clone)]
pub struct Faulty {
    /// As far as it can be made out.
    pub name: Option<ServerName>,
    /// Over the whole folder, since nobody knows what it names.
    pub digest: Digest,
    pub faults: Vec<Fault>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// `web/server.yaml:3:5`
    pub place: String,
    pub why: String,
}

impl Faulty {
    pub fn problem(&self) -> String {
        let lines: Vec<_> =
            self.faults.iter().map(|fault| format!("{}: {}", fault.place, fault.why)).collect();
        lines.join("\n")
    }
}

impl Readable {
    /// Why this definition can't begin with the parent that it names.
    pub fn wrong_parent(&self, folder: &str, problem: String) -> Fault {
        let help = "name a server that is applied, or comes with this one, and does not begin with this one";
        self.wrong_name(folder, Named::Parent, problem, help)
    }

    fn wrong_name(&self, folder: &str, named: Named, problem: String, help: &str) -> Fault {
        let file = if folder == "." { FILE.to_owned() } else { format!("{folder}/{FILE}") };
        let text = match self.files.get(FILE) {
            Some(Node::File { content, .. }) => content.bytes(),
            _ => &[],
        };
        let (_, faults) = refusal(&wrong_name(text, &file, named, problem.clone(), help.to_owned()));
        faults.into_iter().next().unwrap_or(Fault { place: format!("{file}:1:1"), why: problem })
    }
}

impl Found {
    /// Makes it one that can't be taken where it is to run on a machine that the site does not have.
    pub fn refuse_unknown_node(&mut self, nodes: &BTreeSet<NodeName>) {
        let Ok(readable) = &self.read else { return };
        let definition = &readable.stored.definition;
        let Some(node) = definition.run.node.as_ref().filter(|node| !nodes.contains(*node)) else { return };
        let names: Vec<_> = nodes.iter().map(|node| format!("`{node}`")).collect();
        let problem = format!("the site has no node `{node}`");
        let help = format!("name one of {}, or add it to `[nodes]` in site.toml", names.join(", "));
        let fault = readable.wrong_name(&self.folder, Named::Node, problem, &help);
        let (name, digest) = (Some(definition.name.clone()), readable.stored.digest);
        self.read = Err(Faulty { name, digest, faults: vec![fault] });
    }

    pub fn name(&self) -> Option<&ServerName> {
        match &self.read {
            Ok(readable) => Some(&readable.stored.definition.name),
            Err(faulty) => faulty.name.as_ref(),
        }
    }

    pub fn digest(&self) -> Digest {
        match &self.read {
            Ok(readable) => readable.stored.digest,
            Err(faulty) => faulty.digest,
        }
    }
}

/// Every definition in a source, by folder.
///
/// # Errors
/// Where there are too many, in words.
pub fn find(tree: &Tree) -> Result<Vec<Found>, String> {
    let folders: Vec<&str> = tree
        .iter()
        .filter_map(|(path, _)| path.strip_suffix(FILE))
        .filter(|folder| folder.is_empty() || folder.ends_with('/'))
        .collect();
    if folders.len() > MAX_SERVERS {
        return Err(format!(
            "the source holds {} definitions, and at most {MAX_SERVERS} are taken",
            folders.len()
        ));
    }
    let mut found: Vec<Found> = Vec::new();
    let mut named = 0;
    for folder in folders {
        let one = read(tree, folder);
        named += one.read.as_ref().map_or(0, |readable| readable.files.size());
        if named > MAX_NAMED {
            return Err(format!(
                "the definitions name more than {} MiB of files together, the same files several times: let no folder that \
                 is named hold another definition's",
                MAX_NAMED >> 20
            ));
        }
        found.push(one);
    }
    refuse_namesakes(&mut found);
    Ok(found)
}

fn read(tree: &Tree, folder: &str) -> Found {
    let file = format!("{folder}{FILE}");
    let folder = if folder.is_empty() { "." } else { folder.trim_end_matches('/') };
    let part = tree.folder(folder);
    let read = take(&part, &file).map_err(|(name, faults)| Faulty { name, digest: digest_of(&part), faults });
    Found { folder: folder.to_owned(), read }
}

type Refusal = (Option<ServerName>, Vec<Fault>);

fn take(part: &Tree, file: &str) -> Result<Readable, Refusal> {
    let text = match part.get(FILE) {
        Some(Node::File { content, .. }) => content.bytes(),
        _ => {
            return Err((
                None,
                vec![Fault { place: format!("{file}:1:1"), why: "is not a plain file".to_owned() }],
            ));
        }
    };
    let definition = parse(text, file).map_err(|errors| refusal(&errors))?;
    let (files, missing) = named_files(part, &definition);
    if !missing.is_empty() {
        let wrong = missing.into_iter().map(|(path, why)| WrongPath {
            message: format!("`{path}` {why}"),
            help: "put what is named into the folder, or correct the path".to_owned(),
            path,
        });
        return Err(refusal(&wrong_paths(text, file, wrong.collect())));
    }
    let run_digest = definition.run.digest();
    let image_context = image_context(&definition, &files);
    match (run_digest, image_context) {
        (Ok(run_digest), Ok(image_context)) => {
            let stored =
                StoredDefinition { digest: digest_of(&files), definition, image_context, run_digest };
            Ok(Readable { stored, files })
        }
        (Err(error), _) | (_, Err(error)) => {
            let fault = Fault { place: format!("{file}:1:1"), why: format!("has no digest: {error}") };
            Err((Some(definition.name), vec![fault]))
        }
    }
}

fn refusal(errors: &DefinitionErrors) -> Refusal {
    let faults = errors.problems().iter().map(|problem| {
        let help = problem.help().map(|help| format!("; {help}")).unwrap_or_default();
        Fault {
            place: format!("{}:{}:{}", errors.file(), problem.line(), problem.column()),
            why: format!("{}{help}", problem.message()),
        }
    });
    (errors.server().cloned(), faults.collect())
}

/// `server.yaml`, what it names, and where its links lead; and what of it is missing or lies outside.
fn named_files(part: &Tree, definition: &Definition) -> (Tree, Vec<(String, String)>) {
    let mut missing = Vec::new();
    let mut taken = BTreeSet::from([FILE.to_owned()]);
    let mut wanted: Vec<(String, String)> =
        definition.image.named_files().into_iter().map(|path| (path.to_owned(), path.to_owned())).collect();
    // `asked` is the name in the text that led here: a link of a link is told by the first one.
    while let Some((asked, path)) = wanted.pop() {
        let path = normal(&path);
        let mut any = false;
        for (entry, node) in part.under(&path) {
            any = true;
            if !taken.insert(entry.to_owned()) {
                continue;
            }
            if let Node::Symlink { target } = node {
                match link_target(entry, target) {
                    Some(inside) => wanted.push((asked.clone(), inside)),
                    None => missing.push((
                        asked.clone(),
                        format!("holds a symbolic link out of the folder: {entry} -> {target}"),
                    )),
                }
            }
        }
        if !any {
            let why = if normal(&asked) == path {
                "is not in the folder of the definition".to_owned()
            } else {
                format!("holds a symbolic link to {path}, which is not in the folder of the definition")
            };
            missing.push((asked, why));
        }
    }
    let mut files = Tree::default();
    for path in taken {
        if let Some(node) = part.get(&path) {
            // Each was accepted once, in the tree that it comes from.
            if let Err(error) = files.insert(&path, node.clone()) {
                missing.push((path, error.why));
            }
        }
    }
    missing.sort();
    missing.dedup();
    (files, missing)
}

/// `site/` and `./site` are `site`.
fn normal(path: &str) -> String {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() { ".".to_owned() } else { parts.join("/") }
}

fn entries(files: &Tree) -> Vec<ContextEntry> {
    let kind = |node: &Node| match node {
        Node::File { content, executable } => {
            EntryKind::Regular { digest: content.digest(), executable: *executable }
        }
        Node::Symlink { target } => EntryKind::Symlink { target: target.clone() },
    };
    files.iter().map(|(path, node)| ContextEntry { path: path.to_owned(), kind: kind(node) }).collect()
}

fn digest_of(files: &Tree) -> Digest {
    let entries = entries(files);
    context_digest(&entries)
}

/// Over what goes into the image; see [`kiln_builder_core::definition::ImageContext`].
fn image_context(definition: &Definition, files: &Tree) -> Result<Digest, serde_json::Error> {
    #[derive(Serialize)]
    struct Context<'a> {
        image: ImageSpec,
        files: Vec<ContextEntry>,
        /// Templates can show it.
        name: Option<&'a ServerName>,
    }
    let mut image = definition.image.clone();
    image.tests.clear();
    let is_template =
        |step: &Step| matches!(step, Step::Files(files) if files.iter().any(|file| file.template));
    let name = image.steps.iter().any(is_template).then_some(&definition.name);
    let mut files = entries(files);
    files.retain(|entry| entry.path != FILE);
    Digest::of_json(&Context { image, files, name })
}

fn refuse_namesakes(found: &mut [Found]) {
    let mut folders: BTreeMap<ServerName, Vec<String>> = BTreeMap::new();
    for one in found.iter() {
        if let Ok(readable) = &one.read {
            folders.entry(readable.stored.definition.name.clone()).or_default().push(one.folder.clone());
        }
    }
    for one in found.iter_mut() {
        let Ok(readable) = &one.read else { continue };
        let name = readable.stored.definition.name.clone();
        let namesakes = folders.get(&name).map(Vec::as_slice).unwrap_or_default();
        if namesakes.len() > 1 {
            let file = if one.folder == "." { FILE.to_owned() } else { format!("{}/{FILE}", one.folder) };
            let why = format!(
                "the name `{name}` is given in several folders: {}; give each its own",
                namesakes.join(", ")
            );
            let fault = Fault { place: format!("{file}:1:1"), why };
            one.read = Err(Faulty { name: Some(name), digest: readable.stored.digest, faults: vec![fault] });
        }
    }
}

/// The folders of definitions, by their digests.
#[derive(Debug, Clone)]
pub struct Contexts {
    root: PathBuf,
}

impl Contexts {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where a definition's files lie.
    pub fn folder(&self, digest: &Digest) -> PathBuf {
        self.root.join(digest.hex())
    }

    /// Writes a definition's files, durably, unless they are there.
    ///
    /// # Errors
    /// Input and output: a full disk. Nothing half is left under the digest.
    pub async fn put(&self, readable: &Readable, now: Timestamp) -> std::io::Result<()> {
        let (root, target) = (self.root.clone(), self.folder(&readable.stored.digest));
        let files = readable.files.clone();
        aside(move || write(&root, &target, &files, now)).await.map_err(std::io::Error::other)?
    }

    /// When a definition's files were first written. A store that is restored forgets what was applied since, and the
    /// folder does not.
    ///
    /// # Errors
    /// It is not there.
    pub async fn first_written(&self, digest: &Digest) -> std::io::Result<Timestamp> {
        let folder = self.folder(digest);
        let modified = aside(move || std::fs::metadata(folder)?.modified());
        let modified = modified.await.map_err(std::io::Error::other)??;
        Timestamp::try_from(modified).map_err(std::io::Error::other)
    }
}

fn write(root: &Path, target: &Path, files: &Tree, now: Timestamp) -> std::io::Result<()> {
    if target.exists() {
        return Ok(());
    }
    std::fs::create_dir_all(root)?;
    // Removed when dropped, so a failure leaves nothing. Paths were checked when the tree was made: each is below this
    // folder, and none goes through a link.
    let aside = tempfile::Builder::new().prefix(".new-").tempdir_in(root)?;
    for (path, node) in files.iter() {
        let path = aside.path().join(path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        match node {
            Node::File { content, executable } => {
                let mode = if *executable { 0o755 } else { 0o644 };
                let mut file =
                    std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&path)?;
                file.write_all(content.bytes())?;
            }
            Node::Symlink { target } => std::os::unix::fs::symlink(target, &path)?,
        }
    }
    let handle = std::fs::File::open(aside.path())?;
    handle.set_modified(now.into())?;
    // One flush for all files, before the name that promises them.
    rustix::fs::syncfs(&handle)?;
    match std::fs::rename(aside.path(), target) {
        Ok(()) => {}
        // Another call wrote the same content.
        Err(_) if target.exists() => return Ok(()),
        Err(error) => return Err(error),
    }
    std::fs::File::open(root)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "apiVersion: kiln/v1\nname: web\nimage:\n  from: scratch\n  steps:\n    - files:\n        - { src: site/, dest: /var/www }\n  command: [serve]\n";

    fn source(files: &[(&str, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (path, content) in files {
            let node = match content.strip_prefix("-> ") {
                Some(target) => Node::Symlink { target: target.to_owned() },
                None => Node::File { content: content.as_bytes().to_vec().into(), executable: false },
            };
            tree.insert(path, node).unwrap();
        }
        tree
    }

    fn only(files: &[(&str, &str)]) -> Result<Readable, String> {
        let mut found = find(&source(files)).unwrap();
        assert_eq!(found.len(), 1);
        found.remove(0).read.map_err(|faulty| faulty.problem())
    }

    #[test]
    fn only_what_is_named_counts() {
        let one = only(&[("web/server.yaml", WEB), ("web/site/index.html", "Hello")]).unwrap();
        let other = only(&[("server.yaml", WEB), ("site/index.html", "Hello"), ("README.md", "hi")]).unwrap();
        assert_eq!(one.stored.digest, other.stored.digest);
        let changed = only(&[("server.yaml", WEB), ("site/index.html", "Bye")]).unwrap();
        assert_ne!(one.stored.digest, changed.stored.digest);
        assert_ne!(one.stored.image_context, changed.stored.image_context);
    }

    #[test]
    fn folders_in_folders_share_contents_and_name_a_bounded_amount() {
        let yaml = |depth: usize| WEB.replace("name: web", &format!("name: w{depth}")).replace("site/", ".");
        let nested = |depth: usize| {
            let mut tree = Tree::default();
            let folder = |depth: usize| "d/".repeat(depth);
            for depth in 0..depth {
                let content = yaml(depth).into_bytes().into();
                let path = format!("{}server.yaml", folder(depth));
                tree.insert(&path, Node::File { content, executable: false }).unwrap();
            }
            let content = vec![0; 32 << 20].into();
            tree.insert(&format!("{}large", folder(depth)), Node::File { content, executable: false })
                .unwrap();
            find(&tree)
        };
        let found = nested(7).unwrap();
        let content = |found: &Found, path: &str| match found.read.as_ref().unwrap().files.get(path) {
            Some(Node::File { content, .. }) => content.bytes().as_ptr(),
            other => panic!("{other:?}"),
        };
        assert_eq!(found.len(), 7);
        let of = |folder: &str| found.iter().find(|one| one.folder == folder).unwrap();
        let (top, deepest) = (content(of("."), "d/d/d/d/d/d/d/large"), content(of("d/d/d/d/d/d"), "d/large"));
        assert_eq!(top, deepest, "one copy");
        let refused = nested(20).unwrap_err();
        assert!(refused.contains("name more than 256 MiB"), "{refused}");
    }

    #[test]
    fn run_alone_leaves_the_image_context() {
        let files =
            |yaml: String| only(&[("server.yaml", &yaml), ("site/index.html", "Hello")]).unwrap().stored;
        let one = files(WEB.to_owned());
        let more = files(format!("{WEB}run: {{ replicas: 5 }}\n"));
        assert_ne!(one.digest, more.digest);
        assert_ne!(one.run_digest, more.run_digest);
        assert_eq!(one.image_context, more.image_context);
    }

    #[test]
    fn faults_name_their_place() {
        let missing = only(&[("web/server.yaml", WEB)]).unwrap_err();
        let wanted = "web/server.yaml:7:18: `site` is not in the folder of the definition; ";
        assert!(missing.starts_with(wanted), "{missing}");
        let out = only(&[("server.yaml", WEB), ("site/passwd", "-> ../../etc/passwd")]).unwrap_err();
        assert!(out.starts_with("server.yaml:7:18: `site` holds a symbolic link out of the folder"), "{out}");
        let dangling = only(&[("server.yaml", WEB), ("site/a", "-> b")]).unwrap_err();
        assert!(dangling.contains("a symbolic link to site/b, which is not"), "{dangling}");
        let linked = only(&[("server.yaml", WEB), ("site/a", "-> ../shared/b"), ("shared/b", "x")]).unwrap();
        assert_eq!(
            linked.files.iter().map(|(path, _)| path).collect::<Vec<_>>(),
            ["server.yaml", "shared/b", "site/a"]
        );
        let wrong = find(&source(&[("server.yaml", "name: web\nreplicas: 3\n")])).unwrap().remove(0);
        assert_eq!(wrong.name().map(ServerName::as_str), Some("web"));
        assert!(wrong.read.unwrap_err().problem().starts_with("server.yaml:"));
    }

    #[test]
    fn two_folders_can_not_be_one_server() {
        let found = find(&source(&[
            ("a/server.yaml", WEB),
            ("a/site/x", "x"),
            ("b/server.yaml", WEB),
            ("b/site/x", "x"),
        ]))
        .unwrap();
        assert!(found.iter().all(|one| one.read.is_err()));
    }

    #[tokio::test]
    async fn a_definition_is_kept_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let contexts = Contexts::new(folder.path().join("contexts"));
        let readable =
            only(&[("server.yaml", WEB), ("site/index.html", "Hello"), ("site/l", "-> index.html")]).unwrap();
        let at = |second| Timestamp::from_second(second).unwrap();
        contexts.put(&readable, at(1_000_000)).await.unwrap();
        contexts.put(&readable, at(2_000_000)).await.unwrap();
        let kept = contexts.folder(&readable.stored.digest);
        assert_eq!(std::fs::read_to_string(kept.join("site/l")).unwrap(), "Hello");
        let names: Vec<_> = std::fs::read_dir(folder.path().join("contexts")).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing else is left");
        assert_eq!(contexts.first_written(&readable.stored.digest).await.unwrap(), at(1_000_000));
    }
}
