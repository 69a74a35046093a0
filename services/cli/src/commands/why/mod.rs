//! `kiln why`: the chain of causes behind something, and for what failed what was last seen of it.

mod chain;
mod trouble;

use clap::Args;
use kiln_model::name::{BuildId, InstanceId};
use serde_json::json;

use crate::clients::Services;
use crate::commands::signal;
use crate::failure::{Code, Failure, Outcome};
use crate::screen::{Screen, plain};
use crate::words::release;
use chain::{Facts, Link};
use trouble::Trouble;

#[derive(Debug, Args)]
pub(crate) struct Why {
    /// A server (web), build (web-b7), release (web-r12), rollback (web-r11-back1), instance (web-r12-0-a3) or signal
    /// (its first digits)
    #[arg(value_name = "SERVER|BUILD|RELEASE|ROLLBACK|INSTANCE|SIGNAL")]
    subject: String,
}

/// What is asked about.
#[derive(Debug, PartialEq, Eq)]
enum Subject {
    Instance(InstanceId),
    Build(BuildId),
    Release {
        server: String,
        number: u64,
    },
    /// A rollback by hand; another rollout is named as its release is.
    Back {
        server: String,
        rollout: String,
    },
    /// A server's name, or a signal's digits.
    Name(String),
}

impl Subject {
    fn parse(text: &str) -> Self {
        if let Ok(id) = text.parse() {
            return Self::Instance(id);
        }
        if let Ok(id) = text.parse() {
            return Self::Build(id);
        }
        let number = |text: &str| text.parse().ok().filter(|number: &u64| *number > 0);
        match text.rsplit_once("-r").and_then(|(server, text)| Some((server, number(text)?))) {
            Some((server, number)) if !server.is_empty() => {
                return Self::Release { server: server.to_owned(), number };
            }
            _ => {}
        }
        let back = text.rsplit_once("-back").filter(|(_, count)| number(count).is_some());
        let back = back.and_then(|(release, _)| release.rsplit_once("-r"));
        match back {
            Some((server, to)) if !server.is_empty() && number(to).is_some() => {
                Self::Back { server: server.to_owned(), rollout: text.to_owned() }
            }
            _ => Self::Name(text.to_owned()),
        }
    }
}

/// What is told: a headline, the causes in their order, what failed.
struct Answer {
    headline: String,
    chain: Vec<Link>,
    troubles: Vec<Trouble>,
}

pub(crate) async fn run(it: &Why, services: &Services, screen: Screen) -> Outcome {
    let answer = match answer(Subject::parse(&it.subject), services).await {
        // A server may be called what looks like a build or a release.
        Err(failure) if failure.is_not_found() => {
            answer(Subject::Name(it.subject.clone()), services).await.map_err(|_| failure)?
        }
        other => other?,
    };
    screen.json(&json!({
        "subject": it.subject,
        "headline": answer.headline,
        "chain": answer.chain.iter().map(Link::document).collect::<Vec<_>>(),
        "failures": answer.troubles.iter().map(Trouble::document).collect::<Vec<_>>(),
    }))?;
    screen.line(&answer.headline)?;
    if !answer.chain.is_empty() {
        screen.line("\nBecause")?;
        let rows = answer
            .chain
            .iter()
            .map(|link| vec![plain(format!("  {}", link.moment())), plain(link.kind), plain(&link.text)])
            .collect();
        screen.table(&["  TIME", "WHAT", ""], rows)?;
    }
    for trouble in &answer.troubles {
        screen.line(format_args!("\n{}", trouble.headline))?;
        for line in &trouble.lines {
            screen.line(format_args!("  {line}"))?;
        }
    }
    match answer.troubles.iter().find(|trouble| !trouble.todo.is_empty()) {
        Some(trouble) => screen.next(&[&trouble.todo]),
        None => Ok(()),
    }
}

async fn answer(subject: Subject, services: &Services) -> Outcome<Answer> {
    match subject {
        Subject::Instance(id) => {
            let facts = Facts::gather(id.server.as_str(), services).await?;
            let id = id.to_string();
            let instance = facts.instance(&id).ok_or_else(|| missing("instance", &id))?;
            Ok(Answer {
                headline: chain::instance_headline(instance),
                chain: facts.of_instance(instance),
                troubles: trouble::of_instance(instance, &facts, services).await,
            })
        }
        Subject::Build(id) => {
            let facts = Facts::gather(id.server.as_str(), services).await?;
            let build = match facts.build(&id.to_string()) {
                Some(build) => build.clone(),
                None => services.build(&id.to_string()).await?,
            };
            Ok(Answer {
                headline: chain::build_headline(&build),
                chain: facts.of_build(&build),
                troubles: trouble::of_build(&build).into_iter().collect(),
            })
        }
        Subject::Release { server, number } => {
            let facts = Facts::gather(&server, services).await?;
            if facts.release(number).is_none() {
                return Err(missing("release", &format!("{server} {}", release(number))));
            }
            Ok(Answer {
                headline: facts.release_headline(number),
                chain: facts.of_release(number),
                troubles: trouble::of_release(number, &facts),
            })
        }
        Subject::Back { server, rollout } => {
            let facts = Facts::gather(&server, services).await?;
            let back = facts.rollouts.iter().find(|it| it.id == rollout);
            let back = back.ok_or_else(|| missing("rollout", &rollout))?;
            Ok(Answer {
                headline: chain::rollout_headline(back),
                chain: facts.of_rollout(back),
                troubles: trouble::of_rollout(back).into_iter().collect(),
            })
        }
        Subject::Name(name) => named(&name, services).await,
    }
}

async fn named(name: &str, services: &Services) -> Outcome<Answer> {
    let facts = Facts::gather(name, services).await?;
    if facts.server.is_some() || facts.fleet.is_some() {
        return Ok(Answer {
            headline: facts.server_headline(),
            chain: facts.of_server(),
            troubles: trouble::of_server(&facts),
        });
    }
    let hex = name.strip_prefix("sha256:").unwrap_or(name);
    if hex.len() >= 4 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let signal = signal::find(name, &services.signals("").await?)?;
        let facts = Facts::gather(&signal.server, services).await?;
        return Ok(Answer {
            headline: chain::signal_headline(&signal),
            chain: facts.after_signal(&signal),
            troubles: Vec::new(),
        });
    }
    Err(missing("server, build, release, instance or signal", name))
}

fn missing(kind: &str, id: &str) -> Failure {
    Failure::new(Code::NotFound, format!("there is no {kind} {id}"), "")
        .todo("kiln status; kiln history SERVER")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_about_shows_in_its_form() {
        assert_eq!(Subject::parse("web-r12-0-a3"), Subject::Instance("web-r12-0-a3".parse().unwrap()));
        assert_eq!(Subject::parse("web-b7"), Subject::Build("web-b7".parse().unwrap()));
        assert_eq!(Subject::parse("web-r12"), Subject::Release { server: "web".to_owned(), number: 12 });
        let back = Subject::Back { server: "web-r1".to_owned(), rollout: "web-r1-r2-back3".to_owned() };
        assert_eq!(Subject::parse("web-r1-r2-back3"), back);
        for name in ["web", "web-back1", "web-r1-back", "web-r", "web-r0", "-r1", "0a1b2c3d4e5f"] {
            assert_eq!(Subject::parse(name), Subject::Name(name.to_owned()), "{name}");
        }
    }
}
