//! A page about an image for people: what it is, what is in it, what changed and why.

use std::fmt::Write as _;

use kiln_builder_core::build::{PackageChange, TestResult};
use kiln_image::{Contents, Difference, Image, NodeKind};
use kiln_model::definition::Definition;
use kiln_model::digest::Digest;
use kiln_model::lock::LockedBase;

use super::installed::Installed;
use super::{Provenance, shown, words};

/// Rows of one table; more are summed up.
const ROWS: usize = 200;
/// uids below are the system's own.
const FIRST_PERSON: u32 = 1000;

/// All that a datasheet is made of.
pub(crate) struct Sheet<'a> {
    pub(crate) image: &'a Image,
    pub(crate) digest: &'a Digest,
    pub(crate) made: &'a Provenance,
    pub(crate) definition: &'a Definition,
    pub(crate) tests: &'a [TestResult],
    pub(crate) packages: &'a [Installed],
    pub(crate) contents: &'a Contents,
    /// `etc/passwd`
    pub(crate) passwd: &'a str,
    pub(crate) since: Option<Since>,
}

/// What differs from the image before.
pub(crate) struct Since {
    pub(crate) image: Digest,
    pub(crate) packages: Vec<PackageChange>,
    pub(crate) files: Vec<Difference>,
    /// CVE and package.
    pub(crate) fixed: Vec<(String, String)>,
}

/// In Markdown with tables, as GitHub has them.
pub(crate) fn markdown(sheet: &Sheet<'_>) -> String {
    let mut page = Page(String::new());
    let Sheet { image, digest, made, definition, tests, packages, contents, passwd, since } = sheet;
    page.title(1, made.build.server.as_str());
    let config = image.config.config().clone().unwrap_or_default();
    let cause = format!("{} ({})", made.cause.summary, made.cause.actor);
    let commit = if made.commit.is_empty() { "a folder" } else { &made.commit };
    page.table(
        &["", ""],
        [
            ["image".to_owned(), digest.to_string()],
            ["build".to_owned(), format!("{}, ended {}", made.build, made.ended)],
            ["because".to_owned(), cause],
            ["commit".to_owned(), commit.to_owned()],
            ["lock".to_owned(), made.lock_key.to_string()],
            ["begins with".to_owned(), base(&made.lock.base)],
            ["architecture".to_owned(), made.lock.architecture.clone()],
            ["user".to_owned(), config.user().clone().unwrap_or_default()],
            ["command".to_owned(), words(config.cmd())],
        ],
    );
    if let Some(since) = since {
        changes(&mut page, since);
    }
    page.title(2, "Tests");
    page.rows(
        "no test is written for it",
        &["passed", "detail"],
        tests.iter().map(|test| [test.name.clone(), test.detail.clone()]),
    );
    page.title(2, "Ports");
    page.rows(
        "no port is open",
        &["on the machine", "in the instance"],
        definition.run.ports.iter().map(|port| [port.listen.to_string(), port.target.to_string()]),
    );
    page.title(2, "Users");
    page.rows("no user but those of the system", &["user", "uid", "shell"], users(passwd));
    page.title(2, "Files");
    page.line(&files(contents));
    page.rows(
        "none runs with more rights than who calls it",
        &["runs with more rights", "mode", "owner"],
        privileged(contents),
    );
    page.title(2, "Layers");
    page.rows(
        "none",
        &["layer", "bytes", "made by"],
        image.layers.iter().map(|layer| {
            [layer.diff_id.short().to_string(), layer.size.to_string(), layer.created_by.clone()]
        }),
    );
    page.title(2, "Packages");
    let all = packages.iter().map(|it| [it.name.clone(), it.version.clone(), it.source.clone()]);
    page.rows("no package of Debian", &["package", "version", "source"], all);
    page.0
}

fn base(base: &LockedBase) -> String {
    match base {
        LockedBase::Scratch => "nothing".to_owned(),
        LockedBase::Debian { suite, variant, .. } => format!("Debian {suite}, {variant}"),
        LockedBase::Archive { digest, .. } => format!("the root file system {digest}"),
        LockedBase::Image { place, digest } => format!("{place}, with the manifest {digest}"),
        LockedBase::Containerfile(of) => {
            let images = of.images.iter().map(|(name, digest)| format!("{name}, with the manifest {digest}"));
            let images: Vec<_> = images.collect();
            let on = if images.is_empty() { "nothing".to_owned() } else { images.join("; ") };
            format!("what {} makes, on {on}", of.file)
        }
        LockedBase::Server { image_digest } => format!("the image {image_digest}"),
    }
}

fn changes(page: &mut Page, since: &Since) {
    page.title(2, "Changes");
    page.line(&format!("Since image {}.", since.image));
    let side = |version: &Option<String>| version.clone().unwrap_or_else(|| "-".to_owned());
    page.rows(
        "No package differs.",
        &["package", "before", "now"],
        since.packages.iter().map(|it| [it.name.clone(), side(&it.from), side(&it.to)]),
    );
    if !since.fixed.is_empty() {
        page.title(3, "Advisories fixed");
        page.rows(
            "",
            &["advisory", "package"],
            since.fixed.iter().map(|(cve, package)| [cve.clone(), package.clone()]),
        );
    }
    page.title(3, "Files");
    let how = |it: &Difference| match (&it.before, &it.after) {
        (None, _) => "new",
        (_, None) => "gone",
        _ if it.content => "other content",
        _ => "other rights",
    };
    page.rows(
        "No file differs.",
        &["file", "how"],
        since.files.iter().map(|it| [format!("/{}", shown(&it.path)), how(it).to_owned()]),
    );
}

fn users(passwd: &str) -> impl Iterator<Item = [String; 3]> {
    passwd.lines().filter_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let [name, _, uid, _, _, _, shell] = fields.as_slice() else { return None };
        let number: u32 = uid.parse().ok()?;
        let logs_in = !["/usr/sbin/nologin", "/sbin/nologin", "/bin/false", "/bin/sync"].contains(shell);
        (number >= FIRST_PERSON || logs_in).then(|| [*name, *uid, *shell].map(str::to_owned))
    })
}

fn files(contents: &Contents) -> String {
    let (mut count, mut bytes) = (0_u64, 0_u64);
    for (_, node) in contents.nodes() {
        if let NodeKind::File { size } = node.kind {
            count += 1;
            bytes += size;
        }
    }
    format!("{count} files with {bytes} bytes.")
}

fn privileged(contents: &Contents) -> impl Iterator<Item = [String; 3]> {
    contents.nodes().filter_map(|(path, node)| {
        let is_file = matches!(node.kind, NodeKind::File { .. });
        let more = node.mode & 0o6000 != 0 || node.capabilities.is_some();
        (is_file && more).then(|| {
            [format!("/{}", shown(path)), format!("{:04o}", node.mode), format!("{}:{}", node.uid, node.gid)]
        })
    })
}

/// What is written about an image comes from whoever could put something into it, so that nothing of it may become a heading,
/// a link or HTML.
struct Page(String);

impl Page {
    fn title(&mut self, level: usize, text: &str) {
        // Writing into a String can't fail.
        let _ = writeln!(self.0, "\n{} {}\n", "#".repeat(level), escaped(text));
    }

    fn line(&mut self, text: &str) {
        let _ = writeln!(self.0, "{}\n", escaped(text));
    }

    fn table<const N: usize>(&mut self, heads: &[&str; N], rows: impl IntoIterator<Item = [String; N]>) {
        let mut line = |cells: &[String]| {
            let _ = writeln!(self.0, "| {} |", cells.join(" | "));
        };
        line(&heads.map(str::to_owned));
        line(&heads.map(|_| "---".to_owned()));
        for row in rows {
            line(&row.map(|cell| escaped(&cell)));
        }
        self.0.push('\n');
    }

    /// A table, or what is to be said where it has no row.
    fn rows<const N: usize>(
        &mut self,
        none: &str,
        heads: &[&str; N],
        rows: impl IntoIterator<Item = [String; N]>,
    ) {
        let mut rows: Vec<_> = rows.into_iter().collect();
        if rows.is_empty() {
            self.line(none);
            return;
        }
        let more = rows.len().saturating_sub(ROWS);
        rows.truncate(ROWS);
        self.table(heads, rows);
        if more > 0 {
            self.line(&format!("and {more} more"));
        }
    }
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '&' => escaped.push_str("&amp;"),
            '\\' | '|' | '`' | '*' | '_' | '[' | ']' | '#' | '!' | '~' => {
                escaped.push('\\');
                escaped.push(letter);
            }
            _ if letter.is_control() => escaped.push(' '),
            _ => escaped.push(letter),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_an_image_holds_becomes_markup() {
        let mut page = Page(String::new());
        let evil = "a|b\n# c <script> [x](y) `z` &amp;".to_owned();
        page.rows("none", &["file"], [[evil]]);
        assert_eq!(
            page.0,
            "| file |\n| --- |\n| a\\|b \\# c &lt;script&gt; \\[x\\](y) \\`z\\` &amp;amp; |\n\n"
        );
    }

    #[test]
    fn long_tables_are_cut_and_empty_ones_say_so() {
        let mut page = Page(String::new());
        page.rows("none at all", &["n"], (0..ROWS + 3).map(|n| [n.to_string()]));
        assert!(
            page.0.contains("\nand 3 more\n") && page.0.contains("| 199 |") && !page.0.contains("| 200 |")
        );
        let mut page = Page(String::new());
        page.rows("none at all", &["n"], Vec::<[String; 1]>::new());
        assert_eq!(page.0, "none at all\n\n");
    }

    #[test]
    fn people_and_who_can_log_in_are_told() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nwww-data:x:33:33::/var/www:/usr/sbin/nologin\n\
                      ann:x:1000:1000::/home/ann:/usr/sbin/nologin\nbroken:line\n";
        let names: Vec<_> = users(passwd).map(|[name, ..]| name).collect();
        assert_eq!(names, ["root", "ann"]);
    }
}
