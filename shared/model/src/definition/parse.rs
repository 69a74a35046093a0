//! From the text of a `server.yaml` to a definition, or to everything that is wrong with it.

use super::check::check;
use super::node::Tree;
use super::problem::{DefinitionErrors, Place, Problem};
use super::read::read;
use super::{Definition, raw};

/// A longer text is refused unread.
pub const MAX_TEXT: usize = 256 * 1024;

/// Reads and checks the text of a `server.yaml`; `file_name` is how messages call it.
///
/// # Errors
/// Everything that is wrong with it, as far as one thing does not hide another.
pub fn parse(text: &str, file_name: &str) -> Result<Definition, DefinitionErrors> {
    if text.len() > MAX_TEXT {
        let message = format!("this text has {} bytes, wanted at most {MAX_TEXT}", text.len());
        let help = Some("put contents into files of their own".to_owned());
        return Err(DefinitionErrors::new(
            file_name,
            "",
            vec![Problem::new(Place::of("", 1, 1), message, help)],
        ));
    }
    // Editors that write a byte order mark do not show it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let wrong = |problems| Err(DefinitionErrors::new(file_name, text, problems));

    let mut tree = match Tree::parse(text) {
        Ok(tree) => tree,
        Err(problem) => return wrong(vec![problem]),
    };
    let Some(raw) = read::<raw::Definition>(&mut tree) else { return wrong(tree.problems) };
    let definition = check(raw, &tree.places, &mut tree.problems);
    if tree.problems.is_empty() { Ok(definition) } else { wrong(tree.problems) }
}

/// The same for the bytes of a file, which may not be text.
///
/// # Errors
/// As [`parse`], and where the bytes are not UTF-8.
pub fn parse_bytes(bytes: &[u8], file_name: &str) -> Result<Definition, DefinitionErrors> {
    match std::str::from_utf8(bytes) {
        Ok(text) => parse(text, file_name),
        Err(error) => {
            let (good, _) = bytes.split_at(error.valid_up_to());
            let good = String::from_utf8_lossy(good);
            let place = Place::at(&good, good.len());
            let help = Some("save the file as UTF-8".to_owned());
            let problem = Problem::new(place, "this byte is not UTF-8 text", help);
            Err(DefinitionErrors::new(file_name, &good, vec![problem]))
        }
    }
}
