//! Pictures that come in: by the upload button, and from the mask editor.

use std::io::Cursor;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Multipart, State};
use axum::http::StatusCode;
use axum::response::Response;
use image::ImageFormat;
use serde_json::{Value, json};

use super::super::Server;
use super::super::answer::{bad_request, cannot_write, ok, refuse};
use super::super::folders::write_over;
use super::files::{joined, media_type, root};
use super::{blocking, either};
use crate::pictures::{LoadedPicture, read_file};

/// The fields of the form.
#[derive(Default)]
struct Upload {
    name: String,
    bytes: Bytes,
    kind: String,
    subfolder: String,
    overwrite: bool,
    /// The picture that a mask is for.
    original: Option<Value>,
}

/// `POST /upload/image`: image, type, subfolder, overwrite.
pub(crate) async fn image(State(server): State<Arc<Server>>, form: Multipart) -> Response {
    let upload = match read(form).await {
        Ok(upload) => upload,
        Err(refusal) => return refusal,
    };
    either(blocking(move || either(keep(&server, &upload, upload.bytes.to_vec()))).await)
}

/// `POST /upload/mask`: the same with original_ref; what is kept is the original with the transparency of the upload.
pub(crate) async fn mask(State(server): State<Arc<Server>>, form: Multipart) -> Response {
    let upload = match read(form).await {
        Ok(upload) => upload,
        Err(refusal) => return refusal,
    };
    let kept = blocking(move || {
        let bytes = with_transparency(&server, &upload)?;
        keep(&server, &upload, bytes)
    });
    either(kept.await.map(either))
}

async fn read(mut form: Multipart) -> Result<Upload, Response> {
    let broken = |error: axum::extract::multipart::MultipartError| {
        refuse(
            error.status(),
            "bad_upload",
            &format!("the upload cannot be read: {}", error.body_text()),
        )
    };
    let mut upload = Upload::default();
    while let Some(field) = form.next_field().await.map_err(broken)? {
        let name = field.name().unwrap_or_default().to_owned();
        if name == "image" {
            upload.name = field.file_name().unwrap_or_default().to_owned();
            upload.bytes = field.bytes().await.map_err(broken)?;
            continue;
        }
        let text = field.text().await.map_err(broken)?;
        match name.as_str() {
            "type" => upload.kind = text,
            "subfolder" => upload.subfolder = text,
            "overwrite" => upload.overwrite = text == "true" || text == "1",
            "original_ref" => upload.original = lenient_json::from_str(&text).ok(),
            _ => {}
        }
    }
    if upload.name.is_empty() {
        return Err(bad_request("the form has no file \"image\""));
    }
    Ok(upload)
}

/// Writes the picture under its name, or under a numbered one if another picture has it.
fn keep(server: &Server, upload: &Upload, bytes: Vec<u8>) -> Result<Response, Response> {
    let kind = if upload.kind.is_empty() {
        "input"
    } else {
        &upload.kind
    };
    let Some(root) = root(server, kind) else {
        return Err(bad_request("type is input, output or temp"));
    };
    if media_type(&bytes).is_none() {
        let message = format!(
            "\"{}\" is no picture; PNG, JPEG and WebP files are taken",
            upload.name
        );
        return Err(refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "no_picture",
            &message,
        ));
    }
    LoadedPicture::check_size(&upload.name, &bytes).map_err(|error| bad_request(&error.message))?;
    let (stem, ending) = upload
        .name
        .rsplit_once('.')
        .unwrap_or((&upload.name, "png"));
    let mut name = upload.name.clone();
    let mut number = 1;
    let path = loop {
        let place = root.place(&joined(&upload.subfolder, &name));
        let path = place.map_err(|error| bad_request(&error.to_string()))?;
        let is_same = || read_file(&path).is_ok_and(|there| there == bytes);
        if !path.exists() || upload.overwrite || is_same() {
            break path;
        }
        name = format!("{stem} ({number}).{ending}");
        number += 1;
    };
    write_over(&path, &bytes).map_err(|error| cannot_write(&name, &error))?;
    Ok(ok(
        &json!({"name": name, "subfolder": upload.subfolder, "type": kind}),
    ))
}

fn with_transparency(server: &Server, upload: &Upload) -> Result<Vec<u8>, Response> {
    let unreadable = |error: plugin_api::NodeError| bad_request(&error.message);
    let Some(original) = &upload.original else {
        return Err(bad_request("the form has no \"original_ref\""));
    };
    let text = |key: &str| original[key].as_str().unwrap_or_default();
    let Some(root) = root(server, text("type")) else {
        return Err(bad_request(
            "the type of original_ref is input, output or temp",
        ));
    };
    let path = root.existing(&joined(text("subfolder"), text("filename")));
    let path = path.map_err(|error| bad_request(&error.to_string()))?;
    let picture = LoadedPicture::decode(text("filename"), &read_file(&path).map_err(unreadable)?);
    let mask = LoadedPicture::decode(&upload.name, &upload.bytes).map_err(unreadable)?;
    let image = picture.map_err(unreadable)?.with_transparency_of(&mask);
    let mut png = Cursor::new(Vec::new());
    image
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|error| bad_request(&format!("the mask cannot be written: {error}")))?;
    Ok(png.into_inner())
}
