//! A job that ended, as the lists of the past show it. Kept as text: parsed JSON takes ten times the memory.

use serde_json::{Map, Value, json};

use super::job::Job;

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Completed,
    Failed,
    Canceled,
}

impl Outcome {
    /// As `/jobs` names it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Canceled => "cancelled",
        }
    }
}

/// What came of a job.
#[derive(Debug, Default)]
pub(crate) struct Results {
    /// What its nodes show, by node id.
    pub(crate) outputs: Map<String, Value>,
    /// `[event, data]`.
    pub(crate) messages: Vec<Value>,
    /// Milliseconds since 1970.
    pub(crate) started_ms: u64,
    pub(crate) ended_ms: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) id: String,
    pub(crate) outcome: Outcome,
    /// Whether it was begun.
    pub(crate) has_run: bool,
    /// `{"prompt", "outputs", "status", "meta"}`.
    pub(crate) history_entry: Box<str>,
    /// The entry of `/jobs`.
    pub(crate) job_entry: Box<str>,
}

impl Ended {
    /// What it takes in memory, about.
    pub(crate) fn bytes(&self) -> usize {
        self.history_entry.len() + self.job_entry.len()
    }

    pub(crate) fn new(job: &Job, outcome: Outcome, results: &Results) -> Self {
        let is_complete = outcome == Outcome::Completed;
        let text = if is_complete { "success" } else { "error" };
        let status =
            json!({"status_str": text, "completed": is_complete, "messages": results.messages});
        let history = json!({"prompt": job.tuple(), "outputs": results.outputs, "status": status, "meta": {}});
        Self {
            id: job.id.clone(),
            outcome,
            has_run: true,
            history_entry: history.to_string().into(),
            job_entry: job_entry(job, outcome, results).to_string().into(),
        }
    }
}

fn job_entry(job: &Job, outcome: Outcome, results: &Results) -> Value {
    let mut entry = job.entry(outcome.name());
    entry["execution_start_time"] = json!(results.started_ms);
    entry["execution_end_time"] = json!(results.ended_ms);
    let pictures = pictures(&results.outputs);
    entry["outputs_count"] = json!(pictures.len());
    entry["previewable_outputs_count"] = json!(pictures.len());
    if let Some(last) = pictures.last() {
        entry["preview_output"] = last.clone();
    }
    let failed = |message: &&Value| message[0] == "execution_error";
    if let Some(error) = results.messages.iter().find(failed) {
        entry["execution_error"] = error[1].clone();
    }
    entry
}

fn pictures(outputs: &Map<String, Value>) -> Vec<Value> {
    let mut found = Vec::new();
    for (node, output) in outputs {
        for image in output["images"].as_array().into_iter().flatten() {
            let mut image = image.clone();
            image["nodeId"] = json!(node);
            image["mediaType"] = json!("images");
            found.push(image);
        }
    }
    // What was saved counts more than what was only shown.
    found.sort_by_key(|image| image["type"] == "output");
    found
}
