//! Reads raw types out of a tree by serde, so that every fault knows which node it is about.
//!
//! serde stops at the first fault. To find the others, what is at fault is cut out of the tree and the rest is read
//! again: what was optional then has its default, what was required takes its parent with it.

use std::fmt;

use serde::de::value::U64Deserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, Expected, IntoDeserializer,
    MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::{Deserialize, Serialize, forward_to_deserialize_any};

use super::node::{Key, Node, Tree, Value, quoted};
use super::problem::{Place, Problem};

/// More would not be read.
const MAX_PROBLEMS: usize = 20;

/// Reads a tree as `T`; what was wrong is added to the problems of the tree.
pub(super) fn read<T: DeserializeOwned>(tree: &mut Tree) -> Option<T> {
    while tree.problems.len() < MAX_PROBLEMS {
        let fault = match T::deserialize(&tree.root) {
            Ok(raw) => return Some(raw),
            Err(fault) => fault,
        };
        let id = fault.node.unwrap_or(tree.root.id);
        // What a mapping lacks after something was cut out of it is no news.
        if !was_cut(&tree.root, id) {
            tree.problems.push(Problem::new(tree.places[id], fault.message, fault.help));
        }
        if !remove(&mut tree.root, id) {
            return None;
        }
    }
    None
}

/// Whether something was cut out of the mapping `id`.
fn was_cut(node: &Node, id: usize) -> bool {
    match &node.value {
        Value::Map { cut, .. } if node.id == id => *cut,
        Value::Map { entries, .. } => entries.iter().any(|(_, value)| was_cut(value, id)),
        Value::List(items) => items.iter().any(|item| was_cut(item, id)),
        _ => false,
    }
}

/// Cuts out the entry whose key or value is `id`, or the item; false where there is none, as for the root.
fn remove(node: &mut Node, id: usize) -> bool {
    match &mut node.value {
        Value::Map { entries, cut } => {
            match entries.iter().position(|(key, value)| key.id == id || value.id == id) {
                Some(index) => {
                    entries.remove(index);
                    *cut = true;
                    true
                }
                None => entries.iter_mut().any(|(_, value)| remove(value, id)),
            }
        }
        Value::List(items) => match items.iter().position(|item| item.id == id) {
            Some(index) => {
                items.remove(index);
                true
            }
            None => items.iter_mut().any(|item| remove(item, id)),
        },
        _ => false,
    }
}

/// A value and the node that it was read from.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub(super) value: T,
    /// None for a default.
    node: Option<usize>,
}

impl<T> At<T> {
    /// Where the value is, or else what it is a part of.
    pub(super) fn place(&self, places: &[Place], parent: Place) -> Place {
        self.node.and_then(|node| places.get(node).copied()).unwrap_or(parent)
    }

    pub(super) fn is_default(&self) -> bool {
        self.node.is_none()
    }
}

impl<T> From<T> for At<T> {
    fn from(value: T) -> Self {
        Self { value, node: None }
    }
}

impl<T: Default> Default for At<T> {
    fn default() -> Self {
        T::default().into()
    }
}

impl<T: Serialize> Serialize for At<T> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.value.serialize(serializer)
    }
}

impl<T: schemars::JsonSchema> schemars::JsonSchema for At<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> std::borrow::Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        T::json_schema(generator)
    }
}

/// By this name `At` asks [`Node`] for its id before the value.
const AT: &str = "$kiln::At";

impl<'de, T: Deserialize<'de>> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pair<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pair<T> {
            type Value = At<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a node of a definition")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<At<T>, A::Error> {
                let node: Option<u64> = pair.next_element()?;
                let value = pair.next_element()?.ok_or_else(|| A::Error::invalid_length(1, &self))?;
                Ok(At { value, node: node.and_then(|node| usize::try_from(node).ok()) })
            }
        }

        deserializer.deserialize_newtype_struct(AT, Pair(std::marker::PhantomData))
    }
}

/// Why a node can't be read as what it should be.
#[derive(Debug)]
pub(super) struct Fault {
    message: String,
    help: Option<String>,
    node: Option<usize>,
}

impl Fault {
    fn new(message: String, help: Option<String>) -> Self {
        Self { message, help, node: None }
    }

    /// The innermost node that sees the fault is the one it is about.
    fn at(mut self, node: usize) -> Self {
        self.node.get_or_insert(node);
        self
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl serde::de::Error for Fault {
    /// What would be right is told on a second line.
    fn custom<T: fmt::Display>(text: T) -> Self {
        let text = text.to_string();
        match text.split_once('\n') {
            Some((message, help)) => Self::new(message.to_owned(), Some(help.to_owned())),
            None => Self::new(text, None),
        }
    }

    fn invalid_type(found: Unexpected<'_>, wanted: &dyn Expected) -> Self {
        let wanted = match wanted.to_string().as_str() {
            "a string" => "a text".to_owned(),
            "a sequence" => "a list".to_owned(),
            "a map" => "a mapping".to_owned(),
            "a boolean" => "true or false".to_owned(),
            other => other.to_owned(),
        };
        let found = match found {
            Unexpected::Bool(value) => format!("`{value}`"),
            Unexpected::Unsigned(value) => format!("the number {value}"),
            Unexpected::Signed(value) => format!("the number {value}"),
            Unexpected::Float(value) => format!("the number {value}"),
            Unexpected::Str(value) => format!("the text {}", quoted(value)),
            Unexpected::Unit => "nothing".to_owned(),
            Unexpected::Seq => "a list".to_owned(),
            Unexpected::Map => "a mapping".to_owned(),
            // A variant that has a content, given by its name alone.
            Unexpected::UnitVariant => {
                return Self::new("wanted a mapping, found a single word".to_owned(), None);
            }
            other => other.to_string(),
        };
        let help = match found.as_str() {
            "nothing" => Some("give it a value, or remove the key"),
            "a list" | "a mapping" => None,
            _ => (wanted == "a text").then_some("put it in quotes"),
        };
        Self::new(format!("wanted {wanted}, found {found}"), help.map(str::to_owned))
    }

    fn unknown_variant(variant: &str, wanted: &'static [&'static str]) -> Self {
        Self::new(format!("{} is not known here", quoted(variant)), Some(instead(variant, wanted)))
    }

    fn unknown_field(field: &str, wanted: &'static [&'static str]) -> Self {
        Self::new(format!("unknown key {}", quoted(field)), Some(instead(field, wanted)))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format!("the key `{field}` is missing"), None)
    }
}

/// What was meant, or what there is.
fn instead(given: &str, wanted: &[&str]) -> String {
    let plain = |text: &str| text.replace(['_', '-'], "").to_lowercase();
    let near = wanted
        .iter()
        .map(|wanted| (strsim::osa_distance(&plain(given), &plain(wanted)), wanted))
        .filter(|(distance, wanted)| *distance <= wanted.len().div_ceil(3).min(2))
        .min();
    match near {
        // A long text would take long to compare.
        Some((_, wanted)) if given.len() <= 40 => format!("did you mean `{wanted}`?"),
        _ => format!("wanted one of: {}", wanted.join(", ")),
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let result = match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => match (u64::try_from(*value), i64::try_from(*value)) {
                (Ok(value), _) => visitor.visit_u64(value),
                (_, Ok(value)) => visitor.visit_i64(value),
                _ => visitor.visit_i128(*value),
            },
            // JSON, in which definitions are kept, would make nothing of it.
            Value::Float(value) if !value.is_finite() => {
                Err(Fault::custom(format!("`{value}` can't be used\nwanted a number that is finite")))
            }
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_borrowed_str(value),
            Value::List(items) => visitor.visit_seq(Items(items.iter())),
            Value::Map { entries, .. } => visitor.visit_map(Entries { rest: entries.iter(), value: None }),
        };
        result.map_err(|fault| fault.at(self.id))
    }

    /// A key that is there has a value: nothing is not none.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self).map_err(|fault| fault.at(self.id))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let result = if name == AT {
            visitor.visit_seq(WithId { node: self, given: 0 })
        } else {
            visitor.visit_newtype_struct(self)
        };
        result.map_err(|fault| fault.at(self.id))
    }

    /// A text, or a mapping of one key, which names the variant, to its value.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let wanted = || format!("wanted one of: {}", variants.join(", "));
        let result = match &self.value {
            Value::Text(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            Value::Map { entries, .. } => match entries.as_slice() {
                [(key, value)] => visitor.visit_enum(Variant { key, value }),
                // The second key is the one too many.
                [_, (second, _), ..] => {
                    let message = format!("one key is wanted here, {} is one too many", quoted(&second.text));
                    Err(Fault::new(message, Some(wanted())).at(second.id))
                }
                [] => Err(Fault::new("one key is wanted here, found none".to_owned(), Some(wanted()))),
            },
            Value::Null => Err(Fault::new("wanted a value, found nothing".to_owned(), Some(wanted()))),
            Value::Bool(_) | Value::Int(_) | Value::Float(_) => {
                Err(Fault::new("wanted a text, found a number or truth value".to_owned(), Some(wanted())))
            }
            Value::List(_) => {
                Err(Fault::new("wanted a single value, found a list".to_owned(), Some(wanted())))
            }
        };
        result.map_err(|fault| fault.at(self.id))
    }

    /// serde would take a list of the fields' values as well.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.value {
            Value::List(_) => Err(Fault::invalid_type(Unexpected::Seq, &visitor).at(self.id)),
            _ => self.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq
        tuple tuple_struct map identifier ignored_any
    }
}

struct WithId<'de> {
    node: &'de Node,
    given: u8,
}

impl<'de> SeqAccess<'de> for WithId<'de> {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        self.given += 1;
        match self.given {
            1 => {
                let id: U64Deserializer<Fault> = (self.node.id as u64).into_deserializer();
                seed.deserialize(id).map(Some)
            }
            2 => seed.deserialize(self.node).map(Some),
            _ => Ok(None),
        }
    }
}

struct Items<'de>(std::slice::Iter<'de, Node>);

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Fault;

    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        self.0.next().map(|item| seed.deserialize(item)).transpose()
    }
}

struct Entries<'de> {
    rest: std::slice::Iter<'de, (Key, Node)>,
    value: Option<&'de Node>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Fault;

    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, Fault> {
        let Some((key, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, Fault> {
        let value = self.value.take().ok_or_else(|| Fault::custom("a value was asked for before its key"))?;
        seed.deserialize(value)
    }
}

impl<'de> Deserializer<'de> for &'de Key {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_borrowed_str(&self.text).map_err(|fault: Fault| fault.at(self.id))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq
        tuple tuple_struct map struct identifier ignored_any option enum newtype_struct
    }
}

struct Variant<'de> {
    key: &'de Key,
    value: &'de Node,
}

impl<'de> EnumAccess<'de> for Variant<'de> {
    type Error = Fault;
    type Variant = Content<'de>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Content<'de>), Fault> {
        Ok((seed.deserialize(self.key)?, Content(self.value)))
    }
}

struct Content<'de>(&'de Node);

impl<'de> VariantAccess<'de> for Content<'de> {
    type Error = Fault;

    fn unit_variant(self) -> Result<(), Fault> {
        Err(Fault::new("wanted a single word, found a mapping".to_owned(), None).at(self.0.id))
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, Fault> {
        seed.deserialize(self.0)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _length: usize, visitor: V) -> Result<V::Value, Fault> {
        self.0.deserialize_any(visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        self.0.deserialize_any(visitor)
    }
}
