//! Names of users and groups in an image.

use super::error::BakeError;
use super::tree::Tree;

/// `user:group`, by the image's own names or by number.
pub(crate) fn resolve(tree: &Tree, owner: &str) -> Result<(u32, u32), BakeError> {
    let (user, group) = owner.split_once(':').unwrap_or((owner, owner));
    Ok((id(tree, "etc/passwd", "user", user)?, id(tree, "etc/group", "group", group)?))
}

fn id(tree: &Tree, file: &str, kind: &str, name: &str) -> Result<u32, BakeError> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    // Also in an image without such a file.
    if name == "root" {
        return Ok(0);
    }
    let content = tree.read(file.as_bytes()).map_err(BakeError::io("read", format!("/{file}")))?;
    let text = String::from_utf8_lossy(&content.unwrap_or_default()).into_owned();
    text.lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name))
        .and_then(|fields| fields.get(2)?.parse().ok())
        .ok_or_else(|| BakeError::Definition {
            what: format!("owner `{}`", name.escape_debug()),
            why: format!("the image has no such {kind} when the step is reached"),
            remedy: "write a number, or add the step after the one that makes it".to_owned(),
        })
}
