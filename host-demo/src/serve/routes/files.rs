//! `/view`: pictures, and nothing that a browser would run.

use std::collections::HashMap;
use std::io::Cursor;
use std::sync::Arc;

use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use image::{ImageFormat, guess_format};

use super::super::Server;
use super::super::answer::{bad_request, not_found, refuse};
use super::{blocking, either};
use crate::confined::{PathError, Root};
use crate::demo;
use crate::pictures::{LoadedPicture, read_file};

/// The folder that a request means.
pub(super) fn root<'a>(server: &'a Server, kind: &str) -> Option<&'a Root> {
    match kind {
        "input" => Some(&server.folders.input),
        "output" | "" => Some(&server.folders.output),
        "temp" => Some(&server.folders.temp),
        _ => None,
    }
}

/// The media type of a picture, by its content.
pub(super) fn media_type(bytes: &[u8]) -> Option<&'static str> {
    match guess_format(bytes).ok()? {
        ImageFormat::Png => Some("image/png"),
        ImageFormat::Jpeg => Some("image/jpeg"),
        ImageFormat::WebP => Some("image/webp"),
        _ => None,
    }
}

/// A name and its subfolder.
pub(super) fn joined(subfolder: &str, filename: &str) -> String {
    let subfolder = subfolder.trim_end_matches('/');
    if subfolder.is_empty() {
        filename.to_owned()
    } else {
        format!("{subfolder}/{filename}")
    }
}

/// `GET /view?filename&subfolder&type&channel`.
pub(crate) async fn view(
    State(server): State<Arc<Server>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    either(blocking(move || either(picture(&server, &query))).await)
}

fn picture(server: &Server, query: &HashMap<String, String>) -> Result<Response, Response> {
    let text = |key: &str| query.get(key).map(String::as_str).unwrap_or_default();
    // As the editor writes names: `dog.png [input]`.
    let (filename, kind) = match text("filename").rsplit_once(" [") {
        Some((name, kind)) if kind.ends_with(']') => (name, kind.trim_end_matches(']')),
        _ => (text("filename"), text("type")),
    };
    let bytes = match demo::picture(filename) {
        Some(bytes) => bytes.to_vec(),
        None => file(server, kind, &joined(text("subfolder"), filename))?,
    };
    let Some(kind) = media_type(&bytes) else {
        let message = format!("\"{filename}\" is no picture, and only pictures are shown");
        return Err(refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "no_picture",
            &message,
        ));
    };
    let (kind, bytes) = match text("channel") {
        channel @ ("rgb" | "a") => ("image/png", one_channel(filename, &bytes, channel)?),
        _ => (kind, bytes),
    };
    let name = filename.replace(
        |c: char| !c.is_ascii() || c.is_ascii_control() || c == '"',
        "_",
    );
    let headers = [
        ("content-type", kind.to_owned()),
        (
            "content-disposition",
            format!("inline; filename=\"{name}\""),
        ),
        (
            "content-security-policy",
            "sandbox; default-src 'none'".to_owned(),
        ),
        ("cache-control", "no-cache".to_owned()),
    ];
    Ok((headers, bytes).into_response())
}

fn file(server: &Server, kind: &str, name: &str) -> Result<Vec<u8>, Response> {
    let Some(root) = root(server, kind) else {
        return Err(bad_request("type is input, output or temp"));
    };
    let path = root.existing(name).map_err(|error| match error {
        PathError::NotFound(_) => not_found(&error.to_string()),
        _ => refuse(StatusCode::FORBIDDEN, "forbidden", &error.to_string()),
    })?;
    read_file(&path).map_err(|error| bad_request(&error.message))
}

/// Without the transparency, or only that: what the mask editor asks for.
fn one_channel(name: &str, bytes: &[u8], channel: &str) -> Result<Vec<u8>, Response> {
    let picture =
        LoadedPicture::decode(name, bytes).map_err(|error| bad_request(&error.message))?;
    let image = if channel == "rgb" {
        picture.opaque()
    } else {
        picture.only_transparency()
    };
    let mut png = Cursor::new(Vec::new());
    image
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|error| bad_request(&format!("\"{name}\" cannot be shown: {error}")))?;
    Ok(png.into_inner())
}
