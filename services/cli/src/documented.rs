//! What the documents tell people to type is understood.

use std::path::Path;

use clap::Parser as _;

use crate::Cli;

const DOCUMENTS: [&str; 6] = [
    "README.md",
    "deploy/runbook.md",
    "deploy/security.md",
    "deploy/site.toml",
    "deploy/containers/compose.yaml",
    "deploy/containers/Containerfile",
];

/// `kiln …` in indented blocks and between backticks, up to what the shell takes from there.
fn commands(text: &str) -> Vec<Vec<String>> {
    let blocks = text.lines().filter_map(|line| line.strip_prefix("    ").or(line.strip_prefix("#   ")));
    let quoted = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    let is_end = |word: &&str| ["#", "<", ">", "|", "&&", "…"].contains(word);
    blocks
        .chain(quoted)
        .map(|line| {
            line.split_whitespace()
                .take_while(|word| !is_end(word))
                .map(|it| it.trim_matches('\'').to_owned())
                .collect()
        })
        .filter(|words: &Vec<String>| words.first().is_some_and(|word| word == "kiln") && words.len() > 1)
        .collect()
}

#[test]
fn every_command_in_the_documents_is_one() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut wrong = Vec::new();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        let commands = commands(&text);
        assert!(!commands.is_empty() || !document.ends_with(".md"), "{document} has no commands");
        for words in commands {
            if let Err(error) = Cli::try_parse_from(&words) {
                let why = error.to_string();
                // A name of a command alone is a mention of it.
                let is_mention = error.kind() == clap::error::ErrorKind::MissingRequiredArgument
                    || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
                if !is_mention {
                    wrong.push(format!(
                        "{document}: {}: {}",
                        words.join(" "),
                        why.lines().next().unwrap_or_default()
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
