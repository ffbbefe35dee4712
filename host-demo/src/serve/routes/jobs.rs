//! What waits, runs and ended: the older form (`/queue`, `/history`) and the newer (`/jobs`).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::super::Server;
use super::super::answer::{done, json_text, not_found, ok};
use super::super::ended::Ended;
use super::super::job::Job;
use super::super::queue::Jobs;
use super::{blocking, either, json_body};

/// `GET /queue`.
pub(crate) async fn queue(State(server): State<Arc<Server>>) -> Response {
    // One job at a time: parsed JSON takes ten times the memory of text.
    let texts = |jobs: &mut dyn Iterator<Item = Arc<Job>>| {
        let texts = jobs.map(|job| job.tuple().to_string());
        texts.collect::<Vec<_>>().join(",")
    };
    let jobs = server.queue.jobs();
    let running = texts(&mut jobs.running.map(|running| running.job).into_iter());
    let pending = texts(&mut jobs.waiting.into_iter());
    json_text(format!(
        "{{\"queue_running\":[{running}],\"queue_pending\":[{pending}]}}"
    ))
}

/// `POST /queue {"clear", "delete", "resume"}`.
pub(crate) async fn change_queue(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let (all, ids) = (is_set(&body, "clear"), names(&body, "delete"));
    let changed = blocking(move || {
        server
            .queue
            .remove_waiting(|job| all || ids.contains(&job.id));
        if is_set(&body, "resume") {
            server.queue.resume();
        }
        server.tell_status();
        done()
    });
    either(changed.await)
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

fn names(body: &Map<String, Value>, key: &str) -> HashSet<String> {
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
    json_text(history_text(shown.map(AsRef::as_ref)))
}

/// `GET /history/{id}`: an empty object while it is not there.
pub(crate) async fn history_of(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
) -> Response {
    let ended = server.queue.history();
    let found = ended.iter().filter(|ended| ended.id == id);
    json_text(history_text(found.map(AsRef::as_ref)))
}

fn history_text<'a>(ended: impl Iterator<Item = &'a Ended>) -> String {
    let entries: Vec<_> = ended
        .map(|ended| format!("{}:{}", json!(ended.id), ended.history_entry))
        .collect();
    format!("{{{}}}", entries.join(","))
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
    server.queue.forget(|ended| all || ids.contains(&ended.id));
    done()
}

/// What waits and runs, as it stands in `/jobs`: running first, then next first.
fn unfinished(jobs: &Jobs) -> impl Iterator<Item = (&'static str, &Job, Value)> {
    let running = jobs.running.iter().map(|running| {
        let mut entry = running.job.entry("in_progress");
        entry["execution_start_time"] = json!(running.started_ms);
        ("in_progress", &*running.job, entry)
    });
    let waiting = jobs.waiting.iter().map(|job| {
        let mut entry = job.entry("pending");
        entry["paused"] = json!(job.is_held);
        ("pending", &**job, entry)
    });
    running.chain(waiting)
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
    let is_wanted = |status: &str| wanted.is_empty() || wanted.contains(&status);
    let jobs = server.queue.jobs();
    let mut entries: Vec<String> = unfinished(&jobs)
        .filter(|(status, ..)| is_wanted(status))
        .map(|(_, _, entry)| entry.to_string())
        .collect();
    let newest_first = jobs.ended.iter().rev();
    entries.extend(
        newest_first
            .filter(|ended| is_wanted(ended.outcome.name()))
            .map(|ended| ended.job_entry.to_string()),
    );
    if let Some(id) = query.get("workflow_id") {
        let of_workflow = |entry: &String| {
            serde_json::from_str::<Value>(entry).is_ok_and(|entry| entry["workflow_id"] == **id)
        };
        entries.retain(of_workflow);
    }
    if query.get("sort_order").is_some_and(|order| order == "asc") {
        entries.reverse();
    }
    let total = entries.len();
    let offset = number(&query, "offset").unwrap_or(0);
    let limit = number(&query, "limit").unwrap_or(total);
    let shown: Vec<_> = entries.into_iter().skip(offset).take(limit).collect();
    let has_more = offset + shown.len() < total;
    let pagination =
        json!({"offset": offset, "limit": limit, "total": total, "has_more": has_more});
    json_text(format!(
        "{{\"jobs\":[{}],\"pagination\":{pagination}}}",
        shown.join(",")
    ))
}

/// `GET /jobs/{id}`.
pub(crate) async fn detail(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    let workflow = |prompt: &Value, extra: &Value| json!({"prompt": prompt, "extra_data": extra});
    let jobs = server.queue.jobs();
    if let Some((_, job, mut entry)) = unfinished(&jobs).find(|(_, job, _)| job.id == id) {
        entry["workflow"] = workflow(&job.prompt, &job.extra_data);
        return ok(&entry);
    }
    let Some(ended) = jobs.ended.iter().find(|ended| ended.id == id) else {
        return not_found(&format!("there is no job {id}"));
    };
    let parsed = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let (mut entry, history) = (parsed(&ended.job_entry), parsed(&ended.history_entry));
    entry["workflow"] = workflow(&history["prompt"][2], &history["prompt"][3]);
    entry["outputs"] = history["outputs"].clone();
    entry["execution_status"] = history["status"].clone();
    ok(&entry)
}

/// Stops jobs that run or wait; whether there was one.
async fn cancel_those(server: Arc<Server>, ids: HashSet<String>) -> Response {
    let canceled = blocking(move || {
        let is_canceled = server.queue.cancel(&ids);
        server.tell_status();
        ok(&json!({"cancelled": is_canceled}))
    });
    either(canceled.await)
}

/// `POST /jobs/{id}/cancel`.
pub(crate) async fn cancel(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    cancel_those(server, HashSet::from([id])).await
}

/// `POST /jobs/cancel {"job_ids"}`.
pub(crate) async fn cancel_many(State(server): State<Arc<Server>>, request: Request) -> Response {
    let body = match json_body(request).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    cancel_those(server, names(&body, "job_ids")).await
}
