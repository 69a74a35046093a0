//! The YAML of a definition as a tree in which every node knows its place.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::budget::BudgetBreach;
use serde_saphyr::{Error, Location, Spanned};

use super::problem::{Place, Problem};

/// A definition is at most five levels deep; what nests deeper is hostile, or a mistake.
const MAX_DEPTH: usize = 32;
/// Files, packages and arguments within the limits of a definition stay well below.
const MAX_NODES: usize = 20_000;
/// A bomb of aliases is stopped by the events that they are replayed as.
const MAX_ALIASES: usize = 200;

#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: usize,
    pub(super) value: Value,
}

impl Node {
    /// The value under a key, where this is a mapping that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Self> {
        match &self.value {
            Value::Map { entries, .. } => entries.iter().find(|(k, _)| k.text == key).map(|(_, value)| value),
            _ => None,
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// `cut` says that entries were taken out since.
    Map {
        entries: Vec<(Key, Node)>,
        cut: bool,
    },
}

#[derive(Debug)]
pub(super) struct Key {
    pub(super) id: usize,
    pub(super) text: String,
}

/// The tree of a text, with the place of each node under its id.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) root: Node,
    pub(super) places: Vec<Place>,
    /// Such as keys that were given twice.
    pub(super) problems: Vec<Problem>,
}

impl Tree {
    /// # Errors
    /// The one problem that keeps the text from being YAML, or being read within bounds.
    pub(super) fn parse(text: &str) -> Result<Self, Problem> {
        let options = serde_saphyr::options! {
            budget: serde_saphyr::budget! {
                // Above the other, which says what is wrong.
                flow_nesting_limit: 2 * MAX_DEPTH,
                max_depth: MAX_DEPTH,
                max_documents: 1,
                max_nodes: MAX_NODES,
                max_events: 2 * MAX_NODES,
                max_aliases: MAX_ALIASES,
                max_anchors: MAX_ALIASES,
                max_recorded_anchor_events: 2 * MAX_NODES,
                max_recorded_anchor_bytes: 4 * 1024 * 1024,
                max_total_scalar_bytes: 4 * 1024 * 1024,
            },
            alias_limits: serde_saphyr::alias_limits! {
                max_total_replayed_events: 2 * MAX_NODES,
                max_replay_stack_depth: MAX_DEPTH,
            },
            // Found here instead, so that both places can be named and the rest is still looked at.
            duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
            merge_keys: serde_saphyr::MergeKeyPolicy::AsOrdinary,
            non_finite_float_policy: serde_saphyr::NonFiniteFloatPolicy::PassThrough,
            strict_booleans: true,
            reject_unsupported_tags: true,
            with_snippet: false,
        };
        let parsed: Spanned<Parsed> =
            serde_saphyr::from_str_with_options(text, options).map_err(|error| not_readable(text, &error))?;
        let mut garden = Garden { text, places: Vec::new(), problems: Vec::new() };
        let root = garden.plant(parsed);
        if matches!(root.value, Value::Null) {
            let help = Some("wanted at least name, image.from and image.command".to_owned());
            return Err(Problem::new(garden.places[root.id], "this definition is empty", help));
        }
        Ok(Self { root, places: garden.places, problems: garden.problems })
    }
}

fn not_readable(text: &str, error: &Error) -> Problem {
    let location = error.location();
    let place = location.map_or_else(|| Place::of(text, 1, 1), |location| place(text, location));
    let mut error = error.without_snippet();
    while let Error::AliasError { error: inner, .. } = error {
        error = inner.without_snippet();
    }
    let message = match error {
        Error::Eof { .. } => "this definition is empty, or ends too early".to_owned(),
        Error::Budget { breach: BudgetBreach::Documents { .. }, .. } | Error::MultipleDocuments { .. } => {
            "a second document begins here, wanted one".to_owned()
        }
        Error::Budget { breach: BudgetBreach::Depth { .. }, .. } => {
            format!("this is nested deeper than the {MAX_DEPTH} levels that are read")
        }
        Error::Budget { .. }
        | Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. } => {
            format!("there is more here, aliases unfolded, than the {MAX_NODES} values that are read")
        }
        Error::UnsupportedTag { tag, .. } => format!("the tag {} has no meaning here", quoted(tag)),
        other => {
            let rendered = other.render_with_formatter(&serde_saphyr::UserMessageFormatter);
            let message = rendered.lines().next().unwrap_or_default();
            // The place is told apart from the message.
            let end = message.rfind(" at line ").unwrap_or(message.len());
            format!("this is not YAML: {}", message.get(..end).unwrap_or(message))
        }
    };
    Problem::new(place, message, None)
}

fn place(text: &str, location: Location) -> Place {
    let number = |number: u64| usize::try_from(number).unwrap_or_default();
    let (line, column, span) = (number(location.line()), number(location.column()), location.span());
    match (span.byte_offset(), span.byte_len()) {
        // Counting to the line and column for every node would be quadratic.
        (Some(start), Some(length)) if line > 0 => {
            let start = number(start);
            Place { line, column, start, end: start.saturating_add(number(length)) }
        }
        _ => Place::of(text, line, column),
    }
}

struct Garden<'a> {
    text: &'a str,
    places: Vec<Place>,
    problems: Vec<Problem>,
}

impl Garden<'_> {
    fn id(&mut self, location: Location) -> usize {
        self.places.push(place(self.text, location));
        self.places.len() - 1
    }

    fn plant(&mut self, parsed: Spanned<Parsed>) -> Node {
        // Where an alias is used, the anchor's place is the one to edit.
        let id = self.id(parsed.defined);
        let mut end = 0;
        let value = match parsed.value {
            Parsed::Null => Value::Null,
            Parsed::Bool(value) => Value::Bool(value),
            Parsed::Int(value) => Value::Int(value),
            Parsed::Float(value) => Value::Float(value),
            Parsed::Text(value) => {
                self.refuse_nul(id, &value);
                Value::Text(value)
            }
            Parsed::List(items) => {
                let items: Vec<_> = items.into_iter().map(|item| self.plant(item)).collect();
                end = items.iter().map(|item| self.places[item.id].end).max().unwrap_or_default();
                Value::List(items)
            }
            Parsed::Map(parsed) => {
                let mut entries = Vec::with_capacity(parsed.len());
                let mut lines: BTreeMap<String, usize> = BTreeMap::new();
                for (key, value) in parsed {
                    let key = Key { id: self.id(key.defined), text: key.value };
                    self.refuse_nul(key.id, &key.text);
                    let value = self.plant(value);
                    end = end.max(self.places[value.id].end);
                    if let Some(line) = lines.get(&key.text) {
                        let message =
                            format!("the key {} was given on line {line} already", quoted(&key.text));
                        self.problem(key.id, message, "remove one of the two");
                    } else {
                        lines.insert(key.text.clone(), self.places[key.id].line);
                        entries.push((key, value));
                    }
                }
                Value::Map { entries, cut: false }
            }
        };
        let place = &mut self.places[id];
        place.end = place.end.max(end);
        Node { id, value }
    }

    fn refuse_nul(&mut self, id: usize, text: &str) {
        if text.contains('\0') {
            self.problem(id, "this text holds a NUL byte".to_owned(), "remove it");
        }
    }

    fn problem(&mut self, id: usize, message: String, help: &str) {
        self.problems.push(Problem::new(self.places[id], message, Some(help.to_owned())));
    }
}

/// A text as it is shown in a message: cut, and harmless to a terminal.
pub(super) fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().take(60).flat_map(char::escape_debug).collect();
    // Quotes do not harm.
    shown = shown.replace("\\\"", "\"").replace("\\'", "'");
    let cut = if text.chars().nth(60).is_some() { "…" } else { "" };
    format!("`{shown}{cut}`")
}

/// The same without ids: what serde can make by itself.
enum Parsed {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Parsed>>),
    Map(Vec<(Spanned<String>, Spanned<Parsed>)>),
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Parsed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any YAML value")
            }

            fn visit_unit<E>(self) -> Result<Parsed, E> {
                Ok(Parsed::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Parsed, E> {
                Ok(Parsed::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Parsed, E> {
                Ok(Parsed::Int(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Parsed, E> {
                Ok(Parsed::Int(value.into()))
            }

            fn visit_i128<E>(self, value: i128) -> Result<Parsed, E> {
                Ok(Parsed::Int(value))
            }

            fn visit_u128<E>(self, value: u128) -> Result<Parsed, E> {
                // Out of the range of anything that a definition counts.
                Ok(Parsed::Int(i128::try_from(value).unwrap_or(i128::MAX)))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Parsed, E> {
                Ok(Parsed::Float(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Parsed, E> {
                Ok(Parsed::Text(value.to_owned()))
            }

            fn visit_string<E>(self, value: String) -> Result<Parsed, E> {
                Ok(Parsed::Text(value))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Parsed, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Parsed::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Parsed, A::Error> {
                let mut map = Vec::new();
                while let Some(entry) = entries.next_entry()? {
                    map.push(entry);
                }
                Ok(Parsed::Map(map))
            }
        }

        deserializer.deserialize_any(Any)
    }
}
