//! Pages: the editor's files, or our plain page where there is no editor.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};

use super::super::Server;
use super::super::answer::{not_found, refuse};
use super::{blocking, either};

/// From which workflows run without the editor.
const START_PAGE: &str = include_str!("../pages/start_page.html");
/// Its address, also where the editor is.
const START_PATH: &str = "/conceptloom";
/// Tells of jobs that an earlier server left, with a button in the editor that runs them.
const HELD_JOBS: &str = include_str!("../pages/held_jobs.js");
/// Its address; from there it imports `../../scripts`.
pub(super) const HELD_JOBS_PATH: &str = "/extensions/conceptloom/held_jobs.js";

/// Any `/api/…` that is not there.
pub(crate) async fn no_route(uri: Uri) -> Response {
    not_found(&format!("there is no route {}", uri.path()))
}

/// Everything else.
pub(crate) async fn page(State(server): State<Arc<Server>>, method: Method, uri: Uri) -> Response {
    if method != Method::GET && method != Method::HEAD {
        let message = format!("there is no {method} {}", uri.path());
        return refuse(StatusCode::METHOD_NOT_ALLOWED, "no_route", &message);
    }
    let path = uri.path().to_owned();
    let is_root = path == "/" || path == "/index.html";
    if path == START_PATH || is_root && !server.front_end.is_there() {
        let has_editor = format!("data-editor=\"{}\"", server.front_end.is_there());
        let text = START_PAGE.replace("data-editor=\"false\"", &has_editor);
        return html(text.into_bytes());
    }
    let name = if is_root {
        "index.html".to_owned()
    } else {
        path.trim_start_matches('/').to_owned()
    };
    let found = blocking(move || server.front_end.read(&name).map(|bytes| (name, bytes))).await;
    either(found.map(|found| match found {
        Some((_, bytes)) if is_root => html(bytes),
        Some((name, bytes)) => {
            let kind = mime_guess::from_path(&name)
                .first_or_octet_stream()
                .to_string();
            // Names of assets change with their content.
            let age = if name.starts_with("assets/") {
                "max-age=31536000, immutable"
            } else {
                "no-cache"
            };
            let headers = [("content-type", kind), ("cache-control", age.to_owned())];
            (headers, bytes).into_response()
        }
        None => match built_in(&path) {
            Some((kind, text)) => ([("content-type", kind)], text).into_response(),
            None => not_found(&format!("there is no file {path}")),
        },
    }))
}

/// Our own script, and what the editor asks for at every start and does without.
fn built_in(path: &str) -> Option<(&'static str, &'static str)> {
    match path {
        HELD_JOBS_PATH => Some(("text/javascript", HELD_JOBS)),
        "/user.css" => Some(("text/css", "")),
        "/favicon.ico" => Some(("image/x-icon", "")),
        "/templates/index.json" => Some(("application/json", "[]")),
        "/templates/index_logo.json" => Some(("application/json", "{}")),
        _ => None,
    }
}

/// A page, which the browser keeps from asking anybody but this server.
fn html(bytes: Vec<u8>) -> Response {
    const ONLY_US: &str = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; \
         connect-src 'self' ws://localhost:* ws://127.0.0.1:* data: blob:; frame-ancestors 'self'";
    let headers = [
        ("content-type", "text/html; charset=utf-8"),
        ("cache-control", "no-cache"),
        ("content-security-policy", ONLY_US),
    ];
    (headers, bytes).into_response()
}
