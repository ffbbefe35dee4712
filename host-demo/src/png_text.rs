//! PNG files with the workflow inside, as ComfyUI writes them: dropped on the editor, they restore the graph.
//!
//! `tEXt` is Latin-1 by its specification and read as UTF-8 by the editor, so the JSON is escaped to ASCII, which is
//! both.

use std::fmt::Write as _;

use plugin_api::{ErrorCode, NodeError};

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
    let reader = png::Decoder::new(std::io::Cursor::new(png))
        .read_info()
        .ok()?;
    let info = reader.info();
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
