use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{Schema, SchemaGenerator};
use serde_json::{Value, json};

use super::raw;

/// The JSON Schema of `server.yaml`, for editors: `deploy/schema/server.schema.json`.
///
/// What it lets pass can still be refused: it says nothing of how values go together.
pub fn json_schema() -> Value {
    let settings = SchemaSettings::draft2020_12().with_transform(RecursiveTransform(without_null));
    let generator = SchemaGenerator::new(settings);
    let mut schema = generator.into_root_schema_for::<raw::Definition>();
    schema.insert("title".to_owned(), "Kiln server".into());
    schema.to_value()
}

/// What may be left out still has a value where it is given: `health:` with nothing after it is refused.
fn without_null(schema: &mut Schema) {
    if let Some(Value::Array(types)) = schema.get_mut("type") {
        types.retain(|name| name != "null");
        if let [only] = types.as_slice() {
            let only = only.clone();
            schema.insert("type".to_owned(), only);
        }
    }
    if let Some(Value::Array(forms)) = schema.get("anyOf")
        && let [Value::Object(form), null] = forms.as_slice()
        && null == &json!({ "type": "null" })
    {
        let form = form.clone();
        schema.remove("anyOf");
        schema.ensure_object().extend(form);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// `KILN_REGENERATE=1` writes it instead.
    #[test]
    fn the_committed_schema_is_what_the_types_give() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../deploy/schema/server.schema.json");
        let wanted = serde_json::to_string_pretty(&json_schema()).expect("JSON") + "\n";
        if std::env::var_os("KILN_REGENERATE").is_some() {
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("make the folder");
            std::fs::write(&path, &wanted).expect("write");
        }
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(found == wanted, "{} is stale: run `just generate`", path.display());
    }
}
