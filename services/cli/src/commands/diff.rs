//! `kiln diff`

use clap::Args;
use kiln_api::builder::{CompareImagesRequest, CompareImagesResponse, FileChange, FileKind, FileState};

use crate::clients::Services;
use crate::failure::{During as _, Outcome};
use crate::json;
use crate::screen::{Screen, plain};
use crate::words::{or_dash, plural, short};

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// An image's digest, a build, or a server for its newest image
    #[arg(value_name = "SERVER|BUILD|DIGEST")]
    before: String,
    /// What it is compared with, in the same form
    #[arg(value_name = "SERVER|BUILD|DIGEST")]
    after: String,
    /// Show so many files; 0 for all
    #[arg(short = 'n', long, value_name = "LINES", default_value = "50")]
    limit: usize,
}

pub(crate) async fn run(it: &Diff, services: &Services, screen: Screen) -> Outcome {
    let what = format!("comparing {} with {}", it.before, it.after);
    let bar = screen.bar(0);
    bar.message(&what);
    let request = CompareImagesRequest { before: it.before.clone(), after: it.after.clone() };
    let mut stream = services.builder().compare_images(request).await.during(&what)?.into_inner();
    let mut all = CompareImagesResponse::default();
    while let Some(piece) = stream.message().await.during(&what)? {
        if !piece.before.is_empty() {
            (all.before, all.after) = (piece.before, piece.after);
        }
        all.packages.extend(piece.packages);
        all.configuration.extend(piece.configuration);
        all.files.extend(piece.files);
    }
    drop(bar);
    screen.json(&json::of("kiln.builder.v1.CompareImagesResponse", &all)?)?;
    show(&all, it.limit, screen)?;
    screen.next(&[format!("kiln image inspect {}", it.after)])
}

fn show(all: &CompareImagesResponse, limit: usize, screen: Screen) -> Outcome {
    let CompareImagesResponse { before, after, packages, configuration, files } = all;
    screen.line(format_args!("{} -> {}", short(before), short(after)))?;
    if packages.is_empty() && configuration.is_empty() && files.is_empty() {
        return screen.line("They hold the same.");
    }
    if !packages.is_empty() {
        screen.line(format_args!("\npackages: {}", plural(packages.len(), "change")))?;
        let rows = packages.iter().map(|it| [it.name.as_str(), or_dash(&it.from), or_dash(&it.to)]);
        screen.table(&["PACKAGE", "FROM", "TO"], rows.map(|row| row.map(plain).to_vec()).collect())?;
    }
    if !configuration.is_empty() {
        screen.line(format_args!("\nconfiguration: {}", plural(configuration.len(), "change")))?;
        let rows = configuration.iter().map(|it| [it.name.as_str(), or_dash(&it.before), or_dash(&it.after)]);
        screen.table(&["WHAT", "FROM", "TO"], rows.map(|row| row.map(plain).to_vec()).collect())?;
    }
    if !files.is_empty() {
        screen.line(format_args!("\nfiles: {}", plural(files.len(), "change")))?;
        let shown = if limit == 0 { files.len() } else { limit.min(files.len()) };
        let rows = files[..shown].iter().map(|it| vec![plain(&it.path), plain(change(it))]);
        screen.table(&["PATH", "CHANGE"], rows.collect())?;
        if shown < files.len() {
            screen.line(format_args!("and {} more: -n 0 shows all", files.len() - shown))?;
        }
    }
    Ok(())
}

fn change(file: &FileChange) -> String {
    match (&file.before, &file.after) {
        (None, Some(after)) => format!("new {}", described(after)),
        (Some(before), None) => format!("gone {}", described(before)),
        (Some(before), Some(after)) => differences(before, after, file.content).join("; "),
        (None, None) => "-".to_owned(),
    }
}

fn kind(file: &FileState) -> &'static str {
    match file.kind() {
        FileKind::Regular => "file",
        FileKind::Directory => "folder",
        FileKind::Symlink => "link",
        FileKind::Fifo => "fifo",
        FileKind::Unspecified => "thing",
    }
}

fn described(file: &FileState) -> String {
    match file.kind() {
        FileKind::Symlink => format!("link to {}", file.target),
        FileKind::Regular => {
            format!("file, {:04o} {}:{}, {}", file.mode, file.uid, file.gid, bytes(file.size))
        }
        _ => format!("{}, {:04o} {}:{}", kind(file), file.mode, file.uid, file.gid),
    }
}

fn differences(before: &FileState, after: &FileState, content: bool) -> Vec<String> {
    if before.kind != after.kind {
        return vec![format!("was a {}, now {}", kind(before), described(after))];
    }
    let mut told = Vec::new();
    if content && before.size == after.size {
        told.push("content".to_owned());
    } else if content {
        told.push(format!("content, {} -> {}", before.size, bytes(after.size)));
    }
    if before.target != after.target {
        told.push(format!("link to {} -> {}", before.target, after.target));
    }
    if before.mode != after.mode {
        told.push(format!("mode {:04o} -> {:04o}", before.mode, after.mode));
    }
    if (before.uid, before.gid) != (after.uid, after.gid) {
        told.push(format!("owner {}:{} -> {}:{}", before.uid, before.gid, after.uid, after.gid));
    }
    if before.capabilities != after.capabilities {
        told.push("file capabilities".to_owned());
    }
    told
}

fn bytes(count: u64) -> String {
    plural(usize::try_from(count).unwrap_or(usize::MAX), "byte")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regular(mode: u32, uid: u32, size: u64) -> FileState {
        FileState { kind: FileKind::Regular.into(), mode, uid, size, ..FileState::default() }
    }

    #[test]
    fn what_changed_of_a_file_is_told_in_words() {
        let told = |before: Option<FileState>, after: Option<FileState>, content| {
            change(&FileChange { path: "/a".to_owned(), before, after, content })
        };
        let (old, link) = (
            regular(0o644, 0, 1),
            FileState { kind: FileKind::Symlink.into(), target: "b".to_owned(), ..FileState::default() },
        );
        assert_eq!(told(None, Some(old.clone()), false), "new file, 0644 0:0, 1 byte");
        assert_eq!(told(Some(link.clone()), None, false), "gone link to b");
        assert_eq!(told(Some(old.clone()), Some(regular(0o644, 0, 1)), true), "content");
        assert_eq!(
            told(Some(old.clone()), Some(regular(0o600, 7, 12)), true),
            "content, 1 -> 12 bytes; mode 0644 -> 0600; owner 0:0 -> 7:0"
        );
        assert_eq!(told(Some(old), Some(link), false), "was a file, now link to b");
    }
}
