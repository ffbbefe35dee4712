//! A job, as it is queued, kept in the journal and listed.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What a client asked to be run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Job {
    /// A UUID.
    pub(crate) id: String,
    /// Lower numbers run first.
    pub(crate) number: f64,
    /// Who is told; everybody if empty.
    pub(crate) client_id: String,
    /// The graph in its API form.
    pub(crate) prompt: Value,
    /// What came with it, among it the editor's document.
    pub(crate) extra_data: Value,
    /// The output nodes that run.
    pub(crate) outputs: Vec<String>,
    /// When it was accepted.
    pub(crate) created_ms: u64,
    /// Left over from a crash: waits until somebody says so.
    #[serde(skip)]
    pub(crate) is_held: bool,
}

/// A job's number as clients expect it: an integer where it is whole.
pub(crate) fn number_json(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 {
        json!(number as i64)
    } else {
        json!(number)
    }
}

impl Job {
    /// As it stands in `/jobs`.
    pub(crate) fn entry(&self, status: &str) -> Value {
        let mut entry = json!({
            "id": self.id, "status": status, "priority": number_json(self.number), "create_time": self.created_ms,
            "outputs_count": null,
        });
        let workflow_id = self.extra_data.pointer("/extra_pnginfo/workflow/id");
        if let Some(id) = workflow_id.filter(|id| id.is_string()) {
            entry["workflow_id"] = id.clone();
        }
        entry
    }

    /// `[number, id, prompt, extra_data, outputs]`.
    pub(crate) fn tuple(&self) -> Value {
        json!([
            number_json(self.number),
            self.id,
            self.prompt,
            self.extra_data,
            self.outputs
        ])
    }
}
