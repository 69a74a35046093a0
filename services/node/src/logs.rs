//! What instances wrote, from the file that conmon keeps: `<time> <stream> <F|P> <text>` for each line, `P` where the
//! line goes on in the next record.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

/// Read at once.
const BLOCK: usize = 64 << 10;
/// Longer lines are given in parts.
const LINE_LIMIT: usize = 64 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) time: Option<Timestamp>,
    /// `stdout` or `stderr`.
    pub(crate) stream: String,
    pub(crate) text: Vec<u8>,
}

/// Reads on from where it stands, also when conmon begins the file anew because it grew too large.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    file: Option<File>,
    /// What was read and is not yet a whole record.
    rest: Vec<u8>,
}

impl Reader {
    /// Stands before the last `tail` lines; before the first one where `tail` is 0. Blocks, as all here.
    pub(crate) fn open(path: &Path, tail: usize) -> io::Result<Self> {
        let mut reader = Self { path: path.to_owned(), file: open(path)?, rest: Vec::new() };
        if let Some(file) = reader.file.as_mut().filter(|_| tail > 0) {
            let start = start_of_tail(file, tail)?;
            file.seek(SeekFrom::Start(start))?;
        }
        Ok(reader)
    }

    /// The next lines, at most a block of them; empty where there are no more for now.
    pub(crate) fn next(&mut self) -> io::Result<Vec<Line>> {
        loop {
            let Some(file) = self.file.as_mut() else {
                self.file = open(&self.path)?;
                if self.file.is_none() {
                    return Ok(Vec::new());
                }
                continue;
            };
            let mut block = vec![0; BLOCK];
            let n = file.read(&mut block)?;
            if n > 0 {
                self.rest.extend_from_slice(&block[..n]);
                let lines = self.take_lines();
                if lines.is_empty() {
                    continue;
                }
                return Ok(lines);
            }
            // At the end: of this file, which may have been replaced.
            let own = file.metadata()?.ino();
            match std::fs::metadata(&self.path) {
                Ok(now) if now.ino() != own => {
                    self.file = open(&self.path)?;
                    self.rest.clear();
                }
                _ => return Ok(Vec::new()),
            }
        }
    }

    fn take_lines(&mut self) -> Vec<Line> {
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else {
            // No record is that long: conmon writes at most 8 KiB.
            if self.rest.len() > 2 * LINE_LIMIT {
                self.rest.clear();
            }
            return Vec::new();
        };
        let (whole, rest) = self.rest.split_at(end + 1);
        let mut lines: Vec<Line> = Vec::new();
        let mut going_on = false;
        for record in whole.split(|byte| *byte == b'\n').filter(|record| !record.is_empty()) {
            let Some((line, partial)) = parse(record) else { continue };
            match lines.last_mut() {
                Some(last) if going_on && last.stream == line.stream && last.text.len() < LINE_LIMIT => {
                    last.text.extend_from_slice(&line.text);
                }
                _ => lines.push(line),
            }
            going_on = partial;
        }
        self.rest = rest.to_vec();
        lines
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn start_of_tail(file: &mut File, tail: usize) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    // The file's last byte ends the last line, so one more line end is looked for.
    let mut missing = tail + 1;
    let mut block = vec![0; BLOCK];
    while end > 0 {
        let begin = end.saturating_sub(BLOCK as u64);
        let length = usize::try_from(end - begin).unwrap_or(BLOCK);
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(&mut block[..length])?;
        for (at, _) in block[..length].iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            missing -= 1;
            if missing == 0 {
                return Ok(begin + at as u64 + 1);
            }
        }
        end = begin;
    }
    Ok(0)
}

fn parse(record: &[u8]) -> Option<(Line, bool)> {
    let mut fields = record.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let stream = std::str::from_utf8(fields.next()?).ok()?.to_owned();
    let partial = fields.next()? == b"P";
    let text = fields.next().unwrap_or_default().to_vec();
    Some((Line { time, stream, text }, partial))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const TIME: &str = "2026-11-23T06:17:09.669794202+00:00";

    fn texts(lines: &[Line]) -> Vec<String> {
        lines.iter().map(|line| String::from_utf8_lossy(&line.text).into_owned()).collect()
    }

    #[test]
    fn lines_are_followed_across_a_replaced_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut reader = Reader::open(&path, 0).unwrap();
        assert!(reader.next().unwrap().is_empty());
        let mut file = File::create(&path).unwrap();
        write!(file, "{TIME} stdout F one\n{TIME} stderr P tw").unwrap();
        let lines = reader.next().unwrap();
        assert_eq!(texts(&lines), ["one"]);
        assert!(lines[0].time.is_some());
        write!(file, "o\n{TIME} stderr F  and more\n").unwrap();
        assert_eq!(texts(&reader.next().unwrap()), ["two and more"]);
        let other = dir.path().join("log.tmp");
        std::fs::write(&other, format!("{TIME} stdout F three\n")).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(texts(&reader.next().unwrap()), ["three"]);
        assert!(reader.next().unwrap().is_empty());
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let all: String = (0..5000).map(|n| format!("{TIME} stdout F line {n}\n")).collect();
        std::fs::write(&path, all).unwrap();
        assert_eq!(texts(&Reader::open(&path, 2).unwrap().next().unwrap()), ["line 4998", "line 4999"]);
        let mut reader = Reader::open(&path, 4000).unwrap();
        assert_eq!(texts(&reader.next().unwrap())[0], "line 1000");
        assert_eq!(texts(&Reader::open(&path, 9999).unwrap().next().unwrap())[0], "line 0");
    }
}
