//! What waits, runs and ended: the older form (`/queue`, `/history`) and the newer (`/jobs`).

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::super::Server;
use super::super::queue::{Ended, Job, Outcome, Running};
use super::{done, json_body, not_found, ok};

/// `GET /queue`.
pub(crate) async fn queue(State(server): State<Arc<Server>>) -> Response {
    let waiting = server.queue.waiting();
    let running: Vec<_> = server
        .queue
        .running()
        .iter()
        .map(|running| running.job.tuple())
        .collect();
    let is_paused = waiting.iter().any(|job| job.is_held);
    let pending: Vec<_> = waiting.iter().map(Job::tuple).collect();
    ok(&json!({"queue_running": running, "queue_pending": pending, "paused": is_paused}))
}

/// `POST /queue {"clear", "delete", "resume"}`.
pub(crate) async fn change_queue(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    if is_set(&body, "clear") {
        server.queue.remove_waiting(|_| true);
    }
    let ids = names(&body, "delete");
    if !ids.is_empty() {
        server.queue.remove_waiting(|job| ids.contains(&job.id));
    }
    if is_set(&body, "resume") {
        server.queue.resume();
    }
    server.tell_status();
    done()
}

/// `POST /interrupt {"prompt_id"?}`.
pub(crate) async fn interrupt(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    server
        .queue
        .interrupt(body.get("prompt_id").and_then(Value::as_str));
    done()
}

/// `POST /free {"unload_models", "free_memory"}`.
pub(crate) async fn free(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    if is_set(&body, "unload_models") || is_set(&body, "free_memory") {
        server.queue.free_cache();
    }
    done()
}

fn is_set(body: &Map<String, Value>, key: &str) -> bool {
    body.get(key).and_then(Value::as_bool).unwrap_or_default()
}

fn names(body: &Map<String, Value>, key: &str) -> Vec<String> {
    let list = body
        .get(key)
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

fn number(query: &HashMap<String, String>, key: &str) -> Option<usize> {
    query.get(key)?.parse().ok()
}

/// `GET /history?max_items&offset`: oldest first.
pub(crate) async fn history(
    State(server): State<Arc<Server>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let ended = server.queue.history();
    let count = number(&query, "max_items")
        .unwrap_or(ended.len())
        .min(ended.len());
    let offset = number(&query, "offset").unwrap_or(ended.len() - count);
    let shown = ended.iter().skip(offset).take(count);
    let entries: Map<_, _> = shown
        .map(|ended| (ended.job.id.clone(), history_entry(ended)))
        .collect();
    ok(&Value::Object(entries))
}

/// `GET /history/{id}`: an empty object while it is not there.
pub(crate) async fn history_of(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
) -> Response {
    let found = server
        .queue
        .history()
        .into_iter()
        .find(|ended| ended.job.id == id);
    let entry = found.map(|ended| (id, history_entry(&ended)));
    ok(&Value::Object(entry.into_iter().collect()))
}

/// `POST /history {"clear", "delete"}`.
pub(crate) async fn change_history(
    State(server): State<Arc<Server>>,
    request: Request,
) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let (all, ids) = (is_set(&body, "clear"), names(&body, "delete"));
    server
        .queue
        .forget(|ended| all || ids.contains(&ended.job.id));
    done()
}

fn status_of(ended: &Ended) -> Value {
    let is_complete = ended.outcome == Outcome::Completed;
    let text = if is_complete { "success" } else { "error" };
    json!({"status_str": text, "completed": is_complete, "messages": ended.messages})
}

fn history_entry(ended: &Ended) -> Value {
    json!({"prompt": ended.job.tuple(), "outputs": ended.outputs, "status": status_of(ended), "meta": {}})
}

/// A job of any state.
enum Any {
    Waiting(Job),
    Running(Running),
    Ended(Arc<Ended>),
}

impl Any {
    fn all(server: &Server) -> Vec<Self> {
        let mut all: Vec<_> = server
            .queue
            .running()
            .into_iter()
            .map(Self::Running)
            .collect();
        all.extend(server.queue.waiting().into_iter().map(Self::Waiting));
        all.extend(server.queue.history().into_iter().rev().map(Self::Ended));
        all
    }

    fn job(&self) -> &Job {
        match self {
            Self::Waiting(job) => job,
            Self::Running(running) => &running.job,
            Self::Ended(ended) => &ended.job,
        }
    }

    fn status(&self) -> &'static str {
        match self {
            Self::Waiting(_) => "pending",
            Self::Running(_) => "in_progress",
            Self::Ended(ended) => match ended.outcome {
                Outcome::Completed => "completed",
                Outcome::Failed => "failed",
                Outcome::Canceled => "cancelled",
            },
        }
    }

    /// As it stands in lists.
    fn entry(&self) -> Value {
        let job = self.job();
        let workflow_id = job.extra_data.pointer("/extra_pnginfo/workflow/id");
        let mut entry = json!({
            "id": job.id, "status": self.status(), "priority": job.number, "create_time": job.created_ms,
            "outputs_count": null,
        });
        if let Some(id) = workflow_id.filter(|id| id.is_string()) {
            entry["workflow_id"] = id.clone();
        }
        match self {
            Self::Waiting(job) => entry["paused"] = json!(job.is_held),
            Self::Running(running) => entry["execution_start_time"] = json!(running.started_ms),
            Self::Ended(ended) => {
                entry["execution_start_time"] = json!(ended.started_ms);
                entry["execution_end_time"] = json!(ended.ended_ms);
                let pictures = pictures(ended);
                entry["outputs_count"] = json!(pictures.len());
                entry["previewable_outputs_count"] = json!(pictures.len());
                if let Some(last) = pictures.last() {
                    entry["preview_output"] = last.clone();
                }
                if let Some(error) = error_of(ended) {
                    entry["execution_error"] = error;
                }
            }
        }
        entry
    }
}

fn pictures(ended: &Ended) -> Vec<Value> {
    let mut found = Vec::new();
    for (node, output) in &ended.outputs {
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

fn error_of(ended: &Ended) -> Option<Value> {
    let found = ended
        .messages
        .iter()
        .find(|message| message[0] == "execution_error");
    found.map(|message| message[1].clone())
}

/// `GET /jobs?status&limit&offset&workflow_id&sort_order`.
pub(crate) async fn list(
    State(server): State<Arc<Server>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let wanted: Vec<_> = query
        .get("status")
        .map(|list| list.split(',').collect())
        .unwrap_or_default();
    let mut entries: Vec<_> = Any::all(&server)
        .iter()
        .filter(|any| wanted.is_empty() || wanted.contains(&any.status()))
        .map(Any::entry)
        .filter(|entry| {
            query
                .get("workflow_id")
                .is_none_or(|id| entry["workflow_id"] == id.as_str())
        })
        .collect();
    if query.get("sort_order").is_some_and(|order| order == "asc") {
        entries.reverse();
    }
    let total = entries.len();
    let offset = number(&query, "offset").unwrap_or(0);
    let limit = number(&query, "limit").unwrap_or(total);
    let shown: Vec<_> = entries.into_iter().skip(offset).take(limit).collect();
    let has_more = offset + shown.len() < total;
    ok(&json!({
        "jobs": shown,
        "pagination": {"offset": offset, "limit": limit, "total": total, "has_more": has_more},
    }))
}

/// `GET /jobs/{id}`.
pub(crate) async fn detail(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    let Some(any) = Any::all(&server).into_iter().find(|any| any.job().id == id) else {
        return not_found(&format!("there is no job {id}"));
    };
    let mut entry = any.entry();
    let job = any.job();
    entry["workflow"] = json!({"prompt": job.prompt, "extra_data": job.extra_data});
    if let Any::Ended(ended) = &any {
        entry["outputs"] = Value::Object(ended.outputs.clone());
        entry["execution_status"] = status_of(ended);
    }
    ok(&entry)
}

fn cancel_one(server: &Server, id: &str) -> bool {
    server.queue.interrupt(Some(id)) || server.queue.remove_waiting(|job| job.id == id) > 0
}

/// `POST /jobs/{id}/cancel`.
pub(crate) async fn cancel(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    let canceled = cancel_one(&server, &id);
    server.tell_status();
    ok(&json!({"cancelled": canceled}))
}

/// `POST /jobs/cancel {"job_ids"}`.
pub(crate) async fn cancel_many(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let canceled = names(&body, "job_ids")
        .iter()
        .filter(|id| cancel_one(&server, id))
        .count();
    server.tell_status();
    ok(&json!({"cancelled": canceled > 0}))
}
