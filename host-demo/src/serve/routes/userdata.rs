//! The user's own files, above all saved workflows.

use std::collections::HashMap;
use std::io;
use std::path::Path as FilePath;
use std::path::PathBuf;
use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use durable_files::disk;
use hyper::ext::ReasonPhrase;
use serde_json::{Value, json};

use super::super::Server;
use super::super::answer::{bad_request, cannot_write, not_found, ok, refuse};
use super::super::folders::{write_new, write_over};
use super::super::settings::FILE as SETTINGS;
use super::files::FileFacts;
use super::{blocking, body, either};
use crate::confined::{PathError, Root};

/// All that the editor shows of a name that is refused.
const NO_NAME: &[u8] = b"No name for a file; leave out : and backslashes";
/// Largest file.
const MAX_FILE: usize = 32 << 20;
/// Most files that are listed.
const MAX_LISTED: usize = 10_000;

fn refuse_path(error: &PathError) -> Response {
    match error {
        PathError::NotFound(_) => not_found(&error.to_string()),
        PathError::NotRelative(_) | PathError::Reserved(_) => {
            let mut refusal = bad_request(&error.to_string());
            let reason = ReasonPhrase::from_static(NO_NAME);
            refusal.extensions_mut().insert(reason);
            refusal
        }
        PathError::Outside(_) | PathError::Unreadable(..) => {
            refuse(StatusCode::FORBIDDEN, "forbidden", &error.to_string())
        }
    }
}

/// Refuses the settings, which have requests of their own.
fn spare_settings(user: &Root, path: &FilePath) -> Result<(), Response> {
    let name = user.name_of(path).unwrap_or_default();
    let first = name.split('/').next().unwrap_or_default();
    if first.eq_ignore_ascii_case(SETTINGS) {
        let message = format!("{SETTINGS} is the server's; post to /settings instead");
        return Err(refuse(StatusCode::FORBIDDEN, "forbidden", &message));
    }
    Ok(())
}

/// Where a file may be written.
fn place(user: &Root, file: &str) -> Result<PathBuf, Response> {
    let path = user.place(file).map_err(|error| refuse_path(&error))?;
    spare_settings(user, &path)?;
    Ok(path)
}

fn taken(file: &str) -> Response {
    let message = format!("there is a file \"{file}\" already");
    refuse(StatusCode::CONFLICT, "exists", &message)
}

fn not_written(file: &str, error: &io::Error) -> Response {
    match error.kind() {
        io::ErrorKind::AlreadyExists => taken(file),
        _ => cannot_write(file, error),
    }
}

fn is_set(query: &HashMap<String, String>, key: &str) -> bool {
    query.get(key).is_some_and(|value| value == "true")
}

fn about(path: &FilePath, name: &str) -> Value {
    let FileFacts {
        size,
        modified_ms,
        created_ms,
    } = FileFacts::of(path);
    json!({"path": name, "size": size, "modified": modified_ms, "created": created_ms})
}

/// `GET /userdata?dir&recurse&split&full_info`.
pub(crate) async fn list(
    State(server): State<Arc<Server>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let listed = blocking(move || {
        let dir = query
            .get("dir")
            .map(String::as_str)
            .unwrap_or_default()
            .trim_end_matches('/');
        if dir.is_empty() {
            return bad_request("the query names no dir");
        }
        let folder = match server.folders.user.existing(dir) {
            Ok(folder) => folder,
            // Nothing was saved there yet.
            Err(PathError::NotFound(_)) => return ok(&json!([])),
            Err(error) => return refuse_path(&error),
        };
        let Ok(root) = Root::create(&folder) else {
            return bad_request(&format!("{dir} is no folder"));
        };
        let mut names = Vec::new();
        collect(&root, &folder, is_set(&query, "recurse"), &mut names);
        names.sort();
        let entry = |name: &String| {
            if is_set(&query, "full_info") {
                about(&root.path().join(name), name)
            } else if is_set(&query, "split") {
                let parts: Vec<_> = std::iter::once(name.as_str())
                    .chain(name.split('/'))
                    .collect();
                json!(parts)
            } else {
                json!(name)
            }
        };
        ok(&json!(names.iter().map(entry).collect::<Vec<_>>()))
    });
    either(listed.await)
}

/// `GET /v2/userdata?path`: files and folders beneath a folder, one level deep.
pub(crate) async fn list_v2(
    State(server): State<Arc<Server>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let listed = blocking(move || {
        let path = query.get("path").map(String::as_str).unwrap_or_default();
        let path = path.trim_matches('/');
        let user = &server.folders.user;
        let folder = if path.is_empty() {
            user.path().to_owned()
        } else {
            match user.existing(path) {
                Ok(folder) => folder,
                Err(error) => return refuse_path(&error),
            }
        };
        let mut entries = Vec::new();
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Some(path) = user.name_of(&entry.path()) else {
                continue;
            };
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let mut listed = json!({"name": name, "path": path});
            listed["type"] = json!(if is_folder { "directory" } else { "file" });
            if !is_folder {
                let about = FileFacts::of(&entry.path());
                listed["size"] = json!(about.size);
                listed["modified"] = json!(about.modified_ms);
            }
            if entries.len() < MAX_LISTED {
                entries.push(listed);
            }
        }
        entries.sort_by_key(|entry| (entry["type"] != "directory", entry["name"].to_string()));
        ok(&json!(entries))
    });
    either(listed.await)
}

fn collect(root: &Root, folder: &FilePath, recurse: bool, names: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        // The editor keeps bookmarks in `.index.json`, and would list it as a workflow that can be removed.
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if kind.is_dir() && recurse {
            collect(root, &entry.path(), recurse, names);
        } else if kind.is_file() && names.len() < MAX_LISTED {
            names.extend(root.name_of(&entry.path()));
        }
    }
}

/// What a file holds that the editor reads at every start, before anybody wrote it.
fn first_content(file: &str) -> Option<&'static str> {
    match file {
        "user.css" => Some(""),
        "comfy.templates.json" => Some("[]"),
        _ => None,
    }
}

/// `GET /userdata/{file}`.
pub(crate) async fn read(State(server): State<Arc<Server>>, Path(file): Path<String>) -> Response {
    let found = blocking(move || {
        let missing = || not_found(&format!("there is no file \"{file}\""));
        let bytes = match server.folders.user.file(&file) {
            Ok(path) => std::fs::read(path).map_err(|_| missing())?,
            Err(error) => first_content(&file)
                .ok_or_else(|| refuse_path(&error))?
                .into(),
        };
        // Shown in no page of ours: saved, or read by the editor.
        let kind = match file.rsplit_once('.') {
            Some((_, "json")) => "application/json",
            Some((_, "css")) => "text/css",
            _ => "application/octet-stream",
        };
        let headers = [
            ("content-type", kind),
            ("content-disposition", "attachment"),
            ("content-security-policy", "sandbox; default-src 'none'"),
        ];
        Ok((headers, bytes).into_response())
    });
    either(found.await.map(either))
}

/// `POST /userdata/{file}?overwrite&full_info`: the body is the file.
pub(crate) async fn write(
    State(server): State<Arc<Server>>,
    Path(file): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    request: Request,
) -> Response {
    let bytes = match body(request, MAX_FILE).await {
        Ok(bytes) => bytes,
        Err(refusal) => return refusal,
    };
    let written = blocking(move || {
        let path = place(&server.folders.user, &file)?;
        let may_overwrite = query.get("overwrite").is_none_or(|value| value != "false");
        if path.is_dir() {
            return Err(taken(&file));
        }
        let written = if may_overwrite {
            write_over(&path, &bytes)
        } else {
            write_new(&path, &bytes)
        };
        written.map_err(|error| not_written(&file, &error))?;
        Ok(described(&path, &file, &query))
    });
    either(written.await.map(either))
}

fn described(path: &FilePath, file: &str, query: &HashMap<String, String>) -> Response {
    if is_set(query, "full_info") {
        ok(&about(path, file))
    } else {
        ok(&json!(file))
    }
}

/// `DELETE /userdata/{file}`.
pub(crate) async fn remove(
    State(server): State<Arc<Server>>,
    Path(file): Path<String>,
) -> Response {
    let removed = blocking(move || {
        let user = &server.folders.user;
        let path = user.existing(&file).map_err(|error| refuse_path(&error))?;
        spare_settings(user, &path)?;
        disk::remove_file(&path).map_err(|error| cannot_write(&file, &error))?;
        Ok(StatusCode::NO_CONTENT.into_response())
    });
    either(removed.await.map(either))
}

/// `POST /userdata/{file}/move/{to}?overwrite&full_info`.
pub(crate) async fn rename(
    State(server): State<Arc<Server>>,
    Path((file, to)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    let renamed = blocking(move || {
        let root = &server.folders.user;
        let from = root.existing(&file).map_err(|error| refuse_path(&error))?;
        spare_settings(root, &from)?;
        let path = place(root, &to)?;
        let name = if is_set(&query, "overwrite") {
            disk::rename
        } else {
            disk::rename_new
        };
        let parent = path.parent().map_or(Ok(()), disk::create_dir_all);
        parent
            .and_then(|()| name(&from, &path))
            .map_err(|error| not_written(&to, &error))?;
        Ok(described(&path, &to, &query))
    });
    either(renamed.await.map(either))
}
