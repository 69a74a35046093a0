//! `kiln init`

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use kiln_model::name::ServerName;
use serde_json::json;

use crate::failure::{Code, During as _, Failure, Outcome};
use crate::screen::Screen;

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// The folder to write into; made where it does not exist
    #[arg(default_value = "web")]
    folder: PathBuf,
    /// The server's name [default: that of the folder]
    #[arg(long)]
    name: Option<String>,
}

const DEFINITION: &str = include_str!("server.yaml");
const NGINX: &str = include_str!("../../../../../deploy/examples/web/nginx.conf");
const PAGE: &str = "<!doctype html>\n<title>Hello</title>\n<h1>Hello from NAME</h1>\n";

pub(crate) fn run(it: &Init, screen: Screen) -> Outcome {
    let folder = &it.folder;
    let name = server_name(it)?;
    let named = |text: &str| text.replace("NAME", name.as_str());
    let files = [
        ("server.yaml", named(DEFINITION)),
        ("nginx.conf", NGINX.to_owned()),
        ("site/index.html", named(PAGE)),
    ];
    if let Some((file, _)) = files.iter().find(|(file, _)| folder.join(file).exists()) {
        return Err(Failure::new(Code::Refused, format!("{} exists", folder.join(file).display()), "")
            .reason("exists")
            .todo("name another folder: kiln init FOLDER"));
    }
    for (file, text) in &files {
        write(&folder.join(file), text)?;
    }
    let shown = folder.display();
    let written: Vec<_> = files.iter().map(|(file, _)| folder.join(file).display().to_string()).collect();
    screen.json(&json!({ "name": name.as_str(), "files": written }))?;
    for file in &written {
        screen.line(format_args!("wrote {file}"))?;
    }
    screen.next(&[format!("kiln lint {shown}"), format!("kiln apply {shown} --wait")])
}

fn server_name(it: &Init) -> Outcome<ServerName> {
    let text = match &it.name {
        Some(name) => name.clone(),
        None => {
            let full = std::path::absolute(&it.folder).during("finding this folder")?;
            full.file_name().unwrap_or_default().to_string_lossy().into_owned()
        }
    };
    text.parse().map_err(|error| {
        Failure::new(Code::Invalid, "the server's name", error)
            .todo("give one with --name, such as --name web")
    })
}

fn write(path: &Path, text: &str) -> Outcome {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).during(format_args!("making {}", folder.display()))?;
    }
    fs::write(path, text).during(format_args!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_starter_is_a_good_definition() {
        let text = DEFINITION.replace("NAME", "web");
        let definition = kiln_model::definition::parse(text.as_bytes(), "server.yaml").expect("no problem");
        assert_eq!(definition.name.as_str(), "web");
    }
}
