//! What can be asked. Every route is there with and without `/api`, as clients use both.
#![expect(
    clippy::result_large_err,
    reason = "the error of a request is its answer"
)]

mod files;
mod info;
mod internal;
mod jobs;
mod models;
mod pages;
mod prompt;
mod socket;
mod upload;
mod userdata;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, patch, post};
use futures_util::StreamExt as _;
use futures_util::stream::unfold;
use serde_json::{Map, Value};
use tokio::time::timeout;

use super::answer::{bad_request, refuse};
use super::{Server, guard};

/// Largest JSON body.
const MAX_JSON: usize = 16 << 20;
/// Deepest JSON that is taken: less than what serde reads, as it is kept and passed on within more of it.
const MAX_DEPTH: usize = 96;
/// How long a client may take for the next piece of a body.
const PIECE_LIMIT: Duration = Duration::from_secs(60);
/// Largest file that is uploaded; told to clients.
const MAX_UPLOAD: usize = 100 << 20;

/// All routes.
pub(crate) fn router(server: Arc<Server>) -> Router {
    let api = api();
    Router::new()
        .merge(api.clone())
        .nest("/api", api.fallback(pages::no_route))
        .fallback(pages::page)
        .layer(DefaultBodyLimit::max(MAX_UPLOAD))
        .layer(from_fn(pace))
        .layer(from_fn_with_state(server.clone(), guard::check))
        .with_state(server)
}

fn api() -> Router<Arc<Server>> {
    Router::new()
        .route("/ws", get(socket::connect))
        .route("/prompt", get(info::status).post(prompt::accept))
        .route("/conceptloom/run", post(prompt::run_workflow))
        .route("/queue", get(jobs::queue).post(jobs::change_queue))
        .route("/interrupt", post(jobs::interrupt))
        .route("/free", post(jobs::free))
        .route("/history", get(jobs::history).post(jobs::change_history))
        .route("/history/{id}", get(jobs::history_of))
        .route("/jobs", get(jobs::list))
        .route("/jobs/cancel", post(jobs::cancel_many))
        .route("/jobs/{id}", get(jobs::detail))
        .route("/jobs/{id}/cancel", post(jobs::cancel))
        .route("/object_info", get(info::object_info))
        .route("/object_info/{class}", get(info::object_info_of))
        .route("/system_stats", get(info::system_stats))
        .route("/features", get(info::features))
        .route("/users", get(info::users))
        .route("/settings", get(info::settings).post(info::change_settings))
        .route(
            "/settings/{id}",
            get(info::setting).post(info::change_setting),
        )
        .route("/extensions", get(info::extensions))
        .route("/embeddings", get(models::embeddings))
        .route("/models", get(models::kinds))
        .route("/models/{folder}", get(models::in_folder))
        .route("/experiment/models", get(models::folders))
        .route("/experiment/models/{folder}", get(models::with_times))
        .route("/view_metadata/{folder}", get(models::metadata))
        .route("/internal/logs", get(internal::logs))
        .route("/internal/logs/raw", get(internal::raw_logs))
        .route("/internal/logs/subscribe", patch(internal::subscribe))
        .route("/internal/folder_paths", get(internal::folder_paths))
        .route("/internal/files/{kind}", get(internal::files))
        .route("/workflow_templates", get(info::templates))
        .route("/workflow_templates/{pack}/{name}", get(info::template))
        .route("/i18n", get(info::nothing))
        .route("/global_subgraphs", get(info::nothing))
        .route("/node_replacements", get(info::nothing))
        .route("/view", get(files::view))
        .route("/upload/image", post(upload::image))
        .route("/upload/mask", post(upload::mask))
        .route("/userdata", get(userdata::list))
        .route("/v2/userdata", get(userdata::list_v2))
        .route(
            "/userdata/{file}",
            get(userdata::read)
                .post(userdata::write)
                .delete(userdata::remove),
        )
        .route("/userdata/{file}/move/{to}", post(userdata::rename))
}

/// The body of a request, or the answer to one that is too large.
async fn body(request: Request, limit: usize) -> Result<Bytes, Response> {
    let too_large = || {
        let message = format!("the body is larger than {} MiB", limit >> 20);
        refuse(StatusCode::PAYLOAD_TOO_LARGE, "too_large", &message)
    };
    let announced = request
        .headers()
        .get("content-length")
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut pieces = request.into_body().into_data_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| bad_request("the body ends before it is whole"))?;
        if bytes.len() + piece.len() > limit {
            return Err(too_large());
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.into())
}

/// Ends a body of which nothing more comes: who says half of it does not keep a place among the connections.
async fn pace(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let pieces = unfold(body.into_data_stream(), |mut pieces| async move {
        let piece = match timeout(PIECE_LIMIT, pieces.next()).await {
            Ok(piece) => piece?,
            Err(late) => Err(axum::Error::new(late)),
        };
        Some((piece, pieces))
    });
    next.run(Request::from_parts(head, Body::from_stream(pieces)))
        .await
}

/// Whether arrays and objects lie in each other more than `levels` deep.
fn is_deeper(value: &Value, levels: usize) -> bool {
    let is_inside = |value| is_deeper(value, levels - 1);
    match value {
        Value::Array(values) => levels == 0 || values.iter().any(is_inside),
        Value::Object(values) => levels == 0 || values.values().any(is_inside),
        _ => false,
    }
}

/// JSON that came with a request; `what` names it.
fn json_of(bytes: &[u8], what: &str) -> Result<Value, Response> {
    match lenient_json::from_slice(bytes) {
        Ok(value) if is_deeper(&value, MAX_DEPTH) => Err(bad_request(&format!(
            "{what} is nested more than {MAX_DEPTH} levels deep"
        ))),
        Ok(value) => Ok(value),
        Err(error) => Err(bad_request(&format!("{what} is no JSON: {error}"))),
    }
}

/// The JSON object that a request carries; an empty body is an empty object.
async fn json_body(request: Request) -> Result<Map<String, Value>, Response> {
    let bytes = body(request, MAX_JSON).await?;
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    match json_of(&bytes, "the body")? {
        Value::Object(object) => Ok(object),
        Value::Null => Ok(Map::new()),
        _ => Err(bad_request("the body is no JSON object")),
    }
}

/// Runs what blocks (files, validation) beside the threads that answer.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Response> {
    tokio::task::spawn_blocking(work).await.map_err(|_| {
        let message =
            "the server failed at this request; this is a fault of the host, please report it";
        refuse(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    })
}

/// Either way an answer.
fn either(result: Result<Response, Response>) -> Response {
    result.unwrap_or_else(|refusal| refusal)
}
