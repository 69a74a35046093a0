//! The images that Kiln's services are put into, and how they are run together.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_tests::Result;
use kiln_tests::command::{binary, run};
use kiln_tests::unit::Unit;
use serde_json::Value;

pub(super) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(name: &str) -> Result<String> {
    Ok(std::fs::read_to_string(root().join("deploy/containers").join(name))?)
}

/// One `FROM`, and what follows.
#[derive(Debug, Default)]
pub(super) struct Stage {
    from: String,
    /// From another stage or from the folder, what, and to where.
    pub(super) copies: Vec<(Option<String>, Vec<String>, String)>,
    pub(super) entrypoint: Option<String>,
}

/// As far as this one goes: no heredocs, no quotes in copies.
pub(super) fn stages() -> Result<BTreeMap<String, Stage>> {
    let text = text("Containerfile")?.replace("\\\n", " ");
    let mut stages = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let stage: &mut Stage = stages.entry(current.clone()).or_default();
        match words.as_slice() {
            ["FROM", from, "AS", name] => {
                current = (*name).to_owned();
                let stage = Stage { from: (*from).to_owned(), ..Stage::default() };
                assert!(stages.insert(current.clone(), stage).is_none(), "{name} twice");
            }
            ["COPY", rest @ .., to] => {
                let from = rest.first().and_then(|it| it.strip_prefix("--from=")).map(str::to_owned);
                let what = rest.iter().skip(usize::from(from.is_some())).map(|it| (*it).to_owned()).collect();
                stage.copies.push((from, what, (*to).to_owned()));
            }
            ["ENTRYPOINT", rest] => {
                let program: Vec<String> = serde_json::from_str(rest)?;
                stage.entrypoint = program.into_iter().next();
            }
            ["ARG" | "RUN" | "USER" | "STOPSIGNAL", ..] => {}
            _ => return Err(format!("what is this: {line}").into()),
        }
    }
    stages.remove("");
    Ok(stages)
}

/// The program of a stage's entry point, where it was built here; the broker's is not of this workspace.
fn program(stage: &Stage) -> Result<Option<PathBuf>> {
    let name = stage.entrypoint.as_deref().ok_or("it has no entry point")?;
    if name.ends_with("/nats-server") { Ok(None) } else { binary(name).map(Some) }
}

#[test]
fn every_image_is_made_of_what_is_there_and_starts_a_program_that_it_holds() -> Result<()> {
    let stages = stages()?;
    let ignored = std::fs::read_to_string(root().join(".dockerignore"))?;
    let prerequisites = std::fs::read_to_string(root().join("deploy/prerequisites.sh"))?;
    for (name, stage) in &stages {
        let known = ["scratch", "${BASE}"].contains(&stage.from.as_str()) || stages.contains_key(&stage.from);
        assert!(known, "{name} comes from {}", stage.from);
        for (from, what, _) in &stage.copies {
            for path in what {
                match from {
                    Some(other) => {
                        let there = stages[other].copies.iter().flat_map(|(_, what, _)| what);
                        let names = there.filter_map(|it| Path::new(it).file_name()?.to_str());
                        assert!(
                            names.into_iter().any(|it| format!("/{it}") == *path),
                            "{path} is not in {other}"
                        );
                    }
                    None => {
                        assert!(ignored.lines().any(|line| line == format!("!{path}")), "{path} is not sent");
                        match path.strip_prefix("target/release/") {
                            Some(program) => drop(binary(program)?),
                            // What deploy/prerequisites.sh gets.
                            None => {
                                let below = path.strip_prefix("target").ok_or("it is not in the folder")?;
                                assert!(
                                    prerequisites.contains(&format!("$target{below}")),
                                    "nobody makes {path}"
                                );
                            }
                        }
                    }
                }
            }
        }
        let Some(entrypoint) = &stage.entrypoint else { continue };
        let file = Path::new(entrypoint).file_name();
        let copied = stage.copies.iter().flat_map(|(_, what, _)| what);
        let holds = copied.into_iter().any(|it| Path::new(it).file_name() == file);
        assert!(holds, "{name} starts {entrypoint}, which it does not hold");
    }
    let programs: BTreeSet<_> = stages.values().filter_map(|stage| stage.entrypoint.as_deref()).collect();
    let wanted = ["/usr/local/lib/kiln/nats-server", "kiln", "kiln-builder", "kiln-deployer", "kiln-monitor"];
    assert_eq!(programs, BTreeSet::from(wanted), "the node has none, all else has one");
    Ok(())
}

pub(super) fn compose() -> Result<Value> {
    Ok(serde_saphyr::from_str(&text("compose.yaml")?)?)
}

/// `${NAME:-default}` is the default.
pub(super) fn filled(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        let (variable, end) = after.split_once('}').unwrap_or((after, ""));
        out.push_str(before);
        out.push_str(variable.split_once(":-").map_or("", |(_, default)| default));
        rest = end;
    }
    out + rest
}

pub(super) fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(filled).collect()
}

/// With what it takes over by `<<`.
pub(super) fn whole(service: &Value) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    let parents = match &service["<<"] {
        Value::Array(several) => several.iter().collect(),
        Value::Null => Vec::new(),
        one => vec![one],
    };
    // The first of them goes before the others, and the service's own before all.
    for map in parents.into_iter().rev().chain([service]) {
        found.extend(map.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
    }
    found
}

#[test]
fn every_container_has_an_image_a_command_that_its_program_takes_and_files_that_are_there() -> Result<()> {
    let (stages, compose) = (stages()?, compose()?);
    let services = compose["services"].as_object().ok_or("no services")?;
    let names: Vec<_> = services.keys().map(String::as_str).collect();
    assert_eq!(names, ["builder", "deployer", "monitor", "nats", "tend"]);
    for (name, service) in services {
        let service = whole(service);
        let image = filled(service["image"].as_str().ok_or("no image")?);
        let target = image.strip_prefix("localhost/kiln-").and_then(|it| it.strip_suffix(":latest"));
        let stage = target.and_then(|target| stages.get(target));
        let stage = stage.ok_or_else(|| format!("{name}: nobody builds {image}"))?;
        let command = texts(&service["command"]);
        match program(stage)? {
            // Asked for help after them, a program has understood the arguments before.
            Some(program) => drop(run(Command::new(program).args(&command).arg("--help"))?),
            None => assert_eq!(command, ["--config", "/var/lib/kiln/local/nats/nats.conf"]),
        }
        let mounts =
            service["volumes"].as_array().ok_or_else(|| format!("{name} sees nothing of the site"))?;
        for mount in mounts {
            let source = match mount.as_str() {
                Some(text) => filled(text.split_once(':').map_or(text, |(source, _)| source)),
                None => filled(mount["source"].as_str().ok_or("a mount without a source")?),
            };
            // The site's folder is the one thing that is not there before somebody makes it.
            assert!(source == "/var/lib/kiln/local" || Path::new(&source).exists(), "{name}: {source}");
        }
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(service["ulimits"]["core"], 0, "{name}: what is in memory is not for a disk");
        assert_eq!(service["cap_drop"], serde_json::json!(["ALL"]), "{name}");
        assert!(texts(&service["security_opt"]).contains(&"no-new-privileges:true".to_owned()), "{name}");
    }
    if Command::new("docker").args(["compose", "version"]).output().is_ok_and(|it| it.status.success()) {
        let path = root().join("deploy/containers/compose.yaml");
        run(Command::new("docker").args(["compose", "--file"]).arg(path).args(["config", "--quiet"]))?;
    }
    Ok(())
}

/// A bake that one of them lets do less makes another image.
#[test]
fn a_builder_has_the_same_rights_in_a_container_and_in_its_unit() -> Result<()> {
    let builder = whole(&compose()?["services"]["builder"]);
    let unit = Unit::of("kiln-builder@.service")?;
    let added = texts(&builder["cap_add"]);
    assert_eq!(unit.bounds()?, (added.iter().map(String::as_str).collect(), false));
    assert_eq!(unit.wanted("NoNewPrivileges")?, "yes");
    Ok(())
}
