//! What the node saw inside an instance, held against what the check wants.

use kiln_model::check::{CommandCheck, FileCheck};
use memchr::memmem;

use crate::{Verdict, clip};

/// How much of a command's output or a file's content needs to be handed in.
pub const MAX_CONTENT: usize = 1024 * 1024;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandSeen<'a> {
    /// Exit status, or 128 + signal.
    pub status: i32,
    pub stdout: &'a [u8],
    pub stderr: &'a [u8],
}

/// A file as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSeen<'a> {
    Absent,
    Present(PresentFile<'a>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PresentFile<'a> {
    /// Permission bits, set-id and sticky bits included.
    pub mode: u32,
    pub uid: u32,
    /// Its owner's name in the instance's own user database, if it has one.
    pub owner: Option<&'a str>,
    pub content: &'a [u8],
}

pub fn command(check: &CommandCheck, seen: CommandSeen<'_>) -> Verdict {
    let CommandSeen { status, stdout, stderr } = seen;
    if status != check.status {
        let said = [stderr, stdout].into_iter().find_map(last_line).unwrap_or_default();
        let said = if said.is_empty() { said } else { format!(": {}", clip(&said)) };
        return Verdict::failed(format!("exit status {status}, wanted {}{said}", check.status));
    }
    match check.stdout.as_deref() {
        Some(wanted) if memmem::find(stdout, wanted.as_bytes()).is_none() => Verdict::failed(format!(
            "exit status {status}, the output of {} bytes does not contain `{}`",
            stdout.len(),
            clip(wanted)
        )),
        _ => Verdict::passed(format!("exit status {status}")),
    }
}

pub fn file(check: &FileCheck, seen: FileSeen<'_>) -> Verdict {
    let path = clip(&check.path);
    let file = match (seen, check.absent) {
        (FileSeen::Absent, true) => return Verdict::passed(format!("{path} does not exist")),
        (FileSeen::Absent, false) => return Verdict::failed(format!("{path} does not exist")),
        (FileSeen::Present(_), true) => return Verdict::failed(format!("{path} exists, and must not")),
        (FileSeen::Present(file), false) => file,
    };
    if let Some(wanted) = check.mode.as_deref() {
        match u32::from_str_radix(wanted, 8) {
            Ok(bits) if bits == file.mode => {}
            Ok(_) => return Verdict::failed(format!("{path} has mode {:04o}, wanted {wanted}", file.mode)),
            Err(_) => return Verdict::failed(format!("the wanted mode `{}` is not octal", clip(wanted))),
        }
    }
    if let Some(wanted) = check.owner.as_deref() {
        let by_number = wanted.parse() == Ok(file.uid);
        if !by_number && file.owner != Some(wanted) {
            let owner = file.owner.unwrap_or("no name");
            return Verdict::failed(format!(
                "{path} belongs to {} ({}), wanted {}",
                clip(owner),
                file.uid,
                clip(wanted)
            ));
        }
    }
    match check.contains.as_deref() {
        Some(wanted) if memmem::find(file.content, wanted.as_bytes()).is_none() => Verdict::failed(format!(
            "{path} ({} bytes read) does not contain `{}`",
            file.content.len(),
            clip(wanted)
        )),
        _ => Verdict::passed(format!("{path} is as wanted")),
    }
}

/// The last line that says something, as text.
fn last_line(output: &[u8]) -> Option<String> {
    let line = output.split(|b| *b == b'\n').map(<[u8]>::trim_ascii).rfind(|line| !line.is_empty())?;
    Some(String::from_utf8_lossy(line).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(run: &str, status: i32, stdout: Option<&str>) -> CommandCheck {
        CommandCheck { run: run.to_owned(), status, stdout: stdout.map(str::to_owned) }
    }

    #[test]
    fn a_command_is_judged_by_status_and_output() {
        let seen = |status, stdout| CommandSeen { status, stdout, stderr: b"first\nnginx: not found\n\n" };
        assert!(command(&ran("nginx -v", 0, None), seen(0, b"")).passed);
        assert!(command(&ran("false", 1, None), seen(1, b"")).passed);
        assert!(command(&ran("echo", 0, Some("b c")), seen(0, b"a b c")).passed);

        let failed = command(&ran("nginx -v", 0, None), seen(127, b""));
        assert_eq!(failed, Verdict::failed("exit status 127, wanted 0: nginx: not found"));
        let failed = command(&ran("echo", 0, Some("d")), seen(0, b"a b c"));
        assert_eq!(failed, Verdict::failed("exit status 0, the output of 5 bytes does not contain `d`"));
        let silent = CommandSeen { status: 2, stdout: b"", stderr: b"" };
        assert_eq!(command(&ran("x", 0, None), silent).detail, "exit status 2, wanted 0");
    }

    fn wants(change: impl FnOnce(&mut FileCheck)) -> FileCheck {
        let mut check =
            FileCheck { path: "/etc/x".to_owned(), mode: None, owner: None, contains: None, absent: false };
        change(&mut check);
        check
    }

    #[test]
    fn a_file_is_judged_by_all_that_is_wanted_of_it() {
        let present = PresentFile { mode: 0o644, uid: 33, owner: Some("www-data"), content: b"listen 80;" };
        let cases: &[(FileCheck, FileSeen<'_>, bool)] = &[
            (wants(|_| {}), FileSeen::Present(present), true),
            (wants(|_| {}), FileSeen::Absent, false),
            (wants(|c| c.absent = true), FileSeen::Absent, true),
            (wants(|c| c.absent = true), FileSeen::Present(present), false),
            (wants(|c| c.mode = Some("0644".to_owned())), FileSeen::Present(present), true),
            (wants(|c| c.mode = Some("644".to_owned())), FileSeen::Present(present), true),
            (wants(|c| c.mode = Some("0600".to_owned())), FileSeen::Present(present), false),
            (wants(|c| c.mode = Some("rw".to_owned())), FileSeen::Present(present), false),
            (wants(|c| c.owner = Some("www-data".to_owned())), FileSeen::Present(present), true),
            (wants(|c| c.owner = Some("33".to_owned())), FileSeen::Present(present), true),
            (wants(|c| c.owner = Some("root".to_owned())), FileSeen::Present(present), false),
            (wants(|c| c.owner = Some("0".to_owned())), FileSeen::Present(present), false),
            (wants(|c| c.contains = Some("listen 80".to_owned())), FileSeen::Present(present), true),
            (wants(|c| c.contains = Some("listen 81".to_owned())), FileSeen::Present(present), false),
        ];
        for (check, seen, passes) in cases {
            let verdict = file(check, *seen);
            assert_eq!(verdict.passed, *passes, "{check:?} {seen:?}: {}", verdict.detail);
        }
    }
}
