//! Templates of a `files` step: `{{ name }}` and `{{ env.NAME }}` are replaced, all else stays as it is.
//!
//! No more than that on purpose. A language with loops or joined texts makes gigabytes out of a few lines, whatever
//! bounds its steps; here the output is at most the number of places times the longest value. The syntax is that of
//! Jinja, and what else Jinja would take (`{%`, `{#`, filters) is refused, so that it can be given a meaning later.

use std::collections::BTreeMap;

use super::node::quoted;
use super::problem::Place;
use crate::name::ServerName;

/// A longer result is refused.
const MAX_OUTPUT: usize = 4 * 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {reason}")]
pub struct TemplateError {
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    pub reason: String,
}

/// Renders the text of a template file.
///
/// # Errors
/// With line and column: an unknown variable, a tag without an end or of another kind, a result that is too long.
pub fn render(
    template: &str,
    name: &ServerName,
    env: &BTreeMap<String, String>,
) -> Result<String, TemplateError> {
    let mut output = String::with_capacity(template.len().min(MAX_OUTPUT));
    let mut rest = template;
    loop {
        let tag_start = find_tag(rest);
        let (literal, tag) = rest.split_at(tag_start.unwrap_or(rest.len()));
        let wrong = |reason: String| {
            let Place { line, column, .. } = Place::at(template, template.len() - tag.len());
            TemplateError { line, column, reason }
        };
        let too_long = || wrong(format!("the result is longer than {MAX_OUTPUT} bytes"));
        output.push_str(literal);
        if output.len() > MAX_OUTPUT {
            return Err(too_long());
        }
        let Some(inner) = tag.strip_prefix("{{") else {
            if tag.is_empty() {
                return Ok(output);
            }
            let tag: String = tag.chars().take(2).collect();
            let reason = format!("`{tag}` is not supported; wanted {{{{ name }}}} or {{{{ env.NAME }}}}");
            return Err(wrong(reason));
        };
        let Some((variable, after)) = inner.split_once("}}") else {
            return Err(wrong("`{{` without `}}`".to_owned()));
        };
        output.push_str(value(variable.trim(), name, env).map_err(wrong)?);
        if output.len() > MAX_OUTPUT {
            return Err(too_long());
        }
        rest = after;
    }
}

fn find_tag(text: &str) -> Option<usize> {
    let begins_tag =
        |(at, _): &(usize, &str)| matches!(text.as_bytes().get(at + 1), Some(b'{' | b'%' | b'#'));
    text.match_indices('{').find(begins_tag).map(|(at, _)| at)
}

fn value<'a>(
    variable: &str,
    name: &'a ServerName,
    env: &'a BTreeMap<String, String>,
) -> Result<&'a str, String> {
    if variable == "name" {
        return Ok(name.as_str());
    }
    let Some(key) = variable.strip_prefix("env.") else {
        let variable = quoted(variable);
        return Err(format!("{variable} is not a variable; wanted {{{{ name }}}} or {{{{ env.NAME }}}}"));
    };
    env.get(key).map(String::as_str).ok_or_else(|| {
        let known: Vec<_> = env.keys().map(String::as_str).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        format!("{} is not in the image's env; it has: {known}", quoted(key))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rendered(template: &str) -> Result<String, String> {
        let name = "web".parse().expect("a server name");
        let env = BTreeMap::from([("SITE".to_owned(), "production {{ name }}".to_owned())]);
        render(template, &name, &env).map_err(|error| error.to_string())
    }

    #[test]
    fn variables_are_replaced_once() {
        let template = "server_name {{ name }};\n# {{env.SITE}} { \"ü\" }\n";
        // A value is never read as a template.
        let wanted = "server_name web;\n# production {{ name }} { \"ü\" }\n";
        assert_eq!(rendered(template), Ok(wanted.to_owned()));
    }

    #[test]
    fn what_is_not_a_variable_is_refused_where_it_is() {
        for (template, wanted) in [
            ("a\nü {{ nam }}", "2:3: `nam` is not a variable; wanted {{ name }} or {{ env.NAME }}"),
            ("{{ env.site }}", "1:1: `site` is not in the image's env; it has: SITE"),
            ("{{ name|upper }}", "1:1: `name|upper` is not a variable; wanted {{ name }} or {{ env.NAME }}"),
            ("{% include 'x' %}", "1:1: `{%` is not supported; wanted {{ name }} or {{ env.NAME }}"),
            ("{# a #}", "1:1: `{#` is not supported; wanted {{ name }} or {{ env.NAME }}"),
            ("\n{{ name", "2:1: `{{` without `}}`"),
        ] {
            assert_eq!(rendered(template), Err(wanted.to_owned()), "{template}");
        }
    }

    #[test]
    fn the_result_is_bounded() {
        let name = "web".parse().expect("a server name");
        let env = BTreeMap::from([("A".to_owned(), "x".repeat(100_000))]);
        let error = render(&"{{env.A}}\n".repeat(1000), &name, &env).expect_err("100 MB");
        assert_eq!((error.line, error.column), (42, 1));
    }

    proptest! {
        #[test]
        fn any_text_is_rendered_or_refused(template in "[{}%# a-z.]{0,40}|.{0,40}") {
            if let Ok(output) = rendered(&template) {
                prop_assert!(template.contains("{{") || output == template);
            }
        }
    }
}
