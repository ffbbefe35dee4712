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

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{get, patch, post};
use serde_json::{Map, Value};

use super::answer::{bad_request, refuse};
use super::{Server, guard};

/// Largest JSON body.
const MAX_JSON: usize = 16 << 20;
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
    let body: Body = request.into_body();
    to_bytes(body, limit).await.map_err(|_| too_large())
}

/// The JSON object that a request carries; an empty body is an empty object.
async fn json_body(request: Request) -> Result<Map<String, Value>, Response> {
    let bytes = body(request, MAX_JSON).await?;
    if bytes.is_empty() {
        return Ok(Map::new());
    }
    match lenient_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(Value::Null) => Ok(Map::new()),
        Ok(_) => Err(bad_request("the body is no JSON object")),
        Err(error) => Err(bad_request(&format!("the body is no JSON: {error}"))),
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
