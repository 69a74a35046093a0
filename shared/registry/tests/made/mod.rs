//! Images that are pushed and pulled.

use std::collections::BTreeMap;

use kiln_image::{ImageStore, Layer, NewImage};
use kiln_model::digest::Digest;

/// An image whose layers hold these bytes.
pub(crate) fn image(store: &ImageStore, layers: &[&[u8]]) -> Digest {
    let image = NewImage {
        architecture: "amd64".to_owned(),
        created: "2026-01-01T00:00:00Z".to_owned(),
        env: BTreeMap::new(),
        user: "0".to_owned(),
        command: vec!["true".to_owned()],
        labels: BTreeMap::new(),
        layers: layers.iter().map(|content| layer(store, content)).collect(),
    };
    store.put_image(&image).unwrap()
}

fn layer(store: &ImageStore, mut content: &[u8]) -> Layer {
    let (diff_id, size) = store.put_blob(&mut content, None).unwrap();
    Layer { diff_id, size, created_by: "a step".to_owned(), created: "2026-01-01T00:00:00Z".to_owned() }
}
