//! Answers, in the forms that ComfyUI's clients read.

use std::io;

use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};

/// An error as ComfyUI's clients read it: `{"error": {"type", "message", "details", "extra_info"}}`.
pub(crate) fn refuse(status: StatusCode, kind: &str, message: &str) -> Response {
    refuse_nodes(status, kind, message, Map::new())
}

/// An error with what is wrong with the nodes.
pub(crate) fn refuse_nodes(
    status: StatusCode,
    kind: &str,
    message: &str,
    nodes: Map<String, Value>,
) -> Response {
    let error = json!({"type": kind, "message": message, "details": "", "extra_info": {}});
    answer(status, &json!({"error": error, "node_errors": nodes}))
}

pub(crate) fn not_found(message: &str) -> Response {
    refuse(StatusCode::NOT_FOUND, "not_found", message)
}

pub(crate) fn bad_request(message: &str) -> Response {
    refuse(StatusCode::BAD_REQUEST, "bad_request", message)
}

pub(crate) fn answer(status: StatusCode, value: &Value) -> Response {
    (status, json_text(value.to_string())).into_response()
}

pub(crate) fn json_text(text: String) -> Response {
    ([("content-type", "application/json")], text).into_response()
}

pub(crate) fn ok(value: &Value) -> Response {
    answer(StatusCode::OK, value)
}

pub(crate) fn done() -> Response {
    ok(&json!({}))
}

pub(crate) fn cannot_write(what: &str, error: &io::Error) -> Response {
    let message = format!("{what} cannot be written: {error}");
    refuse(StatusCode::INTERNAL_SERVER_ERROR, "cannot_write", &message)
}
