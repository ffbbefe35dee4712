//! Saved widget values to parameters by name, and back.
//!
//! Newer editors save `widgets_values_named`; older ones only `widgets_values`, in the order of the widgets and with
//! entries of controls that are no parameters: what to do with a seed after a run, the button of an upload.

use plugin_api::{Widget, WidgetKind};
use serde_json::{Map, Value};

use super::editor::EditorNode;

/// What an editor may do with a seed after a run.
const SEED_CONTROLS: [&str; 5] = [
    "fixed",
    "increment",
    "decrement",
    "randomize",
    "increment-wrap",
];
/// What an upload button saves.
const UPLOAD: &str = "image";

/// The node's parameters by name, as far as they were saved.
pub(super) fn named_values(node: &EditorNode, widgets: &[Widget]) -> Map<String, Value> {
    if let Some(named) = &node.widgets_values_named {
        return known(named, widgets);
    }
    match &node.widgets_values {
        Value::Object(named) => known(named, widgets),
        Value::Array(values) => positions(values, widgets)
            .into_iter()
            .map(|(widget, position)| (widgets[widget].name.clone(), values[position].clone()))
            .collect(),
        _ => Map::new(),
    }
}

fn known(named: &Map<String, Value>, widgets: &[Widget]) -> Map<String, Value> {
    let value = |widget: &Widget| Some((widget.name.clone(), named.get(&widget.name)?.clone()));
    widgets.iter().filter_map(value).collect()
}

/// Pairs of widget and position in the list of saved values.
fn positions(values: &[Value], widgets: &[Widget]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    let mut position = 0;
    for (i, widget) in widgets.iter().enumerate() {
        let surplus = values.len().saturating_sub(position) > widgets.len() - i;
        if surplus && is_upload_entry(&values[position], widget) {
            position += 1;
        }
        if position >= values.len() {
            break;
        }
        pairs.push((i, position));
        position += 1;
        let is_seed = matches!(widget.kind, WidgetKind::Integer { seed: true, .. });
        if is_seed
            && values
                .get(position)
                .and_then(Value::as_str)
                .is_some_and(|v| SEED_CONTROLS.contains(&v))
        {
            position += 1;
        }
    }
    pairs
}

/// An upload button's entry stands where the widget could not have saved it.
fn is_upload_entry(value: &Value, widget: &Widget) -> bool {
    value.as_str() == Some(UPLOAD) && widget.check(value).is_some()
}

/// Writes a changed value where the editor reads it. Nodes inside of subgraphs are left as they are.
pub(super) fn set_in_document(
    document: &mut Value,
    id: &str,
    name: &str,
    value: &Value,
    widgets: &[Widget],
) {
    let Some(nodes) = document.get_mut("nodes").and_then(Value::as_array_mut) else {
        return;
    };
    let has_id = |node: &&mut Value| {
        node.get("id")
            .is_some_and(|own| super::editor::id_text(own) == id)
    };
    let Some(node) = nodes.iter_mut().find(has_id) else {
        return;
    };
    if let Some(named) = node
        .get_mut("widgets_values_named")
        .and_then(Value::as_object_mut)
    {
        named.insert(name.to_owned(), value.clone());
    }
    match node.get_mut("widgets_values") {
        Some(Value::Object(named)) => {
            named.insert(name.to_owned(), value.clone());
        }
        Some(Value::Array(values)) => {
            let place = positions(values, widgets)
                .into_iter()
                .find(|(widget, _)| widgets[*widget].name == name);
            if let Some((_, position)) = place {
                values[position] = value.clone();
            }
        }
        _ => {}
    }
}
