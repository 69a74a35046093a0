//! A site whose builder, deployer and monitor run in containers, as the files of `deploy/containers` have them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use kiln_model::event::Service;
use kiln_tests::Result;
use kiln_tests::command::{binary, run};
use kiln_tests::docker::Docker;
use kiln_tests::free_port;
use kiln_tests::load::fetch;
use kiln_tests::server::SETTLES;
use kiln_tests::site::{Site, cache_folder, edge, example};
use serde_json::Value;

use crate::containers::{compose, filled, root, stages, texts, whole};

/// Where compose.yaml has the site, if nobody says otherwise.
const HOME: &str = "/var/lib/kiln/local";
const BASE: &str = "kiln-test-base";

const IN_CONTAINERS: [Service; 3] = [Service::Builder, Service::Deployer, Service::Monitor];

/// Makes every image of the Containerfile, on a Debian of the machine's own archives.
fn make_images(docker: &Docker, folder: &Path) -> Result<()> {
    let base = folder.join("base.tar");
    run(Command::new("mmdebstrap").args(["--quiet", "--variant=minbase", "bookworm"]).arg(&base))?;
    run(docker.command().arg("import").arg(&base).arg(BASE))?;
    let context = folder.join("context");
    let built = binary("kiln")?;
    let target = built.parent().and_then(Path::parent).ok_or("the programs lie in no target folder")?;
    let stages = stages()?;
    let copied = stages.values().flat_map(|stage| &stage.copies).filter(|(from, ..)| from.is_none());
    for path in copied.flat_map(|(_, what, _)| what) {
        let (from, to) = (target.join(path.trim_start_matches("target/")), context.join(path));
        std::fs::create_dir_all(to.parent().ok_or("a file in no folder")?)?;
        std::fs::copy(from, to)?;
    }
    for name in stages.iter().filter(|(_, stage)| stage.entrypoint.is_some()).map(|(name, _)| name) {
        let mut build = docker.command();
        build.args(["build", "--quiet", "--network", "host", "--build-arg", &format!("BASE={BASE}")]);
        build.arg("--file").arg(root().join("deploy/containers/Containerfile"));
        run(build.args(["--target", name, "--tag", &format!("localhost/kiln-{name}")]).arg(&context))?;
    }
    Ok(())
}

/// What `docker run` is told of what compose.yaml says.
fn options(service: &BTreeMap<String, Value>) -> Result<Vec<String>> {
    let mut options = Vec::new();
    for (key, value) in service {
        let one = value.as_str().map(filled).unwrap_or_else(|| value.to_string());
        match key.as_str() {
            // Who starts it again, and where its log goes, is the supervisor's matter here.
            "<<" | "image" | "command" | "restart" | "logging" => {}
            "network_mode" => options.extend(["--network".to_owned(), one]),
            "stop_grace_period" => {
                options.extend(["--stop-timeout".to_owned(), one.trim_end_matches('s').to_owned()]);
            }
            "pid" | "cgroup" | "pids_limit" | "mem_limit" => {
                let name = [("cgroup", "cgroupns"), ("pids_limit", "pids-limit"), ("mem_limit", "memory")];
                let name = name.into_iter().find(|(from, _)| from == key).map_or(key.as_str(), |(_, to)| to);
                options.extend([format!("--{name}"), one]);
            }
            "read_only" | "init" if value == true => options.push(format!("--{}", key.replace('_', "-"))),
            "tmpfs" | "cap_drop" | "cap_add" | "security_opt" => {
                let name = key.replace('_', "-");
                options.extend(texts(value).into_iter().flat_map(|it| [format!("--{name}"), it]));
            }
            "ulimits" => {
                let limits = value.as_object().into_iter().flatten();
                options.extend(
                    limits.flat_map(|(name, most)| ["--ulimit".to_owned(), format!("{name}={most}")]),
                );
            }
            "volumes" => {
                for volume in value.as_array().into_iter().flatten() {
                    let field = |name: &str| volume[name].as_str().map(filled).unwrap_or_default();
                    options.push("--volume".to_owned());
                    options.push(match volume.as_str() {
                        Some(text) => text.to_owned(),
                        None => format!("{}:{}", field("source"), field("target")),
                    });
                }
            }
            _ => return Err(format!("how is docker told of {key}: {value}").into()),
        }
    }
    Ok(options)
}

/// Writes what the supervisor starts in a service's place. What `kiln` asks the program beside its service is asked on the
/// machine.
fn write_starter(docker: &Docker, at: &Path, service: &BTreeMap<String, Value>, sees: &Path) -> Result<()> {
    let image = filled(service["image"].as_str().ok_or("no image")?);
    let program = at.file_name().and_then(|name| name.to_str()).ok_or("a program without a name")?;
    let mut script =
        format!("#!/bin/sh -e\n[ \"$1 $#\" = '--home 2' ] || exec {} \"$@\"\n", binary(program)?.display());
    // In the foreground: it hands signals on, and ends with the program.
    write!(script, "exec {} run --rm", shown(&docker.command()))?;
    for word in options(service)? {
        write!(script, " '{}'", word.replace(HOME, "'\"$2\"'"))?;
    }
    let sees = sees.display();
    write!(script, " --volume '{sees}:{sees}' {image}")?;
    for word in texts(&service["command"]) {
        write!(script, " '{}'", word.replace(HOME, "'\"$2\"'"))?;
    }
    std::fs::write(at, script + "\n")?;
    Ok(std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o755))?)
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// An image is baked anew and comes out the same, and a change goes out, with everything seen and done from containers but
/// what the node does.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "makes a base and five images, which takes minutes: tests/run.sh --full"]
async fn a_site_does_its_work_in_containers() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let docker = Docker::start_aside(&folder.path().join("docker"))?;
    make_images(&docker, folder.path())?;
    for (image, word) in [("nats", "nats-server"), ("cli", "kiln")] {
        let said = docker.run(&["run", "--rm", &format!("localhost/kiln-{image}"), "--version"])?;
        assert!(said.contains(word), "{said}");
    }
    let programs = folder.path().join("programs");
    std::fs::create_dir(&programs)?;
    for name in ["kiln", "kiln-node"] {
        std::fs::copy(binary(name)?, programs.join(name))?;
    }
    let compose = compose()?;
    for service in IN_CONTAINERS {
        let told = whole(&compose["services"][service.as_str()]);
        write_starter(&docker, &programs.join(format!("kiln-{service}")), &told, &cache_folder()?)?;
    }

    let site = Site::up_from(&programs, "contained")?;
    let running = docker.run(&["ps", "--format", "{{.Image}}"])?;
    for service in IN_CONTAINERS {
        assert!(running.contains(&format!("localhost/kiln-{service}")), "{running}");
    }
    let (definition, port) = (folder.path().join("web"), free_port()?);
    run(Command::new("cp").arg("-r").arg(example("web")).arg(&definition))?;
    let said = definition.join("server.yaml");
    let text = std::fs::read_to_string(&said)?.replace("listen: 8080", &format!("listen: {port}"));
    std::fs::write(&said, text)?;
    let apply = ["apply", definition.to_str().ok_or("a text")?];
    site.kiln(&apply)?;
    site.settled("web", 1, SETTLES).await?;
    assert!(fetch(edge(port), "/").await?.contains("Hello from Kiln"));
    let verified = site.kiln(&["build", "web", "--verify", "--wait"])?;
    assert!(verified.contains("same"), "on an empty layer cache:\n{verified}");
    let page = definition.join("site/index.html");
    std::fs::write(&page, std::fs::read_to_string(&page)?.replace("Hello from Kiln", "Hello from a box"))?;
    site.kiln(&apply)?;
    site.settled("web", 2, SETTLES).await?;
    assert!(fetch(edge(port), "/").await?.contains("Hello from a box"));
    site.down()
}
