//! Checkpoints, embeddings and LoRA in the server's folder of models: listed for clients that ask.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path as FilePath;
use std::sync::Arc;

use axum::extract::{Path, Query, State};
use axum::response::Response;
use serde_json::{Value, json};

use super::super::Server;
use super::super::answer::{not_found, ok};
use super::files::FileFacts;
use super::info::files_in;
use super::{blocking, either};
use crate::confined::Root;

/// Largest header of a safetensors file, as the format has it.
const MAX_HEADER: u64 = 100_000_000;

/// `GET /embeddings`: names of learned tokens, without their ending.
pub(crate) async fn embeddings(State(server): State<Arc<Server>>) -> Response {
    let names = blocking(move || {
        let folder = server.folders.models.place("embeddings").ok();
        let root = folder.and_then(|folder| Root::create(&folder).ok());
        root.map(|root| files_in(&root, &["safetensors"]))
            .unwrap_or_default()
    });
    let stem = |name: &String| name.trim_end_matches(".safetensors").to_owned();
    either(
        names
            .await
            .map(|names| ok(&json!(names.iter().map(stem).collect::<Vec<_>>()))),
    )
}

/// Kinds of models.
pub(super) fn folders_of(server: &Server) -> Vec<String> {
    let mut names = vec![
        "checkpoints".to_owned(),
        "embeddings".to_owned(),
        "loras".to_owned(),
    ];
    for entry in std::fs::read_dir(server.folders.models.path())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// `GET /models`.
pub(crate) async fn kinds(State(server): State<Arc<Server>>) -> Response {
    either(blocking(move || ok(&json!(folders_of(&server)))).await)
}

/// `GET /experiment/models`.
pub(crate) async fn folders(State(server): State<Arc<Server>>) -> Response {
    let folders = blocking(move || {
        let entry = |name: &String| json!({"name": name, "folders": [server.folders.models.path().join(name)]});
        ok(&json!(
            folders_of(&server).iter().map(entry).collect::<Vec<_>>()
        ))
    });
    either(folders.await)
}

/// `GET /models/{folder}`.
pub(crate) async fn in_folder(
    State(server): State<Arc<Server>>,
    Path(folder): Path<String>,
) -> Response {
    let listed = blocking(move || match root_of(&server, &folder) {
        Some(root) => ok(&json!(files_in(&root, &["safetensors"]))),
        None => not_found(&format!("there is no folder of models {folder}")),
    });
    either(listed.await)
}

/// `GET /experiment/models/{folder}`: names with sizes and times.
pub(crate) async fn with_times(
    State(server): State<Arc<Server>>,
    Path(folder): Path<String>,
) -> Response {
    let listed = blocking(move || {
        let Some(root) = root_of(&server, &folder) else {
            return not_found(&format!("there is no folder of models {folder}"));
        };
        let entry = |name: String| {
            let about = FileFacts::of(&root.path().join(&name));
            let seconds = |ms: u64| ms as f64 / 1000.0;
            json!({
                "name": name, "pathIndex": 0, "size": about.size, "modified": seconds(about.modified_ms),
                "created": seconds(about.created_ms),
            })
        };
        let names = files_in(&root, &["safetensors"]).into_iter();
        ok(&json!(names.map(entry).collect::<Vec<_>>()))
    });
    either(listed.await)
}

/// The folder of a kind of models; an empty one is made.
fn root_of(server: &Server, folder: &str) -> Option<Root> {
    if !folders_of(server).iter().any(|known| known == folder) {
        return None;
    }
    Root::create(&server.folders.models.place(folder).ok()?).ok()
}

/// `GET /view_metadata/{folder}?filename=`: what a file of weights says of itself.
pub(crate) async fn metadata(
    State(server): State<Arc<Server>>,
    Path(folder): Path<String>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let found = blocking(move || {
        let filename = query
            .get("filename")
            .map(String::as_str)
            .unwrap_or_default();
        let missing = || not_found(&format!("{folder} holds no metadata of \"{filename}\""));
        let path = root_of(&server, &folder).and_then(|root| root.file(filename).ok());
        match path.and_then(|path| metadata_of(&path)) {
            Some(metadata) => ok(&metadata),
            None => missing(),
        }
    });
    either(found.await)
}

/// `__metadata__` of a safetensors file.
fn metadata_of(path: &FilePath) -> Option<Value> {
    let mut file = File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return None;
    }
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header).ok()?;
    let header: Value = serde_json::from_slice(&header).ok()?;
    header.get("__metadata__").cloned()
}
