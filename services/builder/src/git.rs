//! Git repositories, by the git command line: one bare mirror for each source, holding the newest commit of its branch.
//!
//! The repository is hostile: nothing of it is checked out, no hook, submodule, filter or configuration of it is used, and
//! what it sends is bounded in time and size.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use kiln_service::config::git_credentials;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::context::MAX_SERVERS;
use crate::tree::{MAX_ENTRIES, MAX_SIZE, Node, Tree, Unreadable};

const FETCH_TIMEOUT: Duration = Duration::from_secs(120);
/// By its path: a program that is looked for on a path of its own is started by a copy of this whole process.
const PRLIMIT: &str = "/usr/bin/prlimit";
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// One pack file of a commit's content; larger ones are no definitions.
const MAX_PACK: u64 = 1 << 30;
/// Paths of at most 1 KiB, and a line of 80 bytes each.
const MAX_LISTING: u64 = (MAX_ENTRIES as u64) * 1200;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address or branch is not one that Kiln goes to.
    #[error("{what} `{given}` {why}")]
    Address { what: &'static str, given: String, why: &'static str },
    /// git could not do it: the repository is away, or refuses. It may pass.
    #[error("git {what} of {place}: {reason}")]
    Failed { what: &'static str, place: String, reason: String },
    #[error("{place}: {reason}")]
    Missing { place: String, reason: String },
    /// What is in the commit can't be taken.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
}

impl Error {
    /// Trying again, with nothing changed, may succeed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }
}

/// A repository's address, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    url: String,
    branch: String,
}

impl Address {
    /// # Errors
    /// Other transports than `https`, `ssh`, `git` and local paths; options, passwords and control characters in
    /// disguise; a branch that git would not accept as one.
    pub fn new(url: &str, branch: &str) -> Result<Self, Error> {
        let refuse = |why| Err(Error::Address { what: "repository", given: shown(url), why });
        let no_host = || refuse("has no proper host");
        if url.len() > 2048 || url.chars().any(|c| c.is_control() || c == '\\') || url.starts_with('-') {
            return refuse("is not an address");
        }
        // `ext::sh -c …` and the like: what stands before `::` names a helper program.
        if url.contains("::") {
            return refuse("names a transport that Kiln does not use: give https, ssh, git or a path");
        }
        if let Some((scheme, rest)) = url.split_once("://") {
            match scheme {
                "file" if rest.starts_with('/') => {}
                "https" | "ssh" | "git" => {
                    let authority = rest.split('/').next().unwrap_or_default();
                    let (user, host) = authority.rsplit_once('@').unwrap_or(("", authority));
                    if user.contains(':') || (scheme != "ssh" && !user.is_empty()) {
                        return refuse(
                            "holds a password or user name, which would end up in logs: write it into the file of \
                             `credentials.git` in site.toml, or use ssh keys",
                        );
                    }
                    if !is_host(host) || user.starts_with('-') {
                        return no_host();
                    }
                }
                _ => {
                    return refuse(
                        "names a transport that Kiln does not use: give https, ssh, git or a path",
                    );
                }
            }
        } else if !url.starts_with('/') {
            // user@host:path, ssh in short.
            let Some((authority, path)) = url.split_once(':') else {
                return refuse("is neither an address nor an absolute path");
            };
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            if !is_host(host) {
                return no_host();
            }
            if authority.contains('/') || path.is_empty() || path.starts_with('-') {
                return refuse("is neither an address nor an absolute path");
            }
        }
        let parts_are_plain = branch.split('/').all(|part| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && !part.ends_with(['.'])
                && !part.ends_with(".lock")
        });
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/' | '+' | '#');
        if branch.len() > 200 || branch.contains("..") || !parts_are_plain || !branch.chars().all(plain) {
            return Err(Error::Address {
                what: "branch",
                given: shown(branch),
                why: "is not a branch's name",
            });
        }
        Ok(Self { url: url.to_owned(), branch: branch.to_owned() })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// The folder of a repository on this machine.
    fn local(&self) -> Option<&str> {
        self.url.strip_prefix("file://").or_else(|| self.url.starts_with('/').then_some(self.url.as_str()))
    }
}

fn is_host(host: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    !host.is_empty() && !host.starts_with('-') && host.chars().all(plain)
}

fn shown(text: &str) -> String {
    text.chars().take(200).flat_map(char::escape_debug).collect()
}

/// A source's mirror.
#[derive(Debug, Clone)]
pub struct Mirror {
    folder: PathBuf,
    address: Address,
    /// As git-credential-store(1) has them.
    credentials: Option<PathBuf>,
}

/// One line of a commit's listing.
struct Listed {
    mode: String,
    object: String,
    size: u64,
    path: String,
}

impl Mirror {
    pub fn new(folder: PathBuf, address: Address, credentials: Option<PathBuf>) -> Self {
        Self { folder, address, credentials }
    }

    /// Fetches the branch's head, and gives its commit.
    ///
    /// # Errors
    /// The repository can't be reached, is no repository, or has no such branch.
    pub async fn fetch(&self) -> Result<String, Error> {
        self.prepare().await?;
        let reference = format!("+refs/heads/{}:refs/kiln/head", self.address.branch);
        // One commit deep: its history is nothing that Kiln needs.
        let arguments = [
            "fetch",
            "--quiet",
            "--depth=1",
            "--no-tags",
            "--no-recurse-submodules",
            "--no-write-fetch-head",
            "--no-auto-maintenance",
            "--",
            &self.address.url,
            &reference,
        ];
        self.git("fetch", &arguments, FETCH_TIMEOUT).await?;
        let head = self
            .git("rev-parse", &["rev-parse", "--verify", "refs/kiln/head^{commit}"], READ_TIMEOUT)
            .await?;
        let commit = String::from_utf8_lossy(&head).trim().to_owned();
        if commit.len() < 40 || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(self.failed("rev-parse", "its answer is not a commit".to_owned()));
        }
        Ok(commit)
    }

    /// Everything below the folders of `commit` that hold a `server.yaml`.
    ///
    /// # Errors
    /// A path or amount that is refused, or a mirror that is damaged.
    pub async fn read(&self, commit: &str) -> Result<Tree, Error> {
        let listing =
            self.git("ls-tree", &["ls-tree", "-r", "-z", "-l", "--full-tree", commit], READ_TIMEOUT).await?;
        // Up to 24 MiB of lines, and below a tree that is as large: no work for a thread that others wait for.
        let mirror = self.clone();
        let wanted = self.aside("ls-tree", move || mirror.wanted(&listing)).await?;
        let contents = self.contents(&wanted).await?;
        self.aside("cat-file", move || tree_of(&wanted, contents)).await
    }

    async fn aside<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let done = tokio::task::spawn_blocking(work).await;
        done.map_err(|error| self.failed(what, error.to_string()))?
    }

    /// What lies below a folder with a `server.yaml`.
    fn wanted(&self, listing: &[u8]) -> Result<Vec<Listed>, Error> {
        let mut listed = self.parse(listing)?;
        let folders: HashSet<String> = listed
            .iter()
            .filter_map(|entry| entry.path.strip_suffix("server.yaml"))
            .filter(|folder| folder.is_empty() || folder.ends_with('/'))
            .map(ToOwned::to_owned)
            .collect();
        if folders.len() > MAX_SERVERS {
            let why = format!("holds {} definitions, and at most {MAX_SERVERS} are taken", folders.len());
            return Err(Unreadable { path: shown(&self.address.url), why }.into());
        }
        // By the folders above each entry, of which there are few, however many folders are wanted.
        let is_wanted = |path: &str| {
            folders.contains("")
                || path.match_indices('/').any(|(at, _)| path.get(..=at).is_some_and(|f| folders.contains(f)))
        };
        listed.retain(|entry| is_wanted(&entry.path));
        self.check_amount(&listed)?;
        Ok(listed)
    }

    fn check_amount(&self, wanted: &[Listed]) -> Result<(), Error> {
        let size: u64 = wanted.iter().map(|entry| entry.size).fold(0, u64::saturating_add);
        if wanted.len() > MAX_ENTRIES || size > MAX_SIZE {
            let why = format!(
                "the folders with a server.yaml hold {} files of {} MiB, and at most {MAX_ENTRIES} of {} MiB are taken: \
                 move what no definition names elsewhere",
                wanted.len(),
                size >> 20,
                MAX_SIZE >> 20
            );
            return Err(Unreadable { path: shown(&self.address.url), why }.into());
        }
        Ok(())
    }

    /// `<mode> <type> <object> <size>\t<path>\0` each. Submodules have no content here, and are left out.
    fn parse(&self, listing: &[u8]) -> Result<Vec<Listed>, Error> {
        let mut listed = Vec::new();
        for line in listing.split(|byte| *byte == 0).filter(|line| !line.is_empty()) {
            let text = std::str::from_utf8(line).map_err(|_| Unreadable {
                path: shown(&String::from_utf8_lossy(line)),
                why: "has a name that is not UTF-8".to_owned(),
            })?;
            let parsed = text.split_once('\t').and_then(|(facts, path)| {
                let mut facts = facts.split_ascii_whitespace();
                let (mode, kind, object, size) = (facts.next()?, facts.next()?, facts.next()?, facts.next()?);
                Some((mode, kind, object, size, path))
            });
            let Some((mode, kind, object, size, path)) = parsed else {
                return Err(self.failed("ls-tree", format!("`{}` is no line of a listing", shown(text))));
            };
            if kind != "blob" {
                continue;
            }
            let size =
                size.parse().map_err(|_| self.failed("ls-tree", format!("{} has no size", shown(path))))?;
            listed.push(Listed {
                mode: mode.to_owned(),
                object: object.to_owned(),
                size,
                path: path.to_owned(),
            });
        }
        Ok(listed)
    }

    /// The contents of blobs, in their order, through one `git cat-file`.
    async fn contents(&self, wanted: &[Listed]) -> Result<Vec<Vec<u8>>, Error> {
        let request: String = wanted.iter().map(|entry| format!("{}\n", entry.object)).collect();
        let output =
            self.run("cat-file", &["cat-file", "--batch"], request.into_bytes(), READ_TIMEOUT).await?;
        let mut rest = output.as_slice();
        let mut contents = Vec::with_capacity(wanted.len());
        for entry in wanted {
            // `<object> blob <size>\n<content>\n`
            let damaged = || self.failed("cat-file", format!("{} can't be read", shown(&entry.path)));
            let end = rest.iter().position(|byte| *byte == b'\n').ok_or_else(damaged)?;
            let (header, after) = rest.split_at(end);
            let header = std::str::from_utf8(header).map_err(|_| damaged())?;
            if header != format!("{} blob {}", entry.object, entry.size) {
                return Err(damaged());
            }
            let size = usize::try_from(entry.size).map_err(|_| damaged())?;
            contents.push(after.get(1..=size).ok_or_else(damaged)?.to_vec());
            rest = after.get(size + 2..).ok_or_else(damaged)?;
        }
        Ok(contents)
    }

    /// The mirror's folder, and the only configuration that git reads.
    async fn prepare(&self) -> Result<(), Error> {
        let io = |error: std::io::Error| self.failed("init", error.to_string());
        tokio::fs::create_dir_all(&self.folder).await.map_err(io)?;
        // git refuses to serve a folder that another user owns. Who applied it named this one.
        let safe = self.address.local().map_or_else(String::new, |path| {
            let path = path.trim_end_matches('/').replace('\\', "\\\\").replace('"', "\\\"");
            format!("[safe]\n\tdirectory = \"{path}\"\n\tdirectory = \"{path}/.git\"\n")
        });
        let config = safe + &git_credentials(self.credentials.as_deref());
        tokio::fs::write(self.folder.join("gitconfig"), config).await.map_err(io)?;
        if !self.folder.join("mirror/HEAD").exists() {
            let init = ["init", "--quiet", "--bare", "--template=", "--initial-branch=kiln", "."];
            tokio::fs::create_dir_all(self.mirror()).await.map_err(io)?;
            self.git("init", &init, READ_TIMEOUT).await?;
        }
        // A fetch that was killed leaves its locks; only one runs at a time here.
        for lock in ["shallow.lock", "packed-refs.lock", "refs/kiln/head.lock"] {
            match tokio::fs::remove_file(self.mirror().join(lock)).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
                _ => {}
            }
        }
        Ok(())
    }

    fn mirror(&self) -> PathBuf {
        self.folder.join("mirror")
    }

    async fn git(&self, what: &'static str, arguments: &[&str], timeout: Duration) -> Result<Vec<u8>, Error> {
        self.run(what, arguments, Vec::new(), timeout).await
    }

    async fn run(
        &self,
        what: &'static str,
        arguments: &[&str],
        input: Vec<u8>,
        timeout: Duration,
    ) -> Result<Vec<u8>, Error> {
        let mut child = command(&self.folder, &self.mirror())
            .args(arguments)
            .spawn()
            .map_err(|error| self.failed(what, format!("git can't be started: {error}; is it installed?")))?;
        let mut group = Group::of(&child);
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let talk = async {
            let write = async {
                if let Some(mut stdin) = stdin {
                    // git closes its end when it fails; its message tells why.
                    let _ = stdin.write_all(&input).await;
                }
            };
            let limit = MAX_SIZE + MAX_LISTING;
            let (_, output, errors) = tokio::join!(write, read(stdout, limit), read(stderr, 64 << 10));
            (output, errors, child.wait().await)
        };
        // Dropping the group kills it, on a timeout and when the caller gives up.
        let Ok((output, errors, status)) = tokio::time::timeout(timeout, talk).await else {
            return Err(self.failed(what, format!("not done within {} s", timeout.as_secs())));
        };
        let status = status.map_err(|error| self.failed(what, error.to_string()))?;
        group.ended();
        if status.success() {
            return output.ok_or_else(|| self.failed(what, "it sent more than is taken".to_owned()));
        }
        let errors = String::from_utf8_lossy(&errors.unwrap_or_default()).into_owned();
        let reason: String = shown(errors.trim()).replace("\\n", "; ");
        if errors.contains("couldn't find remote ref") {
            let reason = format!("has no branch `{}`", self.address.branch);
            return Err(Error::Missing { place: shown(&self.address.url), reason });
        }
        Err(self.failed(what, reason))
    }

    fn failed(&self, what: &'static str, reason: String) -> Error {
        Error::Failed { what, place: shown(&self.address.url), reason }
    }
}

fn command(home: &Path, mirror: &Path) -> Command {
    // The limit is on each file that is written, which a pack is one of.
    let mut command = Command::new(PRLIMIT);
    command
        .arg(format!("--fsize={MAX_PACK}"))
        .arg("git")
        .args(["-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "gc.auto=0"])
        .args(["-c", "transfer.fsckObjects=true", "-c", "http.followRedirects=false"])
        .args(["-c", "fetch.writeCommitGraph=false", "-c", "submodule.recurse=false"])
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", home)
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", home.join("gitconfig"))
        .env("GIT_ATTR_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_ASKPASS", "/bin/false")
        .env("GIT_NO_LAZY_FETCH", "1")
        .env("GIT_ALLOW_PROTOCOL", "file:https:ssh:git")
        .env("GIT_SSH_COMMAND", "ssh -oBatchMode=yes -oConnectTimeout=20")
        .env("GIT_CEILING_DIRECTORIES", home)
        .current_dir(mirror)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(agent) = std::env::var_os("SSH_AUTH_SOCK") {
        command.env("SSH_AUTH_SOCK", agent);
    }
    command
}

/// A commit's content as a tree.
fn tree_of(wanted: &[Listed], contents: Vec<Vec<u8>>) -> Result<Tree, Error> {
    let mut tree = Tree::default();
    for (entry, content) in wanted.iter().zip(contents) {
        let node = match entry.mode.as_str() {
            "100644" | "100664" => Node::File { content: content.into(), executable: false },
            "100755" => Node::File { content: content.into(), executable: true },
            "120000" => {
                let target = String::from_utf8(content).map_err(|_| Unreadable {
                    path: shown(&entry.path),
                    why: "is a symbolic link whose target is not UTF-8".to_owned(),
                })?;
                Node::Symlink { target }
            }
            other => {
                let why = format!("has mode {other}, which is neither a file nor a symbolic link");
                return Err(Unreadable { path: shown(&entry.path), why }.into());
            }
        };
        tree.insert(&entry.path, node)?;
    }
    Ok(tree)
}

/// git and what it starts, ssh and the like, which wait for a peer that says nothing. Killed when dropped.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &tokio::process::Child) -> Self {
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        Self(pid.and_then(Pid::from_raw))
    }

    /// Its leader was waited for, so its number may be another's by now.
    fn ended(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            // Gone already is as good.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

/// None where there is more than `limit`. Reads on to the end all the same, so that the writer is not stuck.
async fn read(pipe: Option<impl tokio::io::AsyncRead + Unpin>, limit: u64) -> Option<Vec<u8>> {
    let mut pipe = pipe?;
    let mut bytes = Vec::new();
    (&mut pipe).take(limit).read_to_end(&mut bytes).await.ok()?;
    let more = tokio::io::copy(&mut pipe, &mut tokio::io::sink()).await.ok()?;
    (more == 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_addresses_are_gone_to() {
        for good in [
            "https://example.org/web.git",
            "ssh://git@example.org:2222/web",
            "git@example.org:web",
            "git://example.org/web",
            "/srv/web",
            "file:///srv/web",
        ] {
            assert!(Address::new(good, "main").is_ok(), "{good}");
        }
        for bad in [
            "ext::sh -c touch /tmp/owned",
            "--upload-pack=touch /tmp/owned",
            "-oProxyCommand=touch /tmp/owned",
            "ssh://-oProxyCommand=touch/web",
            "git@-oProxyCommand=touch:web",
            "https://user:secret@example.org/web",
            "https://token@example.org/web",
            "http://example.org/web",
            "ftp://example.org/web",
            "fd::17/web",
            "file://relative",
            "relative/path",
            "https:///web",
            "https://example.org/we\nb",
            "",
        ] {
            assert!(Address::new(bad, "main").is_err(), "{bad}");
        }
        assert!(Address::new("/srv/web", "feature/a-b_c.d").is_ok());
        for bad in ["", "-x", "a..b", "a b", "a/", "/a", "a.lock", "a/.b", "a~1", "a:b", "@{-1}", "a\n", "a*"]
        {
            assert!(Address::new("/srv/web", bad).is_err(), "{bad}");
        }
    }

    struct Repository(tempfile::TempDir);

    impl Repository {
        fn new() -> Self {
            let repository = Self(tempfile::tempdir().unwrap());
            repository.git(&["init", "--quiet", "--initial-branch=main", "work"], None);
            repository
        }

        fn work(&self) -> PathBuf {
            self.0.path().join("work")
        }

        fn git(&self, arguments: &[&str], folder: Option<&Path>) {
            let status = std::process::Command::new("git")
                .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"])
                .args(arguments)
                .current_dir(folder.unwrap_or(self.0.path()))
                .env("GIT_CONFIG_GLOBAL", "/dev/null")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .unwrap();
            assert!(status.success(), "{arguments:?}");
        }

        fn commit(&self, files: &[(&str, &str)]) {
            for (path, content) in files {
                let path = self.work().join(path);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, content).unwrap();
            }
            self.git(&["add", "-A"], Some(&self.work()));
            self.git(&["commit", "--quiet", "-m", "x"], Some(&self.work()));
        }

        fn mirror(&self) -> Mirror {
            let address = Address::new(self.work().to_str().unwrap(), "main").unwrap();
            Mirror::new(self.0.path().join("source"), address, None)
        }
    }

    fn paths(tree: &Tree) -> Vec<&str> {
        tree.iter().map(|(path, _)| path).collect()
    }

    #[tokio::test]
    async fn the_heads_definitions_are_read_and_nothing_else() {
        let repository = Repository::new();
        repository.commit(&[
            ("web/server.yaml", "name: web"),
            ("web/site/index.html", "Hello"),
            ("notes.txt", "no"),
        ]);
        let mirror = repository.mirror();
        let first = mirror.fetch().await.unwrap();
        let tree = mirror.read(&first).await.unwrap();
        assert_eq!(paths(&tree), ["web/server.yaml", "web/site/index.html"]);
        let hello = Node::File { content: b"Hello".to_vec().into(), executable: false };
        assert_eq!(tree.get("web/site/index.html"), Some(&hello));

        repository.commit(&[("web/site/index.html", "Hello again"), ("db/server.yaml", "name: db")]);
        let second = mirror.fetch().await.unwrap();
        assert_ne!(first, second);
        let tree = mirror.read(&second).await.unwrap();
        assert_eq!(paths(&tree), ["db/server.yaml", "web/server.yaml", "web/site/index.html"]);
    }

    #[tokio::test]
    async fn hooks_submodules_and_links_of_a_repository_do_nothing() {
        let repository = Repository::new();
        let owned = repository.0.path().join("owned");
        let other = Repository::new();
        other.commit(&[("server.yaml", "name: evil")]);
        repository.commit(&[("server.yaml", "name: web")]);
        repository.git(
            &["submodule", "--quiet", "add", other.work().to_str().unwrap(), "sub"],
            Some(&repository.work()),
        );
        std::os::unix::fs::symlink("/etc/passwd", repository.work().join("passwd")).unwrap();
        let hooks = repository.work().join(".git/hooks");
        std::fs::create_dir_all(&hooks).unwrap();
        for hook in ["post-upload-pack", "pre-upload-pack", "reference-transaction", "post-checkout"] {
            let path = hooks.join(hook);
            std::fs::write(&path, format!("#!/bin/sh\ntouch {}\n", owned.display())).unwrap();
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        repository
            .git(&["config", "uploadpack.packObjectsHook", "touch owned; cat"], Some(&repository.work()));
        repository.git(&["config", "core.hooksPath", hooks.to_str().unwrap()], Some(&repository.work()));
        repository.git(&["add", "passwd"], Some(&repository.work()));
        repository.git(
            &["-c", "core.hooksPath=/dev/null", "commit", "--quiet", "-m", "x"],
            Some(&repository.work()),
        );
        std::fs::remove_file(&owned).ok();
        let mirror = repository.mirror();
        let commit = mirror.fetch().await.unwrap();
        let tree = mirror.read(&commit).await.unwrap();
        assert_eq!(paths(&tree), [".gitmodules", "passwd", "server.yaml"]);
        assert_eq!(tree.get("passwd"), Some(&Node::Symlink { target: "/etc/passwd".to_owned() }));
        assert!(!owned.exists() && !repository.work().join("owned").exists());
    }

    #[tokio::test]
    async fn what_is_not_there_is_told_apart_from_what_is_away() {
        let repository = Repository::new();
        repository.commit(&[("server.yaml", "name: web")]);
        let address = Address::new(repository.work().to_str().unwrap(), "gone").unwrap();
        let error = Mirror::new(repository.0.path().join("a"), address, None).fetch().await.unwrap_err();
        assert!(!error.is_transient() && error.to_string().contains("no branch `gone`"), "{error}");
        let address = Address::new("/nowhere/at/all", "main").unwrap();
        let error = Mirror::new(repository.0.path().join("b"), address, None).fetch().await.unwrap_err();
        assert!(error.is_transient(), "{error}");
    }

    #[tokio::test]
    async fn more_definitions_than_are_taken_are_refused_before_they_are_read() {
        let repository = Repository::new();
        let paths: Vec<_> = (0..=MAX_SERVERS).map(|number| format!("d{number}/server.yaml")).collect();
        let files: Vec<_> = paths.iter().map(|path| (path.as_str(), "name: web")).collect();
        repository.commit(&files);
        let mirror = repository.mirror();
        let commit = mirror.fetch().await.unwrap();
        let refused = mirror.read(&commit).await.unwrap_err();
        assert!(refused.to_string().contains("holds 1001 definitions"), "{refused}");
    }

    #[tokio::test]
    async fn what_a_stalled_git_started_goes_with_it() {
        let mut child = Command::new("sh")
            .args(["-c", "sleep 1000 & echo $!; wait"])
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let group = Group::of(&child);
        let mut pid = [0; 16];
        let read = child.stdout.take().unwrap().read(&mut pid).await.unwrap();
        let pid: u32 = std::str::from_utf8(&pid[..read]).unwrap().trim().parse().unwrap();
        // Killed it stays as a zombie until somebody waits for it.
        let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let lives =
            || state().rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"));
        assert!(lives());
        drop(group);
        for _ in 0..1000 {
            if !lives() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("process {pid} is left: {}", state());
    }
}
