//! Descriptors as ComfyUI's `/object_info` document, which its editor and its clients read.

use plugin_api::{InputSocket, NodeDescriptor, OutputSocket, Widget, WidgetKind};
use serde_json::{Map, Value, json};

/// The entry of a class; `pack` is the plugin's name.
pub(crate) fn class(descriptor: &NodeDescriptor, pack: &str) -> Value {
    let entries = |optional: bool| -> Map<String, Value> {
        descriptor
            .inputs
            .iter()
            .filter(|input| input.optional == optional)
            .map(|input| (input.name.clone(), socket(input)))
            .collect()
    };
    let (mut required, optional) = (entries(false), entries(true));
    let widgets = descriptor.widgets.iter();
    required.extend(widgets.map(|one| (one.name.clone(), widget(one, paints(descriptor)))));
    let names = |map: &Map<String, Value>| map.keys().cloned().collect::<Vec<_>>();
    let outputs = |field: fn(&OutputSocket) -> &String| {
        descriptor.outputs.iter().map(field).collect::<Vec<_>>()
    };
    json!({
        "input_order": {"required": names(&required), "optional": names(&optional)},
        "input": {"required": required, "optional": optional},
        "output": outputs(|socket| &socket.port),
        "output_is_list": vec![false; descriptor.outputs.len()],
        "output_name": outputs(|socket| &socket.name),
        "output_tooltips": outputs(|socket| &socket.tooltip),
        "name": descriptor.class,
        "display_name": descriptor.display_name,
        "description": descriptor.description,
        "python_module": format!("custom_nodes.{pack}"),
        "category": descriptor.category,
        "output_node": descriptor.output_node,
        "search_aliases": descriptor.search_aliases,
        "deprecated": false,
        "experimental": false,
        "is_input_list": false,
    })
}

/// What the document says of one input, a socket's or a parameter's.
pub(crate) fn input(descriptor: &NodeDescriptor, name: &str) -> Option<Value> {
    let of_socket = descriptor.inputs.iter().find(|input| input.name == name);
    let of_widget = || descriptor.widgets.iter().find(|input| input.name == name);
    let of_widget = || of_widget().map(|one| widget(one, paints(descriptor)));
    of_socket.map(socket).or_else(of_widget)
}

/// Whether a node gives pictures and nothing that was learned.
fn paints(descriptor: &NodeDescriptor) -> bool {
    let mut outputs = descriptor.outputs.iter();
    outputs.all(|output| ["IMAGE", "MASK"].contains(&output.port.as_str()))
}

fn socket(socket: &InputSocket) -> Value {
    json!([socket.port, {"tooltip": socket.tooltip}])
}

/// `[type, options]`. Pictures are wanted anew after every run: `changes_seed`. What is learned goes on after a stop with the same
/// seed only, so that no editor is to change it by itself.
fn widget(widget: &Widget, changes_seed: bool) -> Value {
    let (kind, mut options) = match &widget.kind {
        WidgetKind::Integer {
            default,
            min,
            max,
            seed,
        } => {
            let mut options = json!({"default": default, "min": min, "max": max, "step": 1});
            if *seed {
                // Where nothing is said, editors change what is called seed.
                options["control_after_generate"] = json!(changes_seed);
            }
            ("INT", options)
        }
        WidgetKind::Float {
            default,
            min,
            max,
            step,
        } => (
            "FLOAT",
            json!({"default": default, "min": min, "max": max, "step": step, "round": false}),
        ),
        WidgetKind::Text { default, multiline } => (
            "STRING",
            json!({"default": default, "multiline": multiline}),
        ),
        WidgetKind::Boolean { default } => ("BOOLEAN", json!({"default": default})),
        WidgetKind::Choice {
            default, options, ..
        } => ("COMBO", json!({"default": default, "options": options})),
    };
    if !widget.tooltip.is_empty() {
        options["tooltip"] = json!(widget.tooltip);
    }
    json!([kind, options])
}
