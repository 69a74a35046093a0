//! `kiln completions`

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::failure::Outcome;
use crate::screen::write_all;

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell to complete for
    shell: Shell,
}

pub(crate) fn run(it: &Completions) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(it.shell, &mut crate::Cli::command(), "kiln", &mut script);
    write_all(&script)
}
