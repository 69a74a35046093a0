//! Paragraphs of `Field: value` lines, as in control files and in apt's sources.

/// The fields of one paragraph in their order; continuation lines keep their line ends and first space.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Paragraph {
    fields: Vec<(String, String)>,
}

impl Paragraph {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim_end())
    }

    /// As they are written, with spaces at their ends: dpkg keeps them.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// All paragraphs of a text. Lines that begin with `#` are comments.
pub fn parse(text: &str) -> Result<Vec<Paragraph>, String> {
    let mut paragraphs = Vec::new();
    let mut current = Paragraph::default();
    for (at, line) in text.lines().enumerate() {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            if !current.fields.is_empty() {
                paragraphs.push(std::mem::take(&mut current));
            }
        } else if line.starts_with([' ', '\t']) {
            let Some((_, value)) = current.fields.last_mut() else {
                return Err(format!("line {}: a continuation of nothing", at + 1));
            };
            value.push('\n');
            value.push_str(line.trim_end());
        } else {
            let Some((name, value)) = line.split_once(':') else {
                return Err(format!("line {}: no `Field: value`", at + 1));
            };
            let name = name.trim();
            if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(format!("line {}: no field name before the colon", at + 1));
            }
            current.fields.push((name.to_owned(), value.trim_start().to_owned()));
        }
    }
    if !current.fields.is_empty() {
        paragraphs.push(current);
    }
    Ok(paragraphs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_comments_and_continuations() {
        let text =
            "Package: a\nDescription: short\n long\n .\n\n# not a field\n\nPackage: b\nconffiles:\n /etc/b\n";
        let parsed = parse(text).unwrap();
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed[0].get("description"), Some("short\n long\n ."));
        assert_eq!(parsed[1].get("Conffiles"), Some("\n /etc/b"));
    }

    #[test]
    fn what_is_no_field_is_refused_with_its_line() {
        for (bad, line) in [("a\n", "line 1"), (" x\n", "line 1"), ("A: b\n: c\n", "line 2")] {
            assert!(parse(bad).unwrap_err().starts_with(line), "{bad}");
        }
    }
}
