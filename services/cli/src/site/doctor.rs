//! Whether this machine can run instances: the node looks, this shows.

use std::process::Stdio;

use serde::Deserialize;
use serde_json::{Value, json};

use super::programs;
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::home::Home;
use crate::screen::Screen;
use crate::screen::{bad, busy, good, plain};

/// As `kiln-node --doctor` prints them.
pub(crate) struct Report {
    findings: Vec<Finding>,
    pub(crate) document: Value,
}

#[derive(Debug, Deserialize)]
struct Finding {
    name: String,
    ok: bool,
    /// What was seen.
    detail: String,
    /// What to do about it.
    fix: String,
}

/// Scarce memory and disk are worth a word; whether they suffice depends on what is going to run.
const ADVICE: [&str; 2] = ["memory", "disk"];

impl Finding {
    fn stands_in_the_way(&self) -> bool {
        !self.ok && !ADVICE.contains(&self.name.as_str())
    }
}

impl Report {
    pub(crate) fn is_good(&self) -> bool {
        !self.findings.iter().any(Finding::stands_in_the_way)
    }

    /// All findings, or just those that are not good.
    pub(crate) fn show(&self, screen: Screen, only_bad: bool) -> Outcome {
        let rows: Vec<_> = self
            .findings
            .iter()
            .filter(|it| !only_bad || !it.ok)
            .map(|it| {
                let state = match it {
                    it if it.ok => good("ok"),
                    it if it.stands_in_the_way() => bad("BAD"),
                    _ => busy("low"),
                };
                vec![plain(&it.name), state, plain(&it.detail)]
            })
            .collect();
        if rows.is_empty() {
            return Ok(());
        }
        screen.table(&["CHECK", "STATE", "FOUND"], rows)?;
        let wanting = self.findings.iter().filter(|it| !it.ok);
        let steps: Vec<_> = wanting.map(|it| format!("{}: {}", it.name, it.fix)).collect();
        screen.next(&steps)
    }
}

pub(crate) async fn examine(home: &Home) -> Outcome<Report> {
    let what = "looking at this machine";
    let binary = programs::sibling("kiln-node")?;
    let mut command = tokio::process::Command::new(&binary);
    command.arg("--doctor").stdin(Stdio::null());
    if home.exists() {
        // With a site it looks at what that one needs as well.
        command.arg("--home").arg(home.folder());
    } else {
        command.env_remove("KILN_HOME");
    }
    let output = command.output().await.during(format_args!("starting {}", binary.display()))?;
    let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let findings = serde_json::from_value(document.clone()).map_err(|_| {
        let text = String::from_utf8_lossy(&output.stderr);
        let line = text.trim().lines().last().unwrap_or("it printed nothing").to_owned();
        Failure::new(Code::Failed, what, format!("{}: {line}", binary.display()))
    })?;
    Ok(Report { findings, document: json!({ "findings": document }) })
}
