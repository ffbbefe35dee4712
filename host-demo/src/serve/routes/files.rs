//! `/view`: pictures are shown, other files are saved; nothing is run by a browser.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Cursor, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use image::{ImageFormat, guess_format};
use tokio::io::AsyncReadExt as _;

use super::super::Server;
use super::super::answer::{bad_request, not_found, refuse};
use super::blocking;
use crate::confined::{PathError, Root};
use crate::demo;
use crate::pictures::{LoadedPicture, read_file};

/// Bytes of a download that are in memory at once.
const PIECE: usize = 256 << 10;

/// Size and times of a file; 0 for what is not known.
pub(super) struct FileFacts {
    pub(super) size: u64,
    /// Milliseconds since 1970.
    pub(super) modified_ms: u64,
    pub(super) created_ms: u64,
}

impl FileFacts {
    pub(super) fn of(path: &Path) -> Self {
        let meta = path.metadata().ok();
        let ms = |time: io::Result<SystemTime>| {
            let since = time.ok()?.duration_since(UNIX_EPOCH).ok()?;
            Some(since.as_millis() as u64)
        };
        let modified = meta.as_ref().and_then(|meta| ms(meta.modified()));
        let created = meta.as_ref().and_then(|meta| ms(meta.created()));
        Self {
            size: meta.map_or(0, |meta| meta.len()),
            modified_ms: modified.unwrap_or(0),
            created_ms: created.or(modified).unwrap_or(0),
        }
    }
}

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

/// `GET /view?filename&subfolder&type&channel`: a picture to look at, or another file to save.
pub(crate) async fn view(
    State(server): State<Arc<Server>>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    match blocking(move || find(&server, &query)).await {
        Ok(Ok(Found::Shown(response))) => response,
        Ok(Ok(Found::File(path, name))) => saved(&path, &name).await,
        Ok(Err(refusal)) | Err(refusal) => refusal,
    }
}

enum Found {
    Shown(Response),
    File(PathBuf, String),
}

fn find(server: &Server, query: &HashMap<String, String>) -> Result<Found, Response> {
    let text = |key: &str| query.get(key).map(String::as_str).unwrap_or_default();
    // As the editor writes names: `dog.png [input]`.
    let (filename, kind) = match text("filename").rsplit_once(" [") {
        Some((name, kind)) if kind.ends_with(']') => (name, kind.trim_end_matches(']')),
        _ => (text("filename"), text("type")),
    };
    if let Some(bytes) = demo::picture(filename) {
        return shown(filename, bytes.to_vec(), text("channel")).map(Found::Shown);
    }
    let path = place(server, kind, &joined(text("subfolder"), filename))?;
    let mut start = [0; 32];
    let is_picture = File::open(&path)
        .and_then(|mut file| file.read(&mut start))
        .is_ok_and(|n| media_type(&start[..n]).is_some());
    if !is_picture {
        return Ok(Found::File(path, filename.to_owned()));
    }
    let bytes = read_file(&path).map_err(|error| bad_request(&error.message))?;
    shown(filename, bytes, text("channel")).map(Found::Shown)
}

fn shown(filename: &str, bytes: Vec<u8>, channel: &str) -> Result<Response, Response> {
    let kind = media_type(&bytes).unwrap_or("application/octet-stream");
    let (kind, bytes) = match channel {
        "rgb" | "a" => ("image/png", one_channel(filename, &bytes, channel)?),
        _ => (kind, bytes),
    };
    Ok((headers(kind, "inline", filename), bytes).into_response())
}

/// A file that no browser shows, piece by piece: weights are large.
async fn saved(path: &Path, filename: &str) -> Response {
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) => return bad_request(&format!("\"{filename}\" cannot be read: {error}")),
    };
    let length = file.metadata().await.map(|meta| meta.len());
    let pieces = futures_util::stream::try_unfold(file, |mut file| async move {
        let mut piece = vec![0; PIECE];
        let n = file.read(&mut piece).await?;
        piece.truncate(n);
        Ok::<_, io::Error>((n > 0).then_some((Bytes::from(piece), file)))
    });
    let mut response = (
        headers("application/octet-stream", "attachment", filename),
        Body::from_stream(pieces),
    )
        .into_response();
    if let Ok(length) = length {
        response
            .headers_mut()
            .insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    response
}

fn headers(kind: &str, disposition: &str, filename: &str) -> [(&'static str, String); 4] {
    let name = filename.rsplit('/').next().unwrap_or_default().replace(
        |c: char| !c.is_ascii() || c.is_ascii_control() || c == '"',
        "_",
    );
    [
        ("content-type", kind.to_owned()),
        (
            "content-disposition",
            format!("{disposition}; filename=\"{name}\""),
        ),
        (
            "content-security-policy",
            "sandbox; default-src 'none'".to_owned(),
        ),
        ("cache-control", "no-cache".to_owned()),
    ]
}

fn place(server: &Server, kind: &str, name: &str) -> Result<PathBuf, Response> {
    let Some(root) = root(server, kind) else {
        return Err(bad_request("type is input, output or temp"));
    };
    root.file(name).map_err(|error| match error {
        PathError::NotFound(_) => not_found(&error.to_string()),
        _ => refuse(StatusCode::FORBIDDEN, "forbidden", &error.to_string()),
    })
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
