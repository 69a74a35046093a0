//! What an image begins with, as it is written.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::json;

use super::DebianVariant;
use super::read::At;
use super::text::{
    ArchiveUrl, ComponentName, InnerPath, Name, PlaceOfImage, RootPlace, SecretName, Sha256, StageName,
    SuiteName, Text, VariableName,
};

pub(super) enum From {
    Scratch,
    Debian { suite: Text<SuiteName>, variant: DebianVariant, archives: At<Vec<Archive>> },
    Archive { place: At<Text<RootPlace>>, sha256: Option<At<Text<Sha256>>>, archives: At<Vec<Archive>> },
    Image { place: Text<PlaceOfImage>, archives: At<Vec<Archive>> },
    Containerfile(Containerfile),
    Server(At<Text<Name>>),
}

pub(super) struct Containerfile {
    pub(super) file: At<Text<InnerPath>>,
    pub(super) context: Option<Text<InnerPath>>,
    pub(super) target: Option<Text<StageName>>,
    pub(super) args: BTreeMap<Text<VariableName>, String>,
    pub(super) secrets: Vec<Text<SecretName>>,
}

/// A Debian suite, a root file system as tar, an image that others have made, what a Containerfile makes, or another server's
/// image.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct FromKeys {
    /// A Debian suite such as bookworm.
    debian: Option<Text<SuiteName>>,
    /// A root file system as tar, plain or compressed by gzip, xz or zstd: a file of the definition's folder, or its address.
    archive: Option<At<Text<RootPlace>>>,
    /// For an archive's address: the hash of the file, 64 hexadecimal digits.
    sha256: Option<At<Text<Sha256>>>,
    /// An image of a registry, such as registry.example/app:1.2, or an OCI layout in the definition's folder, such as
    /// oci:folder:tag. Of its configuration only the environment is taken over.
    image: Option<Text<PlaceOfImage>>,
    /// A Containerfile, also called Dockerfile, in the definition's folder. Of the image's configuration only the environment is
    /// taken over.
    containerfile: Option<At<Text<InnerPath>>>,
    /// For a Containerfile: the folder that COPY takes from. Without it the folder of server.yaml.
    context: Option<Text<InnerPath>>,
    /// For a Containerfile: the stage that is wanted. Without it the last one.
    target: Option<Text<StageName>>,
    /// For a Containerfile: in the place of what its ARG lines say.
    args: Option<BTreeMap<Text<VariableName>, String>>,
    /// For a Containerfile: names out of `[secrets]` in site.toml, for RUN --mount=type=secret,id=NAME.
    #[schemars(length(min = 1))]
    secrets: Option<Vec<Text<SecretName>>>,
    /// The name of another server: its newest image.
    server: Option<At<Text<Name>>>,
    /// For debian: which packages are there from the beginning.
    variant: Option<At<DebianVariant>>,
    /// For debian, archive and image: where packages come from. Without it the host's or the site's archives for the suite.
    archives: Option<At<Vec<Archive>>>,
}

const SOURCE_KEYS: [&str; 5] = ["debian", "archive", "image", "containerfile", "server"];
const OF_CONTAINERFILE: &[&str] = &["containerfile"];
/// What more can be said, of which sources, and what it is.
const MORE_KEYS: [(&str, &[&str], &str); 7] = [
    ("variant", &["debian"], "it says which packages of Debian are there"),
    (
        "archives",
        &["debian", "archive", "image"],
        "where packages come from is said by the other server, or in the Containerfile",
    ),
    ("sha256", &["archive"], "it is the hash of an archive"),
    ("context", OF_CONTAINERFILE, "a Containerfile copies from it"),
    ("target", OF_CONTAINERFILE, "it is a stage of a Containerfile"),
    ("args", OF_CONTAINERFILE, "a Containerfile takes them"),
    ("secrets", OF_CONTAINERFILE, "write them beside the step that needs them"),
];

impl FromKeys {
    fn has(&self, key: &str) -> bool {
        match key {
            "debian" => self.debian.is_some(),
            "archive" => self.archive.is_some(),
            "image" => self.image.is_some(),
            "containerfile" => self.containerfile.is_some(),
            "server" => self.server.is_some(),
            "variant" => self.variant.is_some(),
            "archives" => self.archives.is_some(),
            "sha256" => self.sha256.is_some(),
            "context" => self.context.is_some(),
            "target" => self.target.is_some(),
            "args" => self.args.is_some(),
            "secrets" => self.secrets.is_some(),
            _ => false,
        }
    }

    /// The one thing that the image begins with, where nothing is said that goes with another.
    fn checked(self) -> Result<From, String> {
        let mut said = SOURCE_KEYS.into_iter().filter(|key| self.has(key));
        let (first, second) = (said.next(), said.next());
        if let (Some(first), Some(second)) = (first, second) {
            return Err(format!(
                "an image begins with one thing, found `{first}` and `{second}`\nremove one of the two"
            ));
        }
        for (key, with, why) in MORE_KEYS {
            if let Some(source) = first.filter(|source| self.has(key) && !with.contains(source)) {
                return Err(format!("`{key}` does not go with `{source}`\n{why}"));
            }
        }
        match self {
            Self { debian: Some(suite), variant, archives, .. } => Ok(From::Debian {
                suite,
                variant: variant.map_or(DebianVariant::Minbase, |variant| variant.value),
                archives: archives.unwrap_or_default(),
            }),
            Self { archive: Some(place), sha256, archives, .. } => {
                Ok(From::Archive { place, sha256, archives: archives.unwrap_or_default() })
            }
            Self { image: Some(place), archives, .. } => {
                Ok(From::Image { place, archives: archives.unwrap_or_default() })
            }
            Self { containerfile: Some(file), context, target, args, secrets, .. } => {
                Ok(From::Containerfile(Containerfile {
                    file,
                    context,
                    target,
                    args: args.unwrap_or_default(),
                    secrets: secrets.unwrap_or_default(),
                }))
            }
            Self { server: Some(server), .. } => Ok(From::Server(server)),
            _ => Err(format!("it is not said what the image begins with\nwanted {SOURCES}")),
        }
    }
}

const SOURCES: &str = "{ debian: SUITE }, { image: NAME }, { containerfile: FILE }, { archive: FILE }, { server: NAME } or scratch";

impl<'de> Deserialize<'de> for From {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = From;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(SOURCES)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<From, E> {
                match text {
                    "scratch" => Ok(From::Scratch),
                    other => Err(E::invalid_type(serde::de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<From, A::Error> {
                FromKeys::deserialize(MapAccessDeserializer::new(map))?.checked().map_err(A::Error::custom)
            }
        }

        deserializer.deserialize_any(Form)
    }
}

impl JsonSchema for From {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "From".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut keys = FromKeys::json_schema(generator);
        let one_of = SOURCE_KEYS.map(|source| {
            let others = MORE_KEYS.iter().filter(|(_, with, _)| !with.contains(&source));
            let others: Vec<_> = others.map(|(key, ..)| json!({ "required": [key] })).collect();
            json!({ "required": [source], "not": { "anyOf": others } })
        });
        keys.insert("oneOf".to_owned(), json!(one_of));
        json_schema!({
            "description": "What the image begins with: a Debian suite, a root file system as tar, an image that others have made, what a Containerfile makes, another server's image, or nothing.",
            "anyOf": [{ "const": "scratch", "description": "Nothing." }, keys]
        })
    }
}

/// One archive to resolve packages from.
#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, expecting = "a mapping with url, suite and signedBy")]
pub(super) struct Archive {
    pub(super) url: Text<ArchiveUrl>,
    /// A suite as the archive names it, such as bookworm-security.
    pub(super) suite: Text<SuiteName>,
    #[serde(default = "main_component")]
    pub(super) components: At<Vec<Text<ComponentName>>>,
    /// The key ring that the archive is signed with: a file in the definition's folder.
    pub(super) signed_by: Text<InnerPath>,
}

fn main_component() -> At<Vec<Text<ComponentName>>> {
    vec![Text("main".to_owned())].into()
}
