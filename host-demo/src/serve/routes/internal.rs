//! What ComfyUI's editor and its tools ask about the server itself: its lines, its folders, its files.

use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::super::Server;
use super::super::answer::{bad_request, done, ok};
use super::files::root;
use super::{blocking, either, models};
use crate::console::last_lines;

/// `GET /internal/logs`: the last lines, as one text.
pub(crate) async fn logs() -> Response {
    let lines = last_lines().into_iter();
    let lines: Vec<String> = lines
        .map(|(time, line)| format!("{time} - {line}"))
        .collect();
    ok(&json!(lines.join("\n")))
}

/// `GET /internal/logs/raw`: the last lines with their times.
pub(crate) async fn raw_logs() -> Response {
    let entry = |(time, line): (String, String)| json!({"t": time, "m": format!("{line}\n")});
    let entries: Vec<Value> = last_lines().into_iter().map(entry).collect();
    ok(&json!({"entries": entries, "size": {"cols": 80, "rows": 24}}))
}

/// `PATCH /internal/logs/subscribe`: lines are few, so they are asked for, not sent.
pub(crate) async fn subscribe() -> Response {
    done()
}

/// `GET /internal/folder_paths`: where models of every kind are looked for.
pub(crate) async fn folder_paths(State(server): State<Arc<Server>>) -> Response {
    let folders = blocking(move || {
        let folder = server.folders.models.path();
        let entry = |name: String| {
            let path = json!([folder.join(&name)]);
            (name, path)
        };
        let all: Map<String, Value> = models::folders_of(&server).into_iter().map(entry).collect();
        ok(&Value::Object(all))
    });
    either(folders.await)
}

/// `GET /internal/files/{input, output or temp}`: names in the folder itself, the newest first.
pub(crate) async fn files(State(server): State<Arc<Server>>, Path(kind): Path<String>) -> Response {
    let listed = blocking(move || {
        let Some(root) = root(&server, &kind) else {
            return bad_request("the folder is input, output or temp");
        };
        let entries = std::fs::read_dir(root.path())
            .into_iter()
            .flatten()
            .flatten();
        let mut found: Vec<(SystemTime, String)> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let changed = entry.metadata().ok()?.modified().ok()?;
                (!name.starts_with('.')).then_some((changed, name))
            })
            .collect();
        found.sort_by(|a, b| b.cmp(a));
        ok(&json!(
            found.into_iter().map(|(_, name)| name).collect::<Vec<_>>()
        ))
    });
    either(listed.await)
}
