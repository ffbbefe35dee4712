//! What there is: nodes, settings, templates, models, the machine.

use std::collections::HashMap;
use std::path::Path as FilePath;
use std::sync::Arc;

use axum::extract::{Path, Query, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use plugin_api::{DeviceDescriptor, DeviceKind};
use serde_json::{Map, Value, json};

use super::super::answer::{cannot_write, done, not_found, ok, refuse};
use super::super::settings::SettingsError;
use super::super::{PACK, Server};
use super::{MAX_JSON, MAX_UPLOAD, blocking, body, either, json_body, json_of};
use crate::confined::Root;
use crate::demo;

/// Node inputs that name a picture, with the button to add one.
const PICTURE_INPUTS: [&str; 2] = ["LoadImage", "LoadImageMask"];
/// How deep folders are looked into.
const MAX_DEPTH: usize = 4;
/// Most files that are listed.
const MAX_LISTED: usize = 10_000;

/// `GET /prompt`.
pub(crate) async fn status(State(server): State<Arc<Server>>) -> Response {
    let status = server.status();
    ok(&json!({"exec_info": status["status"]["exec_info"]}))
}

/// `GET /object_info`.
pub(crate) async fn object_info(State(server): State<Arc<Server>>) -> Response {
    let all = blocking(move || all_nodes(&server)).await;
    either(all.map(|all| ok(&Value::Object(all))))
}

/// `GET /object_info/{class}`.
pub(crate) async fn object_info_of(
    State(server): State<Arc<Server>>,
    Path(class): Path<String>,
) -> Response {
    let all = blocking(move || all_nodes(&server)).await;
    either(all.map(|mut all| {
        let found = all.remove(&class).map(|info| (class, info));
        ok(&Value::Object(found.into_iter().collect()))
    }))
}

/// The catalog's, with the pictures that were uploaded.
fn all_nodes(server: &Server) -> Map<String, Value> {
    let mut all = server.catalog.object_info();
    let uploaded = files_in(
        &server.folders.input,
        &["png", "jpg", "jpeg", "jfif", "jpe", "webp"],
    );
    for class in PICTURE_INPUTS {
        if let Some(options) = all.get_mut(class).and_then(|info| {
            info.pointer_mut("/input/required/image/1/options")?
                .as_array_mut()
        }) {
            options.extend(uploaded.iter().map(|name| json!(name)));
        }
    }
    all
}

/// Names of the files with these extensions, sorted.
pub(super) fn files_in(root: &Root, extensions: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    collect(root, root.path(), extensions, MAX_DEPTH, &mut found);
    found.sort();
    found
}

fn collect(
    root: &Root,
    folder: &FilePath,
    extensions: &[&str],
    depth: usize,
    found: &mut Vec<String>,
) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, Ok(kind)) = (entry.path(), entry.file_type()) else {
            continue;
        };
        if kind.is_dir() && depth > 0 {
            collect(root, &path, extensions, depth - 1, found);
        }
        let extension = path
            .extension()
            .and_then(|extension| extension.to_str())
            .unwrap_or_default();
        let is_meant = extensions.contains(&extension.to_lowercase().as_str());
        if kind.is_file() && is_meant && found.len() < MAX_LISTED {
            found.extend(root.name_of(&path));
        }
    }
}

/// `GET /system_stats`.
pub(crate) async fn system_stats(State(server): State<Arc<Server>>) -> Response {
    // The devices were opened when the server started: what fails now is no more than their memory.
    let asked = blocking(move || (memory(), server.catalog.devices().unwrap_or_default())).await;
    let (machine, devices) = match asked {
        Ok(asked) => asked,
        Err(refusal) => return refusal,
    };
    let (total, free) = machine;
    let mut devices: Vec<_> = devices
        .all()
        .into_iter()
        .map(|device| device_stats(device, machine))
        .collect();
    if devices.is_empty() {
        devices.push(stats("cpu", "cpu", 0, (total, free), (total, free)));
    }
    ok(&json!({
        "system": {
            "os": std::env::consts::OS, "ram_total": total, "ram_free": free,
            "comfyui_version": concat!("host-demo ", env!("CARGO_PKG_VERSION")), "python_version": "none",
            "pytorch_version": "none", "embedded_python": false, "argv": [],
        },
        "devices": devices,
    }))
}

/// A device as ComfyUI's clients read it.
fn device_stats(device: &DeviceDescriptor, machine: (u64, u64)) -> Value {
    let (mut name, kind) = (device.kind.name().to_owned(), device.kind.name());
    if device.kind != DeviceKind::Cpu {
        name = format!("{name}:{}", device.index);
    }
    if !device.product.is_empty() {
        name = format!("{name} {}", device.product);
    }
    let Some(memory) = device.memory else {
        return stats(&name, kind, device.index, machine, machine);
    };
    let kept = memory.held.saturating_sub(memory.used);
    let all = (memory.total, memory.free + kept);
    stats(&name, kind, device.index, all, (memory.held, kept))
}

/// `all` is the device's memory and what of it can still be used, `own` what this process holds and what it does not use of
/// that.
fn stats(name: &str, kind: &str, index: usize, all: (u64, u64), own: (u64, u64)) -> Value {
    json!({
        "name": name, "type": kind, "index": index, "vram_total": all.0, "vram_free": all.1,
        "torch_vram_total": own.0, "torch_vram_free": own.1,
    })
}

/// Bytes of the machine, and those that are free; 0 where the system does not tell in a file.
fn memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok())
            .unwrap_or(0)
    };
    (
        kilobytes("MemTotal:") << 10,
        kilobytes("MemAvailable:") << 10,
    )
}

/// What clients are told that this server can.
pub(super) fn server_features() -> Value {
    json!({
        "supports_preview_metadata": true, "supports_progress_text_metadata": true, "max_upload_size": MAX_UPLOAD,
    })
}

/// `GET /features`.
pub(crate) async fn features() -> Response {
    ok(&server_features())
}

/// `GET /users`: there is one.
pub(crate) async fn users() -> Response {
    ok(&json!({"storage": "server", "migrated": true}))
}

/// `GET /settings`.
pub(crate) async fn settings(State(server): State<Arc<Server>>) -> Response {
    ok(&Value::Object(server.settings.all()))
}

/// `POST /settings`.
pub(crate) async fn change_settings(
    State(server): State<Arc<Server>>,
    request: Request,
) -> Response {
    match json_body(request).await {
        Ok(changes) => change(server, changes).await,
        Err(refusal) => refusal,
    }
}

/// `GET /settings/{id}`.
pub(crate) async fn setting(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    ok(&server.settings.get(&id).unwrap_or_default())
}

/// `POST /settings/{id}`: the body is the value.
pub(crate) async fn change_setting(
    State(server): State<Arc<Server>>,
    Path(id): Path<String>,
    request: Request,
) -> Response {
    let bytes = match body(request, MAX_JSON).await {
        Ok(bytes) => bytes,
        Err(refusal) => return refusal,
    };
    match json_of(&bytes, &format!("the value of the setting {id}")) {
        Ok(value) => change(server, Map::from_iter([(id, value)])).await,
        Err(refusal) => refusal,
    }
}

async fn change(server: Arc<Server>, changes: Map<String, Value>) -> Response {
    let changed = blocking(move || server.settings.set(changes)).await;
    either(changed.map(|changed| match changed {
        Ok(()) => done(),
        Err(error @ SettingsError::TooLarge) => refuse(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_large",
            &error.to_string(),
        ),
        Err(error) => cannot_write("the settings", &std::io::Error::other(error.to_string())),
    }))
}

/// `GET /extensions`: scripts that the editor loads.
pub(crate) async fn extensions() -> Response {
    ok(&json!([super::pages::HELD_JOBS_PATH]))
}

/// Questions whose answer is that there is nothing.
pub(crate) async fn nothing() -> Response {
    done()
}

/// `GET /workflow_templates`: names by pack.
pub(crate) async fn templates() -> Response {
    ok(&json!({PACK: [demo::NAME]}))
}

/// `GET /workflow_templates/{pack}/{name}.json`.
pub(crate) async fn template(
    Path((pack, name)): Path<(String, String)>,
    Query(_): Query<HashMap<String, String>>,
) -> Response {
    let document = serde_json::from_str(demo::WORKFLOW);
    match document {
        Ok(document) if pack == PACK && name == format!("{}.json", demo::NAME) => ok(&document),
        _ => not_found(&format!("there is no template {pack}/{name}")),
    }
}
