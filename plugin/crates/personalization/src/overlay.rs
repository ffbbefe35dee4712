//! Masks and maps drawn over a picture, for people.

use crate::mask::ImageMasks;
use crate::scene::Picture;

/// Colors of the concepts, sRGB: Okabe and Ito's palette, told apart by color-blind people too.
pub const PALETTE: [[u8; 3]; 7] = [
    [230, 159, 0],
    [86, 180, 233],
    [0, 158, 115],
    [240, 228, 66],
    [0, 114, 178],
    [213, 94, 0],
    [204, 121, 167],
];

/// Share of the color in a tinted pixel.
const TINT: f32 = 0.55;

/// The picture with every concept's mask in its color, `[H, W, 3]` bytes.
#[must_use]
pub fn masks_over(picture: &Picture, masks: &ImageMasks) -> Vec<u8> {
    let mut rgb = picture.rgb8().to_vec();
    for (pixel, channels) in rgb.chunks_exact_mut(3).enumerate() {
        for (concept, plane) in masks.planes().iter().enumerate() {
            if plane.get(pixel).is_some_and(|&v| v != 0) {
                blend(channels, PALETTE[concept % PALETTE.len()], TINT);
            }
        }
    }
    rgb
}

/// What one mask keeps of the picture; the rest is faded, `[H, W, 3]` bytes.
#[must_use]
pub fn cut_out(picture: &Picture, mask: &[u8]) -> Vec<u8> {
    let mut rgb = picture.rgb8().to_vec();
    for (channels, _) in rgb
        .chunks_exact_mut(3)
        .zip(mask)
        .filter(|(_, inside)| **inside == 0)
    {
        blend(channels, [245, 245, 245], 0.85);
    }
    rgb
}

/// A map `[H · W]` of any range as heat over the gray picture, `[H, W, 3]` bytes.
#[must_use]
pub fn heat_over(picture: &Picture, map: &[f32]) -> Vec<u8> {
    let largest = map.iter().copied().fold(f32::MIN, f32::max);
    let smallest = map.iter().copied().fold(f32::MAX, f32::min);
    let mut rgb = picture.rgb8().to_vec();
    for (channels, value) in rgb.chunks_exact_mut(3).zip(map) {
        let gray = (channels.iter().map(|&v| u32::from(v)).sum::<u32>() / 3) as u8;
        channels.fill(gray / 2);
        let heat = (value - smallest) / (largest - smallest).max(1e-12);
        blend(channels, heat_color(heat), 0.25 + 0.65 * heat);
    }
    rgb
}

/// Black, violet, red, yellow, white over [0, 1].
fn heat_color(heat: f32) -> [u8; 3] {
    const STOPS: [[f32; 3]; 5] = [
        [0.0, 0.0, 4.0],
        [81.0, 18.0, 124.0],
        [183.0, 55.0, 121.0],
        [252.0, 137.0, 97.0],
        [252.0, 253.0, 191.0],
    ];
    let place = heat.clamp(0.0, 1.0) * 4.0;
    let low = (place as usize).min(3);
    let share = place - low as f32;
    std::array::from_fn(|c| (STOPS[low][c] * (1.0 - share) + STOPS[low + 1][c] * share) as u8)
}

fn blend(channels: &mut [u8], color: [u8; 3], share: f32) {
    for (channel, color) in channels.iter_mut().zip(color) {
        *channel = (f32::from(*channel) * (1.0 - share) + f32::from(color) * share) as u8;
    }
}
