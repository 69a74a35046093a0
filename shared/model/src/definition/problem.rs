//! What is wrong with a definition, for people and for programs.

use std::fmt;

use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode, SourceSpan};
use serde::{Serialize, Serializer};

use crate::name::ServerName;

/// A part of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Place {
    /// From 1, in characters.
    pub(super) line: usize,
    pub(super) column: usize,
    /// In bytes, for snippets.
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Place {
    /// The place of one character.
    pub(super) fn of(text: &str, line: usize, column: usize) -> Self {
        let before: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
        let rest = text.get(before..).unwrap_or_default();
        let start = before + rest.chars().take(column.saturating_sub(1)).map(char::len_utf8).sum::<usize>();
        let end = start + text.get(start..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8);
        Self { line: line.max(1), column: column.max(1), start, end }
    }

    /// The place of the character at `start`, which is a byte of `text`.
    pub(super) fn at(text: &str, start: usize) -> Self {
        let before = text.get(..start).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Self::of(text, line, column)
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    place: Place,
    message: String,
    help: Option<String>,
}

impl Problem {
    pub(super) fn new(place: Place, message: impl Into<String>, help: Option<String>) -> Self {
        Self { place, message: message.into(), help }
    }

    pub(super) fn lies_in(&self, place: Place) -> bool {
        (place.start..place.end).contains(&self.place.start)
    }

    /// From 1.
    pub fn line(&self) -> usize {
        self.place.line
    }

    /// From 1, in characters.
    pub fn column(&self) -> usize {
        self.place.column
    }

    /// What is wrong.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What would be right.
    pub fn help(&self) -> Option<&str> {
        self.help.as_deref()
    }
}

/// `3:5: unknown key `replica`; did you mean `replicas`?`
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.place.line, self.place.column, self.message)?;
        self.help.as_ref().map_or(Ok(()), |help| write!(f, "; {help}"))
    }
}

/// Everything that was found wrong with one definition, in the order of the text; at least one problem.
#[derive(Debug, Clone)]
pub struct DefinitionErrors {
    // Boxed, since this is the unlikely side of a Result.
    source: Box<NamedSource<String>>,
    problems: Vec<Problem>,
    server: Option<ServerName>,
}

impl DefinitionErrors {
    /// What is wrong with an anchor's content shows at each of its aliases, and is said once.
    pub(super) fn new(
        file: &str,
        text: &str,
        mut problems: Vec<Problem>,
        server: Option<ServerName>,
    ) -> Self {
        problems.sort_by_key(|problem| (problem.place.line, problem.place.column));
        problems.dedup();
        Self { source: Box::new(NamedSource::new(file, text.to_owned())), problems, server }
    }

    pub fn file(&self) -> &str {
        self.source.name()
    }

    /// Whose definition it is, as far as that can be made out.
    pub fn server(&self) -> Option<&ServerName> {
        self.server.as_ref()
    }

    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }
}

/// A line for each problem: `web/server.yaml:3:5: unknown key `replica`; did you mean `replicas`?`
impl fmt::Display for DefinitionErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{}:{problem}", self.file())?;
        }
        Ok(())
    }
}

impl std::error::Error for DefinitionErrors {}

/// A list of objects, one for each problem.
impl Serialize for DefinitionErrors {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Line<'a> {
            file: &'a str,
            line: usize,
            column: usize,
            message: &'a str,
            #[serde(skip_serializing_if = "Option::is_none")]
            help: Option<&'a str>,
        }
        serializer.collect_seq(self.problems.iter().map(|problem| Line {
            file: self.file(),
            line: problem.line(),
            column: problem.column(),
            message: problem.message(),
            help: problem.help(),
        }))
    }
}

/// How it is drawn for people: the count first, then each problem with the lines around it.
#[derive(Debug)]
pub struct Report<'a> {
    errors: &'a DefinitionErrors,
    related: Vec<Drawn<'a>>,
}

#[derive(Debug)]
struct Drawn<'a> {
    problem: &'a Problem,
    source: &'a NamedSource<String>,
}

impl DefinitionErrors {
    /// With the lines of the text around each problem.
    pub fn report(&self) -> Report<'_> {
        let related = self.problems.iter().map(|problem| Drawn { problem, source: &self.source }).collect();
        Report { errors: self, related }
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.errors.problems.len() {
            1 => write!(f, "{} is wrong", self.errors.file()),
            count => write!(f, "{} is wrong in {count} places", self.errors.file()),
        }
    }
}

impl std::error::Error for Report<'_> {}

impl Diagnostic for Report<'_> {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.related.iter().map(|drawn| drawn as &dyn Diagnostic)))
    }
}

impl fmt::Display for Drawn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem.message)
    }
}

impl std::error::Error for Drawn<'_> {}

impl Diagnostic for Drawn<'_> {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.problem.help().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(self.source)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        // A snippet of a whole block would hide what it is about.
        let Place { start, end, .. } = self.problem.place;
        let text = self.source.inner();
        let first_line = text.get(start..end).and_then(|part| part.lines().next()).map_or(0, str::len);
        let span = SourceSpan::new(start.into(), first_line);
        Some(Box::new(std::iter::once(LabeledSpan::new_with_span(Some("here".to_owned()), span))))
    }
}
