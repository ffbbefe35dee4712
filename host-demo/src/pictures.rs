//! Pictures as bytes, and to and from the tensors of `IMAGE` and `MASK`.
//!
//! Reading is limited: a small file can claim to be a huge picture.

use std::borrow::Cow;
use std::io::Cursor;
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use plugin_api::{ErrorCode, NodeError, SharedTensor};

use crate::bounded_file::{self, ReadError};

/// Largest width and height that are read.
pub(crate) const MAX_SIDE: u32 = 8192;
/// Most memory that reading one picture may take, and largest file.
const MAX_BYTES: u64 = 256 << 20;

/// An 8-bit sRGB picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RgbPicture {
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// Row by row, 3 bytes each.
    pub(crate) pixels: Vec<u8>,
}

/// A picture with its transparency, 8 or 16 bits per channel as the file had it.
pub(crate) struct LoadedPicture(DynamicImage);

/// Whether a JPEG's scans have no end: the decoder fills up what is missing with gray.
fn is_cut_off_jpeg(bytes: &[u8]) -> bool {
    const START_OF_IMAGE: [u8; 2] = [0xff, 0xd8];
    const END_OF_IMAGE: [u8; 2] = [0xff, 0xd9];
    const START_OF_SCAN: u8 = 0xda;
    if !bytes.starts_with(&START_OF_IMAGE) {
        return false;
    }
    // Segments before the first scan have lengths; a thumbnail among them has an end of its own.
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = bytes.get(at..at + 4) {
        if marker == 0xff {
            at += 1;
            continue;
        }
        at += 2 + usize::from(u16::from_be_bytes([high, low]));
        if marker == START_OF_SCAN {
            break;
        }
    }
    // In a scan 0xff is followed by 0 or by a marker.
    let scans = bytes.get(at..).unwrap_or_default();
    !scans.windows(2).any(|pair| pair == END_OF_IMAGE)
}

/// Whether a chunk of a WebP claims more bytes than the file has: the decoder would take as much memory for it.
fn is_cut_off_webp(bytes: &[u8]) -> bool {
    let number = |at: usize| {
        let four = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_le_bytes(four) as usize)
    };
    if !bytes.starts_with(b"RIFF") || bytes.get(8..12) != Some(b"WEBP") {
        return false;
    }
    // What stands behind the end that the file claims is not read.
    let end = number(4).map_or(0, |size| size.saturating_add(8));
    let mut at = 12;
    while at < end
        && let Some(size) = number(at + 4)
    {
        at += 8 + size;
        if at > bytes.len() {
            return true;
        }
        at += size % 2;
    }
    false
}

impl LoadedPicture {
    /// Reads a picture; `name` is what errors call it.
    ///
    /// # Errors
    /// Not a picture that is known, a broken one, or one that is too large.
    pub(crate) fn decode(name: &str, bytes: &[u8]) -> Result<Self, NodeError> {
        let refuse = |reason: String| {
            NodeError::invalid_input("image", format!("the picture {name} {reason}"))
        };
        let unreadable = |error: image::ImageError| {
            refuse(format!(
                "cannot be read ({error}); PNG, JPEG and WebP files are"
            ))
        };
        let cut_off = || refuse("ends before its last row; copy or download it again".to_owned());
        Self::check_size(name, bytes)?;
        if is_cut_off_webp(bytes) {
            return Err(cut_off());
        }
        let reader = || ImageReader::new(Cursor::new(bytes)).with_guessed_format();
        let mut reader = reader().map_err(|error| refuse(format!("cannot be read ({error})")))?;
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        limits.max_alloc = Some(MAX_BYTES);
        reader.limits(limits);
        let mut decoder = reader.into_decoder().map_err(unreadable)?;
        // The decoder of a format asks for itself at most.
        if decoder.total_bytes() > MAX_BYTES {
            return Err(refuse(format!(
                "takes {} MiB, at most {} are read; scale it down, or save it with 8 bits",
                decoder.total_bytes() >> 20,
                MAX_BYTES >> 20
            )));
        }
        // Cameras turn the sensor's picture by a note in the file.
        let orientation = decoder.orientation().map_err(unreadable)?;
        let mut picture = DynamicImage::from_decoder(decoder).map_err(unreadable)?;
        picture.apply_orientation(orientation);
        if is_cut_off_jpeg(bytes) {
            return Err(cut_off());
        }
        Ok(Self(picture))
    }

    /// Checks what the file claims to be, without reading its pixels.
    ///
    /// # Errors
    /// It is too large. What cannot be told from its head is left to [`decode`](Self::decode).
    pub(crate) fn check_size(name: &str, bytes: &[u8]) -> Result<(), NodeError> {
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
        let size = reader.map(ImageReader::into_dimensions);
        if let Ok(Ok((width, height))) = size
            && (width > MAX_SIDE || height > MAX_SIDE)
        {
            let message = format!(
                "the picture {name} is {width}×{height} pixels, the largest size that is read is \
                 {MAX_SIDE}×{MAX_SIDE}; scale it down"
            );
            return Err(NodeError::invalid_input("image", message));
        }
        Ok(())
    }

    /// Without its transparency.
    pub(crate) fn opaque(&self) -> DynamicImage {
        self.0.to_rgb8().into()
    }

    /// Black with its transparency.
    pub(crate) fn only_transparency(&self) -> DynamicImage {
        let mut picture = self.0.to_rgba8();
        for pixel in picture.pixels_mut() {
            pixel.0 = [0, 0, 0, pixel.0[3]];
        }
        picture.into()
    }

    /// With the transparency of another picture, which is scaled to this one's size.
    pub(crate) fn with_transparency_of(&self, other: &Self) -> DynamicImage {
        let mut picture = self.0.to_rgba8();
        let (width, height) = picture.dimensions();
        let alpha = if other.0.width() == width && other.0.height() == height {
            other.0.to_rgba8()
        } else {
            let filter = image::imageops::FilterType::Triangle;
            other.0.resize_exact(width, height, filter).to_rgba8()
        };
        for (pixel, alpha) in picture.pixels_mut().zip(alpha.pixels()) {
            pixel.0[3] = alpha.0[3];
        }
        picture.into()
    }

    fn size(&self) -> (usize, usize) {
        (self.0.width() as usize, self.0.height() as usize)
    }

    /// Values of one channel (0 red … 3 alpha), in [0, 1].
    pub(crate) fn channel(&self, channel: usize) -> Vec<f32> {
        if self.is_deep() {
            self.0
                .to_rgba32f()
                .pixels()
                .map(|pixel| pixel.0[channel])
                .collect()
        } else {
            self.0
                .to_rgba8()
                .pixels()
                .map(|pixel| f32::from(pixel.0[channel]) / 255.0)
                .collect()
        }
    }

    fn is_deep(&self) -> bool {
        let color = self.0.color();
        color.bytes_per_pixel() > color.channel_count()
    }

    /// As `IMAGE`: `[1, H, W, 3]`.
    pub(crate) fn image(&self) -> Result<SharedTensor, NodeError> {
        let values: Vec<f32> = if self.is_deep() {
            self.0.to_rgb32f().into_raw()
        } else {
            self.0
                .to_rgb8()
                .into_raw()
                .into_iter()
                .map(|byte| f32::from(byte) / 255.0)
                .collect()
        };
        let (width, height) = self.size();
        tensor(values, &[1, height, width, 3])
    }

    /// Where the picture is transparent, as `MASK` `[1, H, W]`: 0 everywhere if it has no transparency.
    pub(crate) fn transparency(&self) -> Result<SharedTensor, NodeError> {
        let (width, height) = self.size();
        let values = if self.0.color().has_alpha() {
            self.channel(3)
                .into_iter()
                .map(|alpha| 1.0 - alpha)
                .collect()
        } else {
            vec![0.0; width * height]
        };
        tensor(values, &[1, height, width])
    }

    /// One channel as `MASK` `[1, H, W]`.
    pub(crate) fn mask(&self, channel: usize) -> Result<SharedTensor, NodeError> {
        let (width, height) = self.size();
        tensor(self.channel(channel), &[1, height, width])
    }
}

/// Bytes of a picture file.
///
/// # Errors
/// It cannot be read, or is too large.
pub(crate) fn read_file(path: &Path) -> Result<Vec<u8>, NodeError> {
    let refuse = |reason: String| {
        let mut error = NodeError::new(
            ErrorCode::InvalidFile,
            format!("the picture {} {reason}", path.display()),
        );
        error.input = "image".into();
        error
    };
    bounded_file::read(path, MAX_BYTES).map_err(|error| match error {
        ReadError::TooLarge(bytes) => {
            refuse(format!("has {bytes} bytes, at most {MAX_BYTES} are read"))
        }
        ReadError::System(error) => refuse(format!("cannot be read: {error}")),
    })
}

/// The values of a tensor, all checked to be finite; `input` is what errors call it.
///
/// # Errors
/// NaN or infinity, or memory that cannot be read.
pub(crate) fn finite_values<'a>(
    input: &str,
    tensor: &'a SharedTensor,
) -> Result<Cow<'a, [f32]>, NodeError> {
    let values = picture_ports::values(input, tensor)?;
    if values.iter().all(|value| value.is_finite()) {
        return Ok(values);
    }
    Err(NodeError::invalid_input(
        input,
        format!("{input} holds values that are not finite; check the node that made it"),
    ))
}

pub(crate) fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<SharedTensor, NodeError> {
    SharedTensor::from_vec(values, shape)
        .map_err(|error| NodeError::new(ErrorCode::Internal, error.to_string()))
}

/// The pictures of an `IMAGE` batch; `input` is what errors call it.
///
/// # Errors
/// Another shape, values that are not finite, or memory that cannot be read.
pub(crate) fn from_image(input: &str, image: &SharedTensor) -> Result<Vec<RgbPicture>, NodeError> {
    let [_, height, width] = picture_ports::image_size(input, image)?;
    let values = finite_values(input, image)?;
    Ok(values
        .chunks_exact(width * height * 3)
        .map(|pixels| rgb(width, height, pixels))
        .collect())
}

/// The masks of a `MASK` batch (or attention maps) as planes of values.
///
/// # Errors
/// As [`from_image`].
pub(crate) fn planes(
    input: &str,
    masks: &SharedTensor,
) -> Result<(usize, usize, Vec<Vec<f32>>), NodeError> {
    let [_, height, width] = picture_ports::mask_size(input, masks)?;
    let values = finite_values(input, masks)?;
    Ok((
        width,
        height,
        values
            .chunks_exact(width * height)
            .map(<[f32]>::to_vec)
            .collect(),
    ))
}

/// A preview `[H, W, 3]`; also takes a batch of one.
///
/// # Errors
/// As [`from_image`].
pub(crate) fn from_preview(picture: &SharedTensor) -> Result<RgbPicture, NodeError> {
    let (height, width) = match picture.shape()[..] {
        [height, width, 3] | [1, height, width, 3] if height * width > 0 => (height, width),
        ref shape => {
            let message = format!("a preview is [height, width, 3], got the shape {shape:?}");
            return Err(NodeError::new(ErrorCode::Internal, message));
        }
    };
    Ok(rgb(width, height, &finite_values("preview", picture)?))
}

/// Values in [0, 1] as a gray picture.
pub(crate) fn gray(width: usize, height: usize, values: &[f32]) -> RgbPicture {
    let pixels = values.iter().flat_map(|&value| [byte(value); 3]).collect();
    RgbPicture {
        width,
        height,
        pixels,
    }
}

/// Values of any range as a heat map: dark blue for the smallest, yellow for the largest.
pub(crate) fn heat(width: usize, height: usize, values: &[f32]) -> RgbPicture {
    let (min, max) = values
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| {
            (lo.min(v), hi.max(v))
        });
    let range = if max > min { max - min } else { 1.0 };
    let pixels = values
        .iter()
        .flat_map(|&value| ramp((value - min) / range))
        .collect();
    RgbPicture {
        width,
        height,
        pixels,
    }
}

/// A color scale with steady lightness, so that it also reads in gray.
fn ramp(value: f32) -> [u8; 3] {
    const STOPS: [[f32; 3]; 6] = [
        [0.05, 0.03, 0.25],
        [0.33, 0.06, 0.48],
        [0.63, 0.16, 0.46],
        [0.89, 0.34, 0.29],
        [0.98, 0.62, 0.16],
        [0.98, 0.95, 0.60],
    ];
    let place = value.clamp(0.0, 1.0) * (STOPS.len() - 1) as f32;
    let low = (place as usize).min(STOPS.len() - 2);
    let part = place - low as f32;
    [0, 1, 2].map(|c| byte(STOPS[low][c] * (1.0 - part) + STOPS[low + 1][c] * part))
}

fn rgb(width: usize, height: usize, values: &[f32]) -> RgbPicture {
    RgbPicture {
        width,
        height,
        pixels: values.iter().map(|&value| byte(value)).collect(),
    }
}

fn byte(value: f32) -> u8 {
    (value.clamp(0.0, 1.0) * 255.0).round() as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::png_text;

    #[test]
    fn bytes_survive_the_way_through_a_tensor() {
        let pixels: Vec<u8> = (0..=255).cycle().take(16 * 17 * 3).collect();
        let picture = RgbPicture {
            width: 16,
            height: 17,
            pixels,
        };
        let png = png_text::encode(&picture, &[]).unwrap();
        let loaded = LoadedPicture::decode("a.png", &png).unwrap();
        assert_eq!(loaded.image().unwrap().shape(), [1, 17, 16, 3]);
        assert_eq!(
            from_image("images", &loaded.image().unwrap()).unwrap(),
            [picture]
        );
        assert!(
            loaded
                .transparency()
                .unwrap()
                .to_f32()
                .unwrap()
                .iter()
                .all(|&v| v == 0.0)
        );
    }

    #[test]
    fn what_is_no_picture_is_refused_by_name() {
        let error = LoadedPicture::decode("notes.txt", b"hello").err().unwrap();
        assert!(error.message.contains("notes.txt"), "{error}");
    }

    #[test]
    fn a_jpeg_that_is_cut_off_is_refused() {
        let noise = image::RgbImage::from_fn(48, 40, |x, y| {
            image::Rgb([
                (x * y % 251) as u8,
                (x * 7 % 256) as u8,
                (y * 5 % 256) as u8,
            ])
        });
        let mut jpeg = Vec::new();
        let format = image::ImageFormat::Jpeg;
        noise.write_to(&mut Cursor::new(&mut jpeg), format).unwrap();
        assert!(LoadedPicture::decode("a.jpg", &jpeg).is_ok());
        // A thumbnail's end is not the picture's; what lies behind the end does no harm.
        let thumbnail = [0xff, 0xe1, 0, 6, 0xff, 0xd8, 0xff, 0xd9];
        let with_thumbnail = [&jpeg[..2], &thumbnail, &jpeg[2..], b"more"].concat();
        assert!(LoadedPicture::decode("a.jpg", &with_thumbnail).is_ok());
        for cut in [0, 2].into_iter().chain((20..jpeg.len()).step_by(37)) {
            let cut_off = [&with_thumbnail[..10], &jpeg[2..jpeg.len() - cut.max(2)]].concat();
            let error = LoadedPicture::decode("a.jpg", &cut_off).err();
            assert!(error.is_some_and(|e| e.message.contains("a.jpg")), "{cut}");
        }
    }

    #[test]
    fn attention_of_one_value_has_a_color_too() {
        assert_eq!(heat(2, 1, &[3.0, 3.0]).pixels.len(), 6);
        assert_ne!(
            heat(2, 1, &[0.0, 1.0]).pixels[..3],
            heat(2, 1, &[0.0, 1.0]).pixels[3..]
        );
    }

    #[test]
    fn a_picture_of_too_many_bytes_is_refused_before_it_is_read() {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, MAX_SIDE, MAX_SIDE);
        encoder.set_color(png::ColorType::Rgba);
        encoder.set_depth(png::BitDepth::Sixteen);
        let mut writer = encoder.write_header().unwrap();
        writer.write_chunk(png::chunk::IDAT, &[]).unwrap();
        drop(writer);
        let error = LoadedPicture::decode("a.png", &bytes).err().unwrap();
        assert!(error.message.contains("takes 512 MiB, at most"), "{error}");
    }
}
