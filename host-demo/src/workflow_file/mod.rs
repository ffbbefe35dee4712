//! Workflow files: what ComfyUI's editor saves (format 0.4 and 1), what its API takes, and pictures with one inside.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `mod` | reading, limits, telling the formats apart, changing a value |
//! | `editor` | the editor's document as typed data |
//! | `flatten` | subgraphs, reroutes, muted and bypassed nodes to plain links |
//! | `widgets` | saved widget values to parameters by name |
//!
//! Unknown keys are kept: the document is written back as it was read, with changed values only.

mod editor;
mod flatten;
mod widgets;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use plugin_api::{Widget, WidgetKind};
use serde_json::{Value, json};

use crate::bounded_file::{self, ReadError};
use crate::catalog::Catalog;
use crate::graph::{Graph, Input, NodeId};
use crate::png_text;
use crate::validate::{Problem, protocol_code};

/// Largest file that is read, and the largest picture.
const MAX_BYTES: u64 = 16 << 20;
const MAX_PICTURE_BYTES: u64 = 256 << 20;
/// Most nodes of a graph, subgraphs counted as often as they are used.
pub(crate) const MAX_NODES: usize = 4096;

/// Why a workflow file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkflowError {
    #[error("there is no workflow {}; name a file that ComfyUI saved, .json or .png", .0.display())]
    Missing(PathBuf),
    #[error("cannot read the workflow {}: {error}", path.display())]
    Unreadable {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("the workflow {} has {bytes} bytes, at most {most} are read", path.display())]
    TooLarge {
        path: PathBuf,
        bytes: u64,
        most: u64,
    },
    #[error(
        "{name} is a picture and holds no workflow; PNG files that ComfyUI or host-demo saved hold one, unless metadata \
         was turned off or another program saved them again"
    )]
    PlainPicture { name: String },
    #[error("the workflow {name} is no JSON: {error}")]
    NotJson {
        name: String,
        error: serde_json::Error,
    },
    #[error(
        "the file {name} is no workflow: expected what ComfyUI saves (\"nodes\" and \"links\") or its API format \
         (\"class_type\" in every entry)"
    )]
    NotAWorkflow { name: String },
    #[error("the workflow {name} cannot be read: {reason}")]
    Malformed { name: String, reason: String },
    #[error("the workflow {name} has more than {MAX_NODES} nodes")]
    TooManyNodes { name: String },
}

/// A workflow: the graph that runs, and the document that an editor opens.
#[derive(Debug, Clone)]
pub(crate) struct Workflow {
    /// File name without its extension.
    pub(crate) name: String,
    /// Pictures are looked for beside the file.
    pub(crate) dir: PathBuf,
    /// The editor's document, if the file was one.
    pub(crate) editor: Option<Value>,
    /// What runs.
    pub(crate) graph: Graph,
}

impl Workflow {
    /// Reads a file; `catalog` tells which widgets its nodes have.
    ///
    /// # Errors
    /// See [`WorkflowError`].
    pub(crate) fn read(path: &Path, catalog: &Catalog) -> Result<Self, WorkflowError> {
        let unreadable = |error: std::io::Error| match error.kind() {
            ErrorKind::NotFound => WorkflowError::Missing(path.to_owned()),
            _ => WorkflowError::Unreadable {
                path: path.to_owned(),
                error,
            },
        };
        let is_png = path
            .extension()
            .is_some_and(|extension| extension.eq_ignore_ascii_case("png"));
        let most = if is_png { MAX_PICTURE_BYTES } else { MAX_BYTES };
        let bytes = bounded_file::read(path, most).map_err(|error| match error {
            ReadError::TooLarge(bytes) => WorkflowError::TooLarge {
                path: path.to_owned(),
                bytes,
                most,
            },
            ReadError::System(error) => unreadable(error),
        })?;
        let dir = path
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        let mut workflow = Self::parse(&path.display().to_string(), &bytes, catalog)?;
        workflow.name = path
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        workflow.dir = dir.to_owned();
        Ok(workflow)
    }

    /// Reads a document; `name` is what errors call it.
    ///
    /// # Errors
    /// See [`WorkflowError`].
    pub(crate) fn parse(
        name: &str,
        bytes: &[u8],
        catalog: &Catalog,
    ) -> Result<Self, WorkflowError> {
        let inside = match image::guess_format(bytes) {
            Ok(_) => {
                Some(
                    png_text::workflow(bytes).ok_or_else(|| WorkflowError::PlainPicture {
                        name: name.to_owned(),
                    })?,
                )
            }
            Err(_) => None,
        };
        let bytes = inside.as_deref().map_or(bytes, str::as_bytes);
        let document = lenient_json::from_slice(bytes).map_err(|error| WorkflowError::NotJson {
            name: name.to_owned(),
            error,
        })?;
        Self::of_document(name, document, catalog)
    }

    /// What a document describes; `name` is what errors call it.
    ///
    /// # Errors
    /// See [`WorkflowError`].
    pub(crate) fn of_document(
        name: &str,
        document: Value,
        catalog: &Catalog,
    ) -> Result<Self, WorkflowError> {
        let malformed = |reason| WorkflowError::Malformed {
            name: name.to_owned(),
            reason,
        };
        let (editor, graph) = match Form::of(&document) {
            Some(Form::Editor) => {
                let graph = flatten::graph_of(&document, catalog, MAX_NODES);
                let graph = graph.and_then(|graph| graph.check_ids().map(|()| graph));
                let graph = graph.map_err(malformed)?;
                (Some(document), graph)
            }
            Some(Form::Api(entries)) => (None, Graph::from_api(entries).map_err(malformed)?),
            None => {
                return Err(WorkflowError::NotAWorkflow {
                    name: name.to_owned(),
                });
            }
        };
        if graph.nodes.len() > MAX_NODES {
            return Err(WorkflowError::TooManyNodes {
                name: name.to_owned(),
            });
        }
        Ok(Self {
            name: name.to_owned(),
            dir: PathBuf::from("."),
            editor,
            graph,
        })
    }

    /// What goes into files as `workflow`: the editor's document, or the graph in its API form.
    pub(crate) fn document(&self) -> Value {
        self.editor.clone().unwrap_or_else(|| self.graph.to_api())
    }

    /// Applies one `node.input=value`; `node` is an id, a title or a class that occurs once.
    ///
    /// # Errors
    /// A target that is not there or not unique, or text that is no value of the widget's kind.
    pub(crate) fn set(&mut self, assignment: &str, catalog: &Catalog) -> Result<(), Problem> {
        let wrong = |message: String| Problem::general("invalid_set_target", message);
        let parts = assignment.split_once('=').and_then(|(target, value)| {
            target
                .trim()
                .rsplit_once('.')
                .map(|(node, input)| (node.trim(), input.trim(), value))
        });
        let Some((node, input, text)) = parts else {
            return Err(wrong(format!(
                "--set takes node.input=value, got \"{assignment}\""
            )));
        };
        let id = self.find(node).map_err(&wrong)?;
        let class = self.graph.nodes[&id].class.clone();
        let Some(descriptor) = catalog.descriptor(&class) else {
            return Err(wrong(format!(
                "--set {assignment}: the class {class} of the node {id} is not known"
            )));
        };
        let Some(widget) = descriptor
            .widgets
            .iter()
            .find(|widget| widget.name == input)
        else {
            let known: Vec<_> = descriptor
                .widgets
                .iter()
                .map(|widget| widget.name.as_str())
                .collect();
            let known = if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            };
            return Err(wrong(format!(
                "--set {node}.{input}: {class} has no parameter {input}; its parameters are: {known}"
            )));
        };
        let value = value_of(widget, text);
        if let Some(problem) = widget.check(&value) {
            let code = protocol_code(problem.kind);
            return Err(Problem::of_node(code, &id, &class, problem.message).at(input));
        }
        self.set_value(&id, widget, value, &descriptor.widgets);
        Ok(())
    }

    /// Gives every seed of the workflow the same value.
    pub(crate) fn set_seeds(&mut self, seed: u64, catalog: &Catalog) {
        let ids: Vec<_> = self.graph.nodes.keys().cloned().collect();
        for id in ids {
            let Some(descriptor) = catalog.descriptor(&self.graph.nodes[&id].class) else {
                continue;
            };
            let is_seed =
                |widget: &&Widget| matches!(widget.kind, WidgetKind::Integer { seed: true, .. });
            for widget in descriptor.widgets.iter().filter(is_seed) {
                self.set_value(&id, widget, json!(seed), &descriptor.widgets);
            }
        }
    }

    fn set_value(&mut self, id: &NodeId, widget: &Widget, value: Value, all: &[Widget]) {
        if let Some(editor) = &mut self.editor {
            widgets::set_in_document(editor, id.as_str(), &widget.name, &value, all);
        }
        if let Some(node) = self.graph.nodes.get_mut(id) {
            node.inputs.insert(widget.name.clone(), Input::Value(value));
        }
    }

    fn find(&self, name: &str) -> Result<NodeId, String> {
        let id = NodeId::new(name);
        if self.graph.nodes.contains_key(&id) {
            return Ok(id);
        }
        let named = |by_title: bool| -> Vec<&NodeId> {
            let matches = |(_, node): &(&NodeId, &crate::graph::GraphNode)| {
                if by_title {
                    node.title == name
                } else {
                    node.class == name
                }
            };
            self.graph
                .nodes
                .iter()
                .filter(matches)
                .map(|(id, _)| id)
                .collect()
        };
        let by_class = named(false);
        let found = if by_class.is_empty() {
            named(true)
        } else {
            by_class
        };
        match found[..] {
            [id] => Ok(id.clone()),
            [] => {
                let known: Vec<_> = self
                    .graph
                    .nodes
                    .iter()
                    .map(|(id, node)| format!("{id} ({})", node.class))
                    .collect();
                Err(format!(
                    "--set: the workflow has no node \"{name}\"; its nodes are: {}",
                    known.join(", ")
                ))
            }
            ref several => {
                let ids: Vec<_> = several.iter().map(ToString::to_string).collect();
                Err(format!(
                    "--set: \"{name}\" means several nodes; use one of the ids {}",
                    ids.join(", ")
                ))
            }
        }
    }
}

/// Text of the command line as a value of the widget's kind; text that is none stays text, for the check to name it.
fn value_of(widget: &Widget, text: &str) -> Value {
    match widget.kind {
        WidgetKind::Text { .. } | WidgetKind::Choice { .. } => json!(text),
        WidgetKind::Integer { .. } | WidgetKind::Float { .. } | WidgetKind::Boolean { .. } => {
            serde_json::from_str(text.trim()).unwrap_or_else(|_| json!(text))
        }
    }
}

enum Form<'a> {
    Editor,
    Api(&'a serde_json::Map<String, Value>),
}

/// Whether this is the editor's document, not its API form.
pub(crate) fn is_editors(document: &Value) -> bool {
    document.get("nodes").is_some_and(Value::is_array)
}

impl<'a> Form<'a> {
    fn of(document: &'a Value) -> Option<Self> {
        let object = document.as_object()?;
        if is_editors(document) {
            return Some(Self::Editor);
        }
        // What is posted to a server carries the graph inside.
        let entries = object
            .get("prompt")
            .and_then(Value::as_object)
            .unwrap_or(object);
        let is_node = |entry: &Value| entry.get("class_type").is_some();
        (!entries.is_empty() && entries.values().any(is_node)).then_some(Self::Api(entries))
    }
}

#[cfg(test)]
mod tests;
