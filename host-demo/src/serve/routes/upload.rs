//! Pictures that come in: by the upload button, and from the mask editor.

use std::io::{self, Cursor};
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::multipart::Field;
use axum::extract::{Multipart, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_DISPOSITION;
use axum::response::Response;
use image::ImageFormat;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::super::Server;
use super::super::answer::{bad_request, cannot_write, ok, refuse};
use super::super::folders::{write_new, write_over};
use super::files::{joined, media_type, root};
use super::{blocking, either};
use crate::demo;
use crate::pictures::{LoadedPicture, read_file};
use crate::png_text;

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

/// `POST /upload/mask`: the same with original_ref; what is kept is the original, with its workflow, in the
/// transparency of the upload.
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
            // Not every system has names with these; the answer tells the client what it is called now.
            upload.name = file_name(&field).replace([':', '\\'], "_");
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

/// The name that a client gave the file; of a `filename*` (RFC 5987), and of a name that is percent-encoded as a whole, what
/// it stands for.
fn file_name(field: &Field<'_>) -> String {
    let disposition = field.headers().get(CONTENT_DISPOSITION);
    let disposition =
        disposition.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let extended = disposition.as_deref().and_then(extended_name);
    extended.unwrap_or_else(|| {
        let plain = field.file_name().unwrap_or_default();
        encoded_name(plain).unwrap_or_else(|| plain.to_owned())
    })
}

/// `my%20dog.png`, as aiohttp writes `my dog.png`. Browsers write names as they are: one that has a character which
/// would have been encoded is not encoded.
fn encoded_name(name: &str) -> Option<String> {
    let is_encoded = name.contains('%')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._~%".contains(&byte));
    let decoded = String::from_utf8(percent_decode_str(name).collect()).ok()?;
    // What is left of a `%` that encoded nothing.
    let is_whole = !name.split('%').skip(1).any(|after| {
        let digits = after.get(..2);
        digits.is_none_or(|digits| !digits.bytes().all(|byte| byte.is_ascii_hexdigit()))
    });
    (is_encoded && is_whole).then_some(decoded)
}

/// `filename*=utf-8''my%20dog.png`.
fn extended_name(disposition: &str) -> Option<String> {
    let (_, value) = disposition.split_once("filename*=")?;
    let value = value.split(';').next()?.trim().trim_matches('"');
    let (charset, rest) = value.split_once('\'')?;
    let (_, name) = rest.split_once('\'')?;
    let bytes: Vec<u8> = percent_decode_str(name).collect();
    match charset.to_lowercase().as_str() {
        "utf-8" => String::from_utf8(bytes).ok(),
        "iso-8859-1" => Some(bytes.into_iter().map(char::from).collect()),
        _ => None,
    }
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
    loop {
        let place = root.place(&joined(&upload.subfolder, &name));
        let path = place.map_err(|error| bad_request(&error.to_string()))?;
        let is_same = || read_file(&path).is_ok_and(|there| there == bytes);
        let written = if upload.overwrite {
            write_over(&path, &bytes)
        } else {
            write_new(&path, &bytes)
        };
        match written {
            Ok(()) => break,
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(cannot_write(&name, &error));
            }
            Err(_) if is_same() => break,
            // Another picture has the name, or took it meanwhile.
            Err(_) => {
                name = format!("{stem} ({number}).{ending}");
                number += 1;
            }
        }
    }
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
    let name = text("filename");
    let bytes = if let Some(bytes) = demo::picture(name) {
        bytes.to_vec()
    } else {
        let Some(root) = root(server, text("type")) else {
            return Err(bad_request(
                "the type of original_ref is input, output or temp",
            ));
        };
        let path = root.file(&joined(text("subfolder"), name));
        let path = path.map_err(|error| bad_request(&error.to_string()))?;
        read_file(&path).map_err(unreadable)?
    };
    let picture = LoadedPicture::decode(name, &bytes);
    let mask = LoadedPicture::decode(&upload.name, &upload.bytes).map_err(unreadable)?;
    let image = picture.map_err(unreadable)?.with_transparency_of(&mask);
    let mut png = Cursor::new(Vec::new());
    image
        .write_to(&mut png, ImageFormat::Png)
        .map_err(|error| bad_request(&format!("the mask cannot be written: {error}")))?;
    Ok(png_text::with_texts_of(&bytes, png.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::{encoded_name, extended_name};

    #[test]
    fn names_that_are_encoded_as_a_whole_are_decoded() {
        for (name, expected) in [
            (
                "my%20dog%20%281%29%20%E7%8C%AB%2050%25.png",
                Some("my dog (1) 猫 50%.png"),
            ),
            ("50% off.png", None),
            ("50%.png", None),
            ("50%2", None),
            ("dog (1)%20.png", None),
            ("%FF.png", None),
            ("dog.png", None),
        ] {
            assert_eq!(encoded_name(name).as_deref(), expected, "{name}");
        }
    }

    #[test]
    fn extended_names_are_decoded() {
        for (disposition, expected) in [
            (
                "form-data; name=\"image\"; filename=\"my%20dog%20%281%29.png\"; filename*=utf-8''my%20dog%20%281%29.png",
                Some("my dog (1).png"),
            ),
            (
                "form-data; name=image; filename*=UTF-8'en'%E7%8C%AB.png; x=1",
                Some("猫.png"),
            ),
            (
                "form-data; filename*=iso-8859-1''Gr%FC%DFe.png",
                Some("Grüße.png"),
            ),
            ("form-data; filename*=utf-8''%FF.png", None),
            ("form-data; filename=\"a.png\"", None),
        ] {
            assert_eq!(
                extended_name(disposition).as_deref(),
                expected,
                "{disposition}"
            );
        }
    }
}
