//! What a plugin's description looks like as JSON, for authors in other languages; `layout.rs` says how it is written anew.
#![expect(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test"
)]

mod record;

use plugin_api::PluginDescriptor;
use schemars::schema_for;

#[test]
fn recorded_schema_of_descriptions() {
    let schema = serde_json::to_string_pretty(&schema_for!(PluginDescriptor)).unwrap();
    record::compare("include/description.schema.json", &(schema + "\n"));
}
