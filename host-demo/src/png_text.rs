//! PNG files with the workflow inside, as ComfyUI writes them: dropped on the editor, they restore the graph.
//!
//! `tEXt` is Latin-1 by its specification and read as UTF-8 by the editor, so the JSON is escaped to ASCII, which is
//! both.

use std::fmt::Write as _;
use std::io::Cursor;

use plugin_api::{ErrorCode, NodeError};
use png::text_metadata::EncodableTextChunk;

use crate::pictures::RgbPicture;

/// A PNG file of `picture` with text chunks (keyword, ASCII text).
///
/// # Errors
/// The encoder's, which a picture of the right length does not meet.
pub(crate) fn encode(
    picture: &RgbPicture,
    texts: &[(String, String)],
) -> Result<Vec<u8>, NodeError> {
    let failed = |error: png::EncodingError| {
        NodeError::new(
            ErrorCode::Internal,
            format!("a picture cannot be written as PNG: {error}"),
        )
    };
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, picture.width as u32, picture.height as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in texts {
        encoder
            .add_text_chunk(keyword.clone(), text.clone())
            .map_err(failed)?;
    }
    let mut writer = encoder.write_header().map_err(failed)?;
    writer.write_image_data(&picture.pixels).map_err(failed)?;
    writer.finish().map_err(failed)?;
    Ok(bytes)
}

/// Bytes that a packed text may unfold to.
const MAX_TEXT: usize = 16 << 20;

/// The workflow inside of a PNG file: the editor's document, else its API form. Of another format, or without either,
/// `None`.
pub(crate) fn workflow(png: &[u8]) -> Option<String> {
    let info = info(png)?;
    let text = |keyword: &str| {
        let plain = info.uncompressed_latin1_text.iter();
        let packed = info.compressed_latin1_text.iter();
        let utf8 = info.utf8_text.iter();
        plain
            .filter(|chunk| chunk.keyword == keyword)
            .map(|chunk| chunk.text.clone())
            .chain(
                packed
                    .filter(|chunk| chunk.keyword == keyword)
                    .filter_map(|chunk| {
                        let mut chunk = chunk.clone();
                        chunk.decompress_text_with_limit(MAX_TEXT).ok()?;
                        chunk.get_text().ok()
                    }),
            )
            .chain(
                utf8.filter(|chunk| chunk.keyword == keyword)
                    .filter_map(|chunk| {
                        let mut chunk = chunk.clone();
                        chunk.decompress_text_with_limit(MAX_TEXT).ok()?;
                        chunk.get_text().ok()
                    }),
            )
            .next()
    };
    text("workflow").or_else(|| text("prompt"))
}

/// What a PNG file says of itself, behind its pixels too. Where it breaks off, what stood before.
fn info(png: &[u8]) -> Option<png::Info<'static>> {
    let mut reader = png::Decoder::new(Cursor::new(png)).read_info().ok()?;
    let _ = reader.finish();
    Some(reader.info().clone())
}

/// A PNG file with the texts of another one: a picture that was changed keeps its workflow. `original` may be of another
/// format, which has none.
pub(crate) fn with_texts_of(original: &[u8], mut png: Vec<u8>) -> Vec<u8> {
    /// The signature, and a header of 13 bytes with its length, type and checksum.
    const BEHIND_HEADER: usize = 8 + 13 + 12;
    let Some(info) = info(original) else {
        return png;
    };
    let mut texts = Vec::new();
    // One that cannot be written, such as without a keyword, is left out.
    for text in &info.uncompressed_latin1_text {
        let _ = text.encode(&mut texts);
    }
    for text in &info.compressed_latin1_text {
        let _ = text.encode(&mut texts);
    }
    for text in &info.utf8_text {
        let _ = text.encode(&mut texts);
    }
    png.splice(BEHIND_HEADER..BEHIND_HEADER, texts);
    png
}

/// JSON text in ASCII: everything else becomes `\uXXXX`.
pub(crate) fn ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                // Writing to a string cannot fail.
                let _ = write!(text, "\\u{unit:04x}");
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_workflow_comes_back_out_of_the_picture() {
        let workflow = json!({"title": "Füße 🐕", "n": 3});
        let text = ascii(&workflow.to_string());
        assert!(text.is_ascii() && text.contains("\\ud83d\\udc15"), "{text}");
        let picture = RgbPicture {
            width: 2,
            height: 1,
            pixels: vec![1, 2, 3, 4, 5, 6],
        };
        let texts = [
            ("prompt".to_owned(), "{}".to_owned()),
            ("workflow".to_owned(), text),
        ];
        let png = encode(&picture, &texts).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&super::workflow(&png).unwrap()).unwrap(),
            workflow
        );
        let api_only = encode(&picture, &texts[..1]).unwrap();
        assert_eq!(super::workflow(&api_only).unwrap(), "{}");
        assert_eq!(super::workflow(&encode(&picture, &[]).unwrap()), None);
        assert_eq!(super::workflow(b"no picture"), None);
        let reader = png::Decoder::new(std::io::Cursor::new(png))
            .read_info()
            .unwrap();
        let chunks = &reader.info().uncompressed_latin1_text;
        let keywords: Vec<_> = chunks.iter().map(|chunk| chunk.keyword.as_str()).collect();
        assert_eq!(keywords, ["prompt", "workflow"]);
        assert_eq!(
            serde_json::from_str::<Value>(&chunks[1].text).unwrap(),
            workflow
        );
    }

    #[test]
    fn a_changed_picture_keeps_the_texts() {
        let mut original = Vec::new();
        let mut encoder = png::Encoder::new(&mut original, 1, 1);
        encoder
            .add_ztxt_chunk("prompt".to_owned(), "{}".to_owned())
            .unwrap();
        let mut writer = encoder.write_header().unwrap();
        let title = png::text_metadata::ITXtChunk::new("Title", "Füße 🐕");
        writer.write_text_chunk(&title).unwrap();
        writer.write_image_data(&[0]).unwrap();
        let workflow = "{\"nodes\":[]}".to_owned();
        let behind = png::text_metadata::TEXtChunk::new("workflow", workflow.clone());
        writer.write_text_chunk(&behind).unwrap();
        writer.finish().unwrap();
        assert_eq!(super::workflow(&original).as_ref(), Some(&workflow));

        let picture = RgbPicture {
            width: 1,
            height: 1,
            pixels: vec![1, 2, 3],
        };
        let changed = encode(&picture, &[]).unwrap();
        let with_texts = with_texts_of(&original, changed.clone());
        assert_eq!(super::workflow(&with_texts), Some(workflow));
        let read = info(&with_texts).unwrap();
        assert_eq!(read.utf8_text[0].get_text().unwrap(), "Füße 🐕");
        assert_eq!(read.compressed_latin1_text[0].get_text().unwrap(), "{}");
        let pixels = |png: &[u8]| image::load_from_memory(png).unwrap();
        assert_eq!(pixels(&with_texts), pixels(&changed));
        assert_eq!(with_texts_of(b"\xff\xd8 no PNG", changed.clone()), changed);
    }

    #[test]
    fn packed_text_unfolds_to_a_bound() {
        let png = |n: usize, is_utf8: bool| {
            let mut bytes = Vec::new();
            let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
            let text = "7".repeat(n);
            if !is_utf8 {
                encoder.add_ztxt_chunk("workflow".to_owned(), text).unwrap();
            }
            let mut writer = encoder.write_header().unwrap();
            if is_utf8 {
                let mut chunk = png::text_metadata::ITXtChunk::new("workflow", "7".repeat(n));
                chunk.compressed = true;
                writer.write_text_chunk(&chunk).unwrap();
            }
            writer.write_image_data(&[0]).unwrap();
            writer.finish().unwrap();
            bytes
        };
        for is_utf8 in [false, true] {
            let read = |n| super::workflow(&png(n, is_utf8));
            assert_eq!(read(MAX_TEXT).unwrap().len(), MAX_TEXT);
            assert_eq!(read(MAX_TEXT + 1), None);
        }
    }
}
