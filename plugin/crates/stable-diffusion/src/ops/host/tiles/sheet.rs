//! How pictures are packed for 3x3 convolutions, and what is a pixel in it.
//!
//! Pictures of a batch stand below each other. Packed rows are one zero longer than the picture's, which stands left of the next
//! row as it stands right of its own, and a row of zeros ends every picture; sums of those places are thrown away.

use std::ops::Range;

use rayon::prelude::*;

use super::block::{STEP, Step, Steps, TILE};
use super::kernel::Tiles;
use super::pack::{LINES, TAPS};

/// Words of one pixel in a step.
pub(super) const PIXEL: usize = STEP / 2;
/// Pixels of the next step that one of three taps brings into the cache: with neighbors on both sides, those of a tall block.
const AHEAD: usize = 17;

/// How packed pictures lie. A place is where a pixel or a zero is; rows are counted over all pictures, with the one of zeros
/// that ends each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sheet {
    n_samples: usize,
    height: usize,
    width: usize,
    /// Of a part of a step, with the zeros that surround the pictures.
    n_places: usize,
}

/// Places of a tile that are pixels of one row.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) sample: usize,
    pub(super) pixels: Range<usize>,
    /// The first one's place in the tile.
    pub(super) place: usize,
}

impl Sheet {
    pub(super) fn of(n_samples: usize, [height, width]: [usize; 2]) -> Self {
        let mut sheet = Self {
            n_samples,
            height,
            width,
            n_places: 0,
        };
        // The last tile may reach beyond the last pixel, and its last tap a row and a place further.
        sheet.n_places = 2 * sheet.lead() + n_samples * (height + 1) * sheet.pitch() + LINES;
        sheet
    }

    /// Words of a part of a step.
    pub(super) fn part(&self) -> usize {
        self.n_places * PIXEL
    }

    /// Places from a row to the next.
    fn pitch(&self) -> usize {
        self.width + 1
    }

    /// Zeros before the first row.
    fn lead(&self) -> usize {
        self.pitch() + 1
    }

    /// What steps of so many times 32 channels, tap by tap, add to the place of the first tap.
    pub(super) fn steps(&self, n_parts: usize, n_steps: usize) -> Steps {
        let of_tap = |step: usize, tap: usize| {
            let [offset, ahead] =
                [(step, tap % 3), (step + 1, tap % 3 * AHEAD)].map(|(step, x)| {
                    let place = step * n_parts * self.n_places + tap / 3 * self.pitch() + x;
                    place * PIXEL
                });
            Step { offset, ahead }
        };
        let steps = (0..n_steps).flat_map(|step| (0..TAPS).map(move |tap| of_tap(step, tap)));
        Steps::new(steps.collect())
    }

    /// Makes zeros of all that is no pixel.
    fn clear_borders(&self, words: &mut [u32]) {
        let (pitch, width) = (self.pitch(), self.width);
        let mut clear =
            |places: Range<usize>| words[places.start * PIXEL..places.end * PIXEL].fill(0);
        clear(0..self.lead());
        let n_rows = self.n_samples * (self.height + 1);
        for row in 0..n_rows {
            let start = self.lead() + row * pitch;
            let is_zeros = row % (self.height + 1) == self.height;
            clear(if is_zeros { start } else { start + width }..start + pitch);
        }
        clear(self.lead() + n_rows * pitch..self.n_places);
    }

    /// Where the first tap of tiles is that have all pixels of some rows.
    pub(super) fn tiles(&self, rows: Range<usize>) -> Vec<usize> {
        if self.width.is_multiple_of(LINES) {
            // None of them has anything else.
            let rows = rows.filter(|row| row % (self.height + 1) < self.height);
            return rows
                .flat_map(|row| {
                    (0..self.width)
                        .step_by(LINES)
                        .map(move |x| row * self.pitch() + x)
                })
                .collect();
        }
        (rows.start * self.pitch()..rows.end * self.pitch() - 1)
            .step_by(LINES)
            .collect()
    }

    /// The pixels of a tile.
    pub(super) fn runs(&self, start: usize) -> impl Iterator<Item = Run> {
        let (pitch, height, width) = (self.pitch(), self.height, self.width);
        let end = start + LINES;
        (start / pitch..end.div_ceil(pitch)).filter_map(move |row| {
            let (sample, y) = (row / (height + 1), row % (height + 1));
            let first = start.max(row * pitch);
            let last = end.min(row * pitch + width);
            let pixel = |place: usize| y * width + place - row * pitch;
            (y < height && first < last).then(|| Run {
                sample,
                pixels: pixel(first)..pixel(last),
                place: first - start,
            })
        })
    }

    /// Pictures `x` of so many channels, step by step from one of them on, part by part: pixel by pixel, one picture after the
    /// other.
    pub(super) fn pack<const P: usize>(
        &self,
        tiles: Tiles,
        x: &[f32],
        n_in: usize,
        first_step: usize,
        words: &mut [u32],
    ) {
        let part = self.part();
        let steps = words.par_chunks_exact_mut(P * part).enumerate();
        steps.for_each(|(step, words)| {
            for words in words.chunks_exact_mut(part) {
                self.clear_borders(words);
            }
            let channels = (first_step + step) * STEP..n_in.min((first_step + step + 1) * STEP);
            let n_pixels = self.height * self.width;
            for (sample, x) in x.chunks_exact(n_in * n_pixels).enumerate() {
                let x = &x[channels.start * n_pixels..channels.end * n_pixels];
                for (y, row) in (0..n_pixels).step_by(self.width).enumerate() {
                    let place = self.lead() + (sample * (self.height + 1) + y) * self.pitch();
                    self.pack_row::<P>(
                        tiles,
                        x,
                        row..row + self.width,
                        &mut words[place * PIXEL..],
                    );
                }
            }
        });
    }

    /// Pixels of a row of a picture, of up to 32 channels.
    fn pack_row<const P: usize>(
        &self,
        tiles: Tiles,
        channels: &[f32],
        pixels: Range<usize>,
        words: &mut [u32],
    ) {
        let (part, n_pixels) = (self.part(), self.height * self.width);
        for (i, start) in pixels.clone().step_by(LINES).enumerate() {
            let words = &mut words[i * TILE..];
            let n = LINES.min(pixels.end - start);
            if n == LINES && channels.len() == STEP * n_pixels {
                let values = &channels[start..];
                tiles.across::<P, f32>(values, n_pixels, words, part, true);
                continue;
            }
            let mut copy = [0.0; STEP * LINES];
            for (copy, x) in copy
                .chunks_exact_mut(LINES)
                .zip(channels.chunks_exact(n_pixels))
            {
                copy[..n].copy_from_slice(&x[start..start + n]);
            }
            let mut tile = [[0; TILE]; P];
            let packed = tile.as_flattened_mut();
            tiles.across::<P, f32>(&copy, LINES, packed, TILE, true);
            for (p, tile) in tile.iter().enumerate() {
                words[p * part..][..n * PIXEL].copy_from_slice(&tile[..n * PIXEL]);
            }
        }
    }
}
