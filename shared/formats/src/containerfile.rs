//! Which images a Containerfile names, and the same file with others in their place: what is built on is pinned, whatever a
//! registry has under a name by then.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use parse_dockerfile::{Flag, Instruction, parse};

/// Bytes of a Containerfile.
pub const LIMIT: u64 = 1 << 20;
/// As docker and buildah have it: the image that holds nothing.
const NOTHING: &str = "scratch";

/// What can't be understood of a Containerfile.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {why}")]
pub struct Refused {
    line: usize,
    why: String,
}

/// A place in the text where an image is named.
#[derive(Debug, PartialEq, Eq)]
struct Mention {
    span: Range<usize>,
    image: String,
    /// What stands in the span, with the image's name left out of the middle.
    around: (String, String),
}

/// The images that a Containerfile names, each once, as they are written with `args` put in.
pub fn images(
    text: &str,
    args: &BTreeMap<String, String>,
    architecture: &str,
) -> Result<BTreeSet<String>, Refused> {
    Ok(mentions(text, args, architecture)?.into_iter().map(|mention| mention.image).collect())
}

/// The text with each image under the name that `names` has for it; those that it has none for stay.
pub fn renamed(
    text: &str,
    args: &BTreeMap<String, String>,
    architecture: &str,
    names: &BTreeMap<&str, String>,
) -> Result<String, Refused> {
    let mut renamed = String::with_capacity(text.len());
    let mut copied = 0;
    for Mention { span, image, around: (before, after) } in mentions(text, args, architecture)? {
        let Some(name) = names.get(image.as_str()) else { continue };
        renamed.push_str(text.get(copied..span.start).unwrap_or_default());
        renamed.extend([before.as_str(), name, after.as_str()]);
        copied = span.end;
    }
    renamed.push_str(text.get(copied..).unwrap_or_default());
    Ok(renamed)
}

/// In the order of the text.
fn mentions(
    text: &str,
    args: &BTreeMap<String, String>,
    architecture: &str,
) -> Result<Vec<Mention>, Refused> {
    let file = parse(text).map_err(|error| Refused { line: error.line().max(1), why: error.to_string() })?;
    let mut variables = platform(architecture);
    for arg in file.global_args() {
        let refused = |why| Refused { line: line_of(text, arg.arguments.span.start), why };
        for word in words(&arg.arguments.value) {
            let (name, said) =
                word.split_once('=').map_or((word.as_str(), None), |(name, it)| (name, Some(it)));
            let value = match (args.get(name), said) {
                (Some(given), _) => given.clone(),
                (None, Some(said)) => expanded(said, &variables).map_err(refused)?,
                (None, None) => continue,
            };
            variables.insert(name.to_owned(), value);
        }
    }
    let mut stages: Vec<String> = Vec::new();
    let mut found = Vec::new();
    for instruction in &file.instructions {
        match instruction {
            Instruction::From(from) => {
                let line = line_of(text, from.image.span.start);
                let image = expanded(&from.image.value, &variables).map_err(|why| Refused { line, why })?;
                let is_stage = stages.iter().any(|stage| stage.eq_ignore_ascii_case(&image));
                if !is_stage && image != NOTHING {
                    let around = (String::new(), String::new());
                    found.push(Mention { span: from.image.span.clone(), image, around });
                }
                stages.push(from.as_.as_ref().map(|(_, name)| name.value.to_string()).unwrap_or_default());
            }
            Instruction::Copy(copy) => found.extend(copied_from(&copy.options, &stages)),
            Instruction::Run(run) => found.extend(mounted_from(&run.options, &stages)),
            _ => {}
        }
    }
    Ok(found)
}

/// `COPY --from=image`
fn copied_from(options: &[Flag<'_>], stages: &[String]) -> Option<Mention> {
    let value = options.iter().find(|flag| flag.name.value == "from")?.value.as_ref()?;
    is_image(&value.value, stages).then(|| Mention {
        span: value.span.clone(),
        image: value.value.to_string(),
        around: (String::new(), String::new()),
    })
}

/// `RUN --mount=type=bind,from=image,target=/x`
fn mounted_from(options: &[Flag<'_>], stages: &[String]) -> Vec<Mention> {
    let mounts = options.iter().filter(|flag| flag.name.value == "mount").filter_map(|it| it.value.as_ref());
    let mention = |value: &parse_dockerfile::UnescapedString<'_>| {
        let text: &str = &value.value;
        let start =
            text.strip_prefix("from=").map_or_else(|| text.find(",from=").map(|at| at + 6), |_| Some(5))?;
        let image = text[start..].split(',').next().unwrap_or_default();
        let around = (text[..start].to_owned(), text[start + image.len()..].to_owned());
        is_image(image, stages).then(|| Mention { span: value.span.clone(), image: image.to_owned(), around })
    };
    mounts.filter_map(mention).collect()
}

/// Neither a stage, by its name or its number, nor nothing.
fn is_image(name: &str, stages: &[String]) -> bool {
    let is_stage = stages.iter().any(|stage| stage.eq_ignore_ascii_case(name))
        || name.parse::<usize>().is_ok_and(|number| number < stages.len());
    !name.is_empty() && !is_stage && name != NOTHING
}

/// What docker and buildah say of themselves without being asked.
fn platform(architecture: &str) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for of in ["BUILD", "TARGET"] {
        for (name, value) in [
            ("PLATFORM", format!("linux/{architecture}")),
            ("OS", "linux".to_owned()),
            ("ARCH", architecture.to_owned()),
            ("VARIANT", String::new()),
        ] {
            variables.insert(format!("{of}{name}"), value);
        }
    }
    variables
}

/// `A=1 B="x y"`
fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote, mut any) = (Vec::new(), String::new(), None, false);
    for c in text.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if c == '"' || c == '\'' => (quote, any) = (Some(c), true),
            None if c.is_whitespace() => {
                if any {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            _ => {
                word.push(c);
                any = true;
            }
        }
    }
    if any {
        words.push(word);
    }
    words
}

/// With variables put in: `$A`, `${A}`, `${A:-otherwise}`, `${A:+instead}`.
fn expanded(text: &str, variables: &BTreeMap<String, String>) -> Result<String, String> {
    let mut result = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        result.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if let Some(inner) = after.strip_prefix('{') {
            let (inner, behind) =
                inner.split_once('}').ok_or_else(|| format!("a `}}` is missing in {text}"))?;
            let end = inner.find(|c| !is_name(c)).unwrap_or(inner.len());
            let value = variables.get(&inner[..end]).map(String::as_str).unwrap_or_default();
            match inner[end..].split_at_checked(2) {
                None if inner[end..].is_empty() => result.push_str(value),
                Some((":-", otherwise)) => result.push_str(if value.is_empty() { otherwise } else { value }),
                Some((":+", instead)) => result.push_str(if value.is_empty() { "" } else { instead }),
                _ => return Err(format!("${{{inner}}} is no form of a variable that Kiln knows")),
            }
            rest = behind;
        } else {
            let end = after.find(|c| !is_name(c)).unwrap_or(after.len());
            result.push_str(variables.get(&after[..end]).map(String::as_str).unwrap_or_default());
            rest = &after[end..];
        }
    }
    result.push_str(rest);
    Ok(result)
}

fn line_of(text: &str, at: usize) -> usize {
    text.get(..at).unwrap_or(text).matches('\n').count() + 1
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = r#"# syntax=docker/dockerfile:1
ARG VERSION=12 SUFFIX="-slim"
ARG BASE=debian:${VERSION}${SUFFIX:-}
FROM --platform=$BUILDPLATFORM golang:1 AS Build
RUN --mount=type=cache,target=/root/.cache --mount=type=bind,from=tools/a:1,target=/t go build
FROM ${BASE} AS base
COPY --from=build /x /x
COPY --from=0 /y /y
COPY --chown=1:1 --from=registry.example/app@sha256:0000000000000000000000000000000000000000000000000000000000000000 /z /z
RUN <<EOF
FROM is no instruction in here
EOF
FROM base
FROM scratch
FROM \
  nginx:1
"#;

    fn found(text: &str, args: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let args = args.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        images(text, &args, "amd64").map(|it| it.into_iter().collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_image_is_found_and_no_stage_is_taken_for_one() {
        let pinned = format!("registry.example/app@sha256:{}", "0".repeat(64));
        let wanted = ["debian:12-slim", "golang:1", "nginx:1", &pinned, "tools/a:1"];
        assert_eq!(found(FILE, &[]).unwrap(), wanted);
        let others = found(FILE, &[("VERSION", "13"), ("SUFFIX", "")]).unwrap();
        assert!(others.contains(&"debian:13".to_owned()), "{others:?}");
        assert!(found(FILE, &[("BASE", "build")]).unwrap().iter().all(|image| !image.starts_with("debian")));
    }

    #[test]
    fn what_is_built_on_gets_another_name_and_all_else_stays() {
        let names = [("debian:12-slim", "localhost/a".to_owned()), ("tools/a:1", "localhost/b".to_owned())];
        let text = renamed(FILE, &BTreeMap::new(), "amd64", &names.into()).unwrap();
        let wanted = FILE
            .replace("FROM ${BASE} AS base", "FROM localhost/a AS base")
            .replace("from=tools/a:1,", "from=localhost/b,");
        assert_eq!(text, wanted);
        let all = images(FILE, &BTreeMap::new(), "amd64").unwrap();
        let names: BTreeMap<&str, String> =
            all.iter().map(|it| (it.as_str(), "localhost/x".to_owned())).collect();
        let text = renamed(FILE, &BTreeMap::new(), "amd64", &names).unwrap();
        assert_eq!(found(&text, &[]).unwrap(), ["localhost/x"]);
    }

    #[test]
    fn what_is_not_understood_is_said_with_its_line() {
        for (text, said) in [
            ("", "line 1: "),
            ("RUN true\n", "line 1: "),
            ("FROM a\nNONSENSE x\n", "line 2: "),
            ("FROM ${A", "line 1: a `}` is missing"),
            ("ARG A=1\nFROM ${A%x}\n", "line 2: ${A%x} is no form"),
        ] {
            let why = found(text, &[]).unwrap_err();
            assert!(why.starts_with(said), "{text:?}: {why}");
        }
    }

    #[test]
    fn a_variable_is_put_in_as_a_shell_would() {
        let variables = [("A".to_owned(), "1".to_owned()), ("E".to_owned(), String::new())].into();
        for (text, wanted) in [
            ("x$A-$E.", "x1-."),
            ("${A}${E}${N}", "1"),
            ("${A:-2}${E:-3}${N:-4}", "134"),
            ("${A:+2}${E:+3}", "2"),
            ("$", ""),
        ] {
            assert_eq!(expanded(text, &variables).unwrap(), wanted, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(
            text in r#"((FROM|ARG|COPY|RUN|#|\$\{?[A-Z]?|--from=|--mount=|,from=|<<E|[a-z:="'\\}]{0,4}|é)[ \n]?){0,12}"#
        ) {
            if let Ok(all) = images(&text, &BTreeMap::new(), "amd64") {
                let names = all.iter().map(|it| (it.as_str(), "localhost/x".to_owned())).collect();
                prop_assert!(renamed(&text, &BTreeMap::new(), "amd64", &names).is_ok());
            }
        }
    }
}
