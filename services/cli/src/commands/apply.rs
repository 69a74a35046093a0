//! `kiln apply`

use std::path::Path;

use clap::Args;
use kiln_api::builder::apply_request::Source;
use kiln_api::builder::{AppliedServer, ApplyOutcome, ApplyRequest, FolderSource, GitSource};
use serde_json::json;

use crate::clients::{Services, request_id};
use crate::failure::{Code, During as _, Failure, Outcome};
use crate::follow::Patience;
use crate::screen::{Screen, plain};
use crate::words::{plural, short, tinted};
use crate::{follow, json, pack};

#[derive(Debug, Args)]
pub(crate) struct Apply {
    /// A folder with definitions, or the address or path of a Git repository
    #[arg(value_name = "FOLDER|REPOSITORY")]
    source: String,
    /// Follow this branch of the Git repository; each commit to it is taken over by itself
    #[arg(long, value_name = "NAME")]
    branch: Option<String>,
    /// Wait until the fleets run what was applied
    #[arg(long)]
    wait: bool,
    /// How long to wait, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = follow::LIMIT, requires = "wait")]
    timeout: u64,
}

const DEFAULT_BRANCH: &str = "main";

pub(crate) async fn run(it: &Apply, services: &Services, screen: Screen) -> Outcome {
    let source = source(it)?;
    let from = it.source.as_str();
    let answer = services
        .builder()
        .max_encoding_message_size(pack::LIMIT + (1 << 20))
        .apply(ApplyRequest { request_id: request_id(), source: Some(source) })
        .await
        .during(format_args!("applying {from}"))?
        .into_inner();
    if !answer.commit.is_empty() {
        screen.progress(format_args!("{from} is at commit {}", short(&answer.commit)));
    }
    if answer.servers.is_empty() {
        return Err(Failure::new(Code::NotFound, format!("applying {from}"), "it holds no server.yaml")
            .reason("no_definition")
            .todo("`kiln init web` writes one to begin with"));
    }
    let rows = answer
        .servers
        .iter()
        .map(|server| {
            vec![plain(&server.name), tinted(word(server)), plain(short(&server.definition_digest))]
        })
        .collect();
    screen.table(&["SERVER", "DEFINITION", "DIGEST"], rows)?;
    for server in &answer.servers {
        if let Some(left) = &server.left {
            screen.line(no_longer_followed(&server.name, left))?;
        }
    }

    let mut fleets = Vec::new();
    if it.wait {
        let patience = Patience::of_seconds(it.timeout);
        for server in &answer.servers {
            let digest = &server.definition_digest;
            let fleet = follow::until_running(services, screen, &server.name, digest, patience).await?;
            screen.line(format_args!(
                "{} r{} runs: {} healthy{}",
                fleet.server,
                fleet.release,
                plural(fleet.healthy as usize, "instance"),
                answers(&fleet.ports),
            ))?;
            fleets.push(fleet);
        }
    }
    screen.json(&json!({
        "source": answer.source,
        "commit": answer.commit,
        "servers": json::list("kiln.builder.v1.AppliedServer", &answer.servers)?,
        "fleets": json::list("kiln.deployer.v1.Fleet", &fleets)?,
    }))?;
    let name = answer.servers.first().map_or("", |server| &server.name);
    screen.next(&[format!("kiln status {name}"), format!("kiln why {name}")])
}

/// Commits that are taken over no more are told at once: nothing would happen at the next one.
fn no_longer_followed(server: &str, left: &kiln_api::builder::Source) -> String {
    match &left.git {
        Some(git) => format!(
            "{server} no longer follows branch {} of {}; to go back to it: kiln apply {} --branch {}",
            git.branch, git.url, git.url, git.branch
        ),
        None => format!("{server} is no longer taken from the folder that was applied before"),
    }
}

fn word(server: &AppliedServer) -> &'static str {
    match server.outcome() {
        ApplyOutcome::Unspecified => "?",
        ApplyOutcome::Created => "new",
        ApplyOutcome::Changed => "changed",
        ApplyOutcome::Unchanged => "unchanged",
    }
}

pub(crate) fn answers(ports: &[kiln_api::types::Port]) -> String {
    let list: Vec<_> = ports.iter().map(|port| format!("http://127.0.0.1:{}", port.listen)).collect();
    if list.is_empty() { String::new() } else { format!(", answering on {}", list.join(", ")) }
}

fn source(it: &Apply) -> Outcome<Source> {
    let text = it.source.as_str();
    let path = Path::new(text);
    if is_repository(text, it.branch.is_some()) {
        let url = if path.exists() {
            // The builder does not work in this folder.
            let full = path.canonicalize().during(format_args!("reading {text}"))?;
            full.to_str()
                .map(ToOwned::to_owned)
                .ok_or_else(|| Failure::new(Code::Invalid, format!("the path {text}"), "is not UTF-8"))?
        } else {
            text.to_owned()
        };
        let branch = it.branch.clone().unwrap_or_else(|| DEFAULT_BRANCH.to_owned());
        return Ok(Source::Git(GitSource { url, branch }));
    }
    if !path.exists() {
        return Err(Failure::new(Code::NotFound, format!("there is no folder {text}"), "")
            .todo("name a folder with a server.yaml, or a Git repository with --branch"));
    }
    let full = path.canonicalize().during(format_args!("reading {text}"))?;
    let archive = pack::folder(&full)?;
    Ok(Source::Folder(FolderSource { archive, origin: full.display().to_string() }))
}

/// Which of the two an argument is: `--branch` says Git, and so does what no folder is called.
fn is_repository(text: &str, has_branch: bool) -> bool {
    let remote = text.contains("://") || (text.contains('@') && text.contains(':'));
    has_branch || remote || text.trim_end_matches('/').ends_with(".git")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_that_leaves_its_branch_says_how_to_go_back() {
        let git = GitSource { url: "/srv/servers".to_owned(), branch: "main".to_owned() };
        let left = kiln_api::builder::Source { git: Some(git), ..Default::default() };
        let told = no_longer_followed("web", &left);
        assert!(told.contains("web no longer follows branch main of /srv/servers"), "{told}");
        assert!(told.contains("kiln apply /srv/servers --branch main"), "{told}");
    }

    #[test]
    fn a_repository_is_told_from_a_folder() {
        for repository in ["https://example.org/web", "git@example.org:web", "ssh://h/web", "/srv/web.git/"] {
            assert!(is_repository(repository, false), "{repository}");
        }
        assert!(is_repository("web", true));
        for folder in ["web", "./web", "/srv/a@b", "."] {
            assert!(!is_repository(folder, false), "{folder}");
        }
    }
}
