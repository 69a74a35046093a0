//! Where an image lies that others have made.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::text::{InnerPath, Syntax as _};
use crate::repository::{ImageReference, is_tag};

const LAYOUT: &str = "oci:";

/// `registry.example/team/app:1.2`, or `oci:folder:tag`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImagePlace {
    Registry(ImageReference),
    /// An OCI image layout in the definition's folder; without a tag it holds one image.
    Layout {
        folder: String,
        tag: Option<String>,
    },
}

/// The text is neither.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not the place of an image")]
pub struct NotAPlace;

impl FromStr for ImagePlace {
    type Err = NotAPlace;

    fn from_str(text: &str) -> Result<Self, NotAPlace> {
        let Some(layout) = text.strip_prefix(LAYOUT) else {
            return text.parse().map(Self::Registry).map_err(|_| NotAPlace);
        };
        let (folder, tag) = match layout.split_once(':') {
            Some((folder, tag)) if is_tag(tag) => (folder, Some(tag.to_owned())),
            Some(_) => return Err(NotAPlace),
            None => (layout, None),
        };
        InnerPath::parse(folder).map(|folder| Self::Layout { folder, tag }).ok_or(NotAPlace)
    }
}

impl fmt::Display for ImagePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => reference.fmt(f),
            Self::Layout { folder, tag: None } => write!(f, "{LAYOUT}{folder}"),
            Self::Layout { folder, tag: Some(tag) } => write!(f, "{LAYOUT}{folder}:{tag}"),
        }
    }
}

impl TryFrom<String> for ImagePlace {
    type Error = NotAPlace;

    fn try_from(text: String) -> Result<Self, NotAPlace> {
        text.parse()
    }
}

impl From<ImagePlace> for String {
    fn from(place: ImagePlace) -> Self {
        place.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_is_written() {
        for (text, shown) in [
            ("registry.example/app:1", "registry.example/app:1"),
            ("oci:base", "oci:base"),
            ("oci:./images//base:v1", "oci:images/base:v1"),
        ] {
            let place: ImagePlace = text.parse().unwrap();
            assert_eq!(place.to_string(), shown);
            assert_eq!(shown.parse(), Ok(place));
        }
        for wrong in ["", "app", "oci:", "oci:/etc", "oci:../base", "oci:base:", "oci:base:a b", "oci:a:b:c"]
        {
            assert_eq!(wrong.parse::<ImagePlace>(), Err(NotAPlace), "{wrong}");
        }
    }
}
