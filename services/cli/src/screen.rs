//! Where output goes: the answer to standard output, progress to standard error.

use std::fmt::Display;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use clap::ValueEnum;
use comfy_table::{Attribute, Cell, Color, ColumnConstraint, ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::failure::{Failure, Outcome};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// One document for programs.
    Json,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    format: Format,
    color: bool,
    /// Progress can be drawn over itself.
    drawn: bool,
}

impl Screen {
    pub(crate) fn new(format: Format, no_color: bool) -> Self {
        let plain = no_color
            || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Self {
            format,
            color: !plain && io::stdout().is_terminal(),
            drawn: format == Format::Table && io::stderr().is_terminal(),
        }
    }

    pub(crate) fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// A line of the answer for people; nothing where a program asked.
    pub(crate) fn line(self, text: impl Display) -> Outcome {
        if self.is_json() { Ok(()) } else { print(text) }
    }

    /// The answer for programs; nothing where a person asked.
    pub(crate) fn json(self, document: &Value) -> Outcome {
        if self.is_json() { print(document) } else { Ok(()) }
    }

    pub(crate) fn next(self, steps: &[impl Display]) -> Outcome {
        for (index, step) in steps.iter().enumerate() {
            self.line(format_args!("{} {step}", if index == 0 { "\nNext:" } else { "     " }))?;
        }
        Ok(())
    }

    /// A line of progress. That nobody reads it is no reason to end the work.
    pub(crate) fn progress(self, text: impl Display) {
        if !self.is_json() {
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    pub(crate) fn table(self, head: &[&str], rows: Vec<Vec<Cell>>) -> Outcome {
        if self.is_json() {
            return Ok(());
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let width = table.width();
        if self.color {
            table.enforce_styling();
        } else {
            table.force_no_tty();
        }
        table.set_header(head.iter().map(|text| Cell::new(text).add_attribute(Attribute::Bold)));
        table.add_rows(rows);
        fit(&mut table, width);
        let text = table.to_string();
        for line in text.lines() {
            print(line.trim_end())?;
        }
        Ok(())
    }

    /// A bar on a terminal, nothing elsewhere: there [`Screen::progress`] tells each step.
    pub(crate) fn bar(self, length: u64) -> Bar {
        if !self.drawn {
            return Bar(None);
        }
        let bar = ProgressBar::new(length);
        bar.set_style(style(length));
        bar.enable_steady_tick(Duration::from_millis(120));
        Bar(Some(bar))
    }
}

/// Room for words in the last column.
const LEAST: u16 = 24;

/// Breaks what is to be read, which comes last; names and digests before it are copied, and stay whole. Where there is no
/// room for that, as in a file or on a terminal that does not say its width, nothing is broken.
fn fit(table: &mut Table, width: Option<u16>) {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let widths = table.column_max_content_widths();
    let Some((_, before)) = widths.split_last() else { return };
    let before = before.iter().fold(0_u16, |sum, width| sum.saturating_add(width + 2));
    match width.filter(|width| *width >= before.saturating_add(LEAST)) {
        Some(width) => {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
            let columns = widths.len();
            for column in table.column_iter_mut().take(columns - 1) {
                column.set_constraint(ColumnConstraint::ContentWidth);
            }
        }
        None => {
            table.set_content_arrangement(ContentArrangement::Disabled);
        }
    }
}

/// A bar where it is known how much there is to do, else something that moves.
fn style(length: u64) -> ProgressStyle {
    // Cut at the terminal's width: a line that wraps can't be drawn over.
    let template = if length == 0 {
        "{spinner} {elapsed} {wide_msg}"
    } else {
        "{spinner} {elapsed} [{bar:24}] {pos}/{len} {wide_msg}"
    };
    let style = ProgressStyle::with_template(template);
    style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

/// Work that is under way, drawn where there is a terminal.
pub(crate) struct Bar(Option<ProgressBar>);

impl Bar {
    pub(crate) fn set(&self, position: u64, length: u64, message: impl Display) {
        if let Some(bar) = &self.0 {
            // A total may come to be known, and go again, as work passes from one stage to the next.
            if (bar.length().unwrap_or(0) == 0) != (length == 0) {
                bar.set_style(style(length));
            }
            bar.set_message(message.to_string());
            bar.set_length(length);
            bar.set_position(position);
        }
    }

    pub(crate) fn message(&self, message: impl Display) {
        if let Some(bar) = &self.0 {
            bar.set_message(message.to_string());
        }
    }

    /// A line above the bar.
    pub(crate) fn line(&self, screen: Screen, text: impl Display) {
        match &self.0 {
            Some(bar) => bar.suspend(|| screen.progress(text)),
            None => screen.progress(text),
        }
    }

    pub(crate) fn is_drawn(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// Writes one line to standard output, whatever the format.
pub(crate) fn print(text: impl Display) -> Outcome {
    write_all(format!("{text}\n").as_bytes())
}

pub(crate) fn write_all(bytes: &[u8]) -> Outcome {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ClosedPipe,
        _ => Failure::failed("writing to standard output", error),
    })
}

pub(crate) fn plain(text: impl ToString) -> Cell {
    Cell::new(text)
}

pub(crate) fn good(text: impl ToString) -> Cell {
    Cell::new(text).fg(Color::Green)
}

pub(crate) fn busy(text: impl ToString) -> Cell {
    Cell::new(text).fg(Color::Yellow)
}

pub(crate) fn bad(text: impl ToString) -> Cell {
    Cell::new(text).fg(Color::Red)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::{ProgressDrawTarget, TermLike};

    use super::*;

    #[test]
    fn names_stay_whole_and_what_is_read_is_broken_at_words() {
        let shown = |width| {
            let mut table = Table::new();
            table.load_style(presets::NOTHING).force_no_tty();
            table.set_header(["SERVER", "IMAGE", "NOTE"]);
            table.add_row(["a-long-name", "0123456789ab", "web r2 was rolled back as its check failed"]);
            fit(&mut table, width);
            table.to_string().lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>()
        };
        let whole = "a-long-name  0123456789ab  web r2 was rolled back as its check failed";
        for width in [None, Some(0), Some(40), Some(200)] {
            assert_eq!(shown(width)[1..], [whole], "{width:?}");
        }
        let broken = shown(Some(55));
        assert_eq!(broken[1], "a-long-name  0123456789ab  web r2 was rolled back as");
        assert_eq!(broken[2].trim(), "its check failed");
    }

    /// A terminal that keeps what is written to it.
    #[derive(Debug, Clone, Default)]
    struct Kept(Arc<Mutex<String>>);

    impl TermLike for Kept {
        fn width(&self) -> u16 {
            120
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            self.0.lock().unwrap().clear();
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bar_is_drawn_as_soon_as_and_as_long_as_the_total_is_known() {
        let terminal = Kept::default();
        let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
        let bar = Bar(Some(ProgressBar::with_draw_target(Some(0), target).with_style(style(0))));
        let drawn = || {
            bar.0.as_ref().unwrap().force_draw();
            terminal.0.lock().unwrap().clone()
        };
        bar.set(0, 0, "resolving");
        assert!(drawn().contains("resolving") && !drawn().contains('['), "{}", drawn());
        bar.set(3, 6, "building");
        assert!(drawn().contains("[============>           ] 3/6 building"), "{}", drawn());
        bar.set(0, 0, "waiting");
        assert!(drawn().contains("waiting") && !drawn().contains('['), "{}", drawn());
    }
}
