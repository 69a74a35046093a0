//! `kiln lint`

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use clap::Args;
use kiln_model::definition::{self, Definition, WrongPath};
use miette::{GraphicalReportHandler, GraphicalTheme};
use serde::Serialize;
use serde_json::json;
use walkdir::WalkDir;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::screen::{Screen, print};
use crate::words::plural;

#[derive(Debug, Args)]
pub(crate) struct Lint {
    /// A folder with definitions anywhere below it, or one server.yaml
    #[arg(default_value = ".")]
    path: PathBuf,
}

const FILE: &str = "server.yaml";

/// One thing that is wrong.
#[derive(Debug, Serialize)]
struct Problem {
    file: String,
    line: usize,
    column: usize,
    message: String,
    help: Option<String>,
}

/// What one file came to.
#[derive(Default)]
struct Looked {
    file: String,
    name: Option<String>,
    problems: Vec<Problem>,
    /// As it is drawn for people.
    drawn: String,
}

pub(crate) fn run(it: &Lint, screen: Screen) -> Outcome {
    let files = find(&it.path)?;
    if files.is_empty() {
        return Err(Failure::new(Code::NotFound, format!("there is no {FILE} in {}", it.path.display()), "")
            .todo("`kiln init` writes one to begin with"));
    }
    let looked = files.iter().map(|file| look(file)).collect::<Outcome<Vec<_>>>()?;
    let wrong: usize = looked.iter().map(|it| it.problems.len()).sum();
    let documents: Vec<_> = looked
        .iter()
        .map(|it| json!({ "file": it.file, "name": it.name, "problems": it.problems }))
        .collect();
    screen.json(&json!({ "definitions": documents, "problems": wrong }))?;
    for it in &looked {
        if it.problems.is_empty() {
            screen.line(format_args!("{}: good ({})", it.file, it.name.as_deref().unwrap_or_default()))?;
        } else if !screen.is_json() {
            print(it.drawn.trim_end())?;
        }
    }
    if wrong > 0 {
        screen.line(format_args!(
            "\n{} in {}",
            plural(wrong, "problem"),
            plural(looked.len(), "definition")
        ))?;
        return Err(Failure::Shown(Code::Invalid));
    }
    screen.next(&[format!("kiln apply {} --wait", it.path.display())])
}

fn find(path: &Path) -> Outcome<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut found = Vec::new();
    let walk = WalkDir::new(path).sort_by_file_name().into_iter().filter_entry(|it| it.file_name() != ".git");
    for entry in walk {
        let entry = entry.map_err(|error| {
            let what = format!("reading {}", path.display());
            match error.io_error().map(std::io::Error::kind) {
                Some(std::io::ErrorKind::NotFound) => Failure::new(Code::NotFound, what, "it does not exist"),
                _ => Failure::failed(what, error),
            }
        })?;
        if entry.file_name() == FILE {
            found.push(entry.into_path());
        }
    }
    Ok(found)
}

fn look(path: &Path) -> Outcome<Looked> {
    let file = path.display().to_string();
    let shown = file.strip_prefix("./").unwrap_or(&file).to_owned();
    let mut content = Vec::new();
    // What is longer is refused by its first bytes.
    fs::File::open(path)
        .and_then(|opened| opened.take(definition::MAX_TEXT as u64 + 1).read_to_end(&mut content))
        .during(format_args!("reading {file}"))?;
    let (name, errors) = match definition::parse(&content, &shown) {
        Ok(definition) => {
            let folder =
                path.parent().filter(|it| !it.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
            let wrong = check_folder(&definition, folder);
            let errors = (!wrong.is_empty()).then(|| definition::wrong_paths(&content, &shown, wrong));
            (Some(definition.name), errors)
        }
        Err(errors) => (errors.server().cloned(), Some(errors)),
    };
    let mut looked = Looked { file: shown, name: name.map(|it| it.to_string()), ..Looked::default() };
    if let Some(errors) = errors {
        let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor());
        // Writing to a String does not fail; without a drawing the plain lines do.
        if handler.render_report(&mut looked.drawn, &errors.report()).is_err() {
            looked.drawn = errors.to_string();
        }
        // Each of several faults is drawn below a line that says nothing but this.
        looked.drawn = looked
            .drawn
            .lines()
            .filter(|line| line.trim_end() != "Error:")
            .fold(String::new(), |drawn, line| drawn + line + "\n");
        looked.problems = errors
            .problems()
            .iter()
            .map(|it| Problem {
                file: looked.file.clone(),
                line: it.line(),
                column: it.column(),
                message: it.message().to_owned(),
                help: it.help().map(ToOwned::to_owned),
            })
            .collect();
    }
    Ok(looked)
}

fn check_folder(definition: &Definition, folder: &Path) -> Vec<WrongPath> {
    definition.image.named_files().into_iter().flat_map(|src| check_source(src, folder)).collect()
}

fn check_source(src: &str, folder: &Path) -> Vec<WrongPath> {
    let wrong =
        |message: String, help: &str| WrongPath { path: src.to_owned(), message, help: help.to_owned() };
    let path = folder.join(src);
    let Ok(root) = folder.canonicalize() else { return Vec::new() };
    if path.symlink_metadata().is_err() {
        let help = format!("put it into {}, or correct the path", folder.display());
        return vec![wrong(format!("`{src}` does not exist"), &help)];
    }
    let mut found = Vec::new();
    for entry in WalkDir::new(&path) {
        let Ok(entry) = entry else {
            found.push(wrong(format!("something in `{src}` can't be read"), "make it readable for you"));
            continue;
        };
        if !entry.path_is_symlink() {
            continue;
        }
        // A link that stays inside is taken as a link; one that leaves would bring a file of this machine along.
        let inside = entry.path().canonicalize().is_ok_and(|target| target.starts_with(&root));
        if !inside {
            let message =
                format!("the symbolic link `{}` leaves the folder, or leads nowhere", entry.path().display());
            found.push(wrong(message, "copy what it leads to into the folder"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_definition_names_is_there_and_stays_inside() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("site")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("site/link")).unwrap();
        std::os::unix::fs::symlink("../good", folder.path().join("site/other")).unwrap();
        fs::write(folder.path().join("good"), "x").unwrap();
        let text = |problems: Vec<WrongPath>| {
            problems.into_iter().map(|it| it.message).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(text(check_source("good", folder.path())), "");
        assert_eq!(text(check_source("bad", folder.path())), "`bad` does not exist");
        let site = text(check_source("site/", folder.path()));
        assert!(site.contains("site/link") && !site.contains("other"), "{site}");
    }
}
