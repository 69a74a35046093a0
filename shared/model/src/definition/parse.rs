//! From the text of a `server.yaml` to a definition, or to everything that is wrong with it.

use super::ImagePlace;
use super::check::check;
use super::node::{Node, Tree, Value};
use super::problem::{DefinitionErrors, Place, Problem};
use super::read::read;
use super::text::{InnerPath, Syntax as _};
use super::{Definition, raw};

/// What is longer is refused unread.
pub const MAX_TEXT: usize = 256 * 1024;

/// Reads and checks the content of a `server.yaml`; `file_name` is how messages call it.
///
/// # Errors
/// Everything that is wrong with it, as far as one thing does not hide another.
pub fn parse(content: &[u8], file_name: &str) -> Result<Definition, DefinitionErrors> {
    let text = text_of(content, file_name)?;
    let mut tree =
        Tree::parse(text).map_err(|problem| DefinitionErrors::new(file_name, text, vec![problem], None))?;
    let server = tree.root.get("name").and_then(|name| name.text()?.parse().ok());
    let raw = read::<raw::Definition>(&mut tree);
    let definition = raw.map(|raw| check(raw, &tree.places, &mut tree.problems));
    match definition {
        Some(definition) if tree.problems.is_empty() => Ok(definition),
        _ => Err(DefinitionErrors::new(file_name, text, tree.problems, server)),
    }
}

/// A path that a definition names, and that is not as it must be in its folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrongPath {
    /// As it is in the definition.
    pub path: String,
    /// What is wrong with it.
    pub message: String,
    /// What would be right.
    pub help: String,
}

/// What whoever reads the folder found wrong with the paths of a definition that was taken, at the places that name
/// them.
pub fn wrong_paths(content: &[u8], file_name: &str, wrong: Vec<WrongPath>) -> DefinitionErrors {
    let text = match text_of(content, file_name) {
        Ok(text) => text,
        Err(errors) => return errors,
    };
    let mut named = Vec::new();
    let tree = Tree::parse(text).ok();
    if let Some(tree) = &tree {
        named_paths(&tree.root, &mut named);
    }
    let problems = wrong.into_iter().map(|wrong| {
        let node = named.iter().find(|(path, _)| *path == wrong.path);
        let place = node.and_then(|(_, id)| tree.as_ref()?.places.get(*id).copied());
        Problem::new(place.unwrap_or_else(|| Place::of(text, 1, 1)), wrong.message, Some(wrong.help))
    });
    let server = tree.as_ref().and_then(|tree| tree.root.get("name")?.text()?.parse().ok());
    DefinitionErrors::new(file_name, text, problems.collect(), server)
}

/// What a definition names that is not its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// Another server.
    Parent,
    /// A machine of the site.
    Node,
}

/// What whoever knows what is named found wrong with it, at the place that names it.
pub fn wrong_name(
    content: &[u8],
    file_name: &str,
    named: Named,
    message: String,
    help: String,
) -> DefinitionErrors {
    let text = match text_of(content, file_name) {
        Ok(text) => text,
        Err(errors) => return errors,
    };
    let tree = Tree::parse(text).ok();
    let node = tree.as_ref().and_then(|tree| match named {
        Named::Parent => tree.root.get("image")?.get("from")?.get("server"),
        Named::Node => tree.root.get("run")?.get("node"),
    });
    let place = node.and_then(|node| tree.as_ref()?.places.get(node.id).copied());
    let problem = Problem::new(place.unwrap_or_else(|| Place::of(text, 1, 1)), message, Some(help));
    let server = tree.as_ref().and_then(|tree| tree.root.get("name")?.text()?.parse().ok());
    DefinitionErrors::new(file_name, text, vec![problem], server)
}

/// Every path into the folder, as the checked definition has it, with the node that names it.
fn named_paths(node: &Node, named: &mut Vec<(String, usize)>) {
    match &node.value {
        Value::Map { entries, .. } => {
            for (key, value) in entries {
                let path = value.text().and_then(|text| match key.text.as_str() {
                    "src" | "signedBy" | "playbook" | "manifest" => InnerPath::parse(text),
                    // It may be an address.
                    "archive" if !text.contains("://") => InnerPath::parse(text),
                    "image" => match text.parse() {
                        Ok(ImagePlace::Layout { folder, .. }) => Some(folder),
                        _ => None,
                    },
                    _ => None,
                });
                match path {
                    Some(path) => {
                        let with_folder = matches!(key.text.as_str(), "playbook" | "manifest");
                        if let Some((folder, _)) = path.rsplit_once('/').filter(|_| with_folder) {
                            named.push((folder.to_owned(), value.id));
                        }
                        named.push((path, value.id));
                    }
                    None => named_paths(value, named),
                }
            }
        }
        Value::List(items) => items.iter().for_each(|item| named_paths(item, named)),
        _ => {}
    }
}

fn text_of<'a>(content: &'a [u8], file_name: &str) -> Result<&'a str, DefinitionErrors> {
    let refuse = |text: &str, place, message: String, help: &str| {
        let problem = Problem::new(place, message, Some(help.to_owned()));
        Err(DefinitionErrors::new(file_name, text, vec![problem], None))
    };
    if content.len() > MAX_TEXT {
        let message = format!("this text has {} bytes, wanted at most {MAX_TEXT}", content.len());
        return refuse("", Place::of("", 1, 1), message, "put contents into files of their own");
    }
    match std::str::from_utf8(content) {
        // Editors that write a byte order mark do not show it.
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text)),
        Err(error) => {
            let good = String::from_utf8_lossy(content.get(..error.valid_up_to()).unwrap_or_default());
            let place = Place::at(&good, good.len());
            refuse(&good, place, "this byte is not UTF-8 text".to_owned(), "save the file as UTF-8")
        }
    }
}
