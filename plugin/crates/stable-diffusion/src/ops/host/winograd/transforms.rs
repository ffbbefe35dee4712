//! Tiles and kernels there and back, a vector of channels at a time.
//!
//! What is multiplied are the values of polynomials at the points 0, ±a, ±b and ∞ (Toom 1963, Cook 1966). Those that differ in
//! their sign only share most of the work. The numbers are such that rounding does little: with 1 and 2, which are found
//! more often, errors are twice as large.

use pulp::{Simd, WithSimd};

use super::super::turn::{Lanes, SIDE};
use super::{M, T};

/// a and b, of which few bits are used.
const POINTS: [f32; 2] = [0.75, 1.5];
const SQUARES: [f32; 2] = [POINTS[0] * POINTS[0], POINTS[1] * POINTS[1]];

/// factor · x + y
#[inline(always)]
fn add<S: Simd>(simd: S, factor: f32, x: S::f32s, y: S::f32s) -> S::f32s {
    simd.mul_add_e_f32s(simd.splat_f32s(factor), x, y)
}

/// factor · x
#[inline(always)]
fn scaled<S: Simd>(simd: S, factor: f32, x: S::f32s) -> S::f32s {
    simd.mul_f32s(simd.splat_f32s(factor), x)
}

/// Bᵀ d
#[inline(always)]
fn seen<S: Simd>(simd: S, d: [S::f32s; T]) -> [S::f32s; T] {
    let [a, b] = POINTS;
    let [a2, b2] = SQUARES;
    let ends = |[first, middle, last]: [S::f32s; 3]| {
        add(simd, a2 * b2, first, add(simd, -(a2 + b2), middle, last))
    };
    let even = [add(simd, -b2, d[2], d[4]), add(simd, -a2, d[2], d[4])];
    let odd = [add(simd, -b2, d[1], d[3]), add(simd, -a2, d[1], d[3])];
    [
        ends([d[0], d[2], d[4]]),
        add(simd, a, odd[0], even[0]),
        add(simd, -a, odd[0], even[0]),
        add(simd, b, odd[1], even[1]),
        add(simd, -b, odd[1], even[1]),
        ends([d[1], d[3], d[5]]),
    ]
}

/// G g
#[inline(always)]
fn kernel<S: Simd>(simd: S, g: [S::f32s; 3]) -> [S::f32s; T] {
    let [a, b] = POINTS;
    let [a2, b2] = SQUARES;
    let scales = [1.0 / (2.0 * a2 * (a2 - b2)), 1.0 / (2.0 * b2 * (b2 - a2))];
    let even = |scale: f32, square: f32| {
        let first = scaled(simd, scale, g[0]);
        add(simd, scale * square, g[2], first)
    };
    let even = [even(scales[0], a2), even(scales[1], b2)];
    [
        scaled(simd, 1.0 / (a2 * b2), g[0]),
        add(simd, scales[0] * a, g[1], even[0]),
        add(simd, -scales[0] * a, g[1], even[0]),
        add(simd, scales[1] * b, g[1], even[1]),
        add(simd, -scales[1] * b, g[1], even[1]),
        g[2],
    ]
}

/// Aᵀ m
#[inline(always)]
fn shown<S: Simd>(simd: S, m: [S::f32s; T]) -> [S::f32s; M] {
    let [a, b] = POINTS;
    let [a2, b2] = SQUARES;
    let sums = [simd.add_f32s(m[1], m[2]), simd.add_f32s(m[3], m[4])];
    let differences = [simd.sub_f32s(m[1], m[2]), simd.sub_f32s(m[3], m[4])];
    let last = add(simd, a2 * a, differences[0], m[5]);
    [
        simd.add_f32s(m[0], simd.add_f32s(sums[0], sums[1])),
        add(simd, b, differences[1], scaled(simd, a, differences[0])),
        add(simd, b2, sums[1], scaled(simd, a2, sums[0])),
        add(simd, b2 * b, differences[1], last),
    ]
}

/// The vector number `index` of sixteen channels.
#[inline(always)]
fn vector<S: Simd>(channels: &[f32], index: usize) -> S::f32s {
    S::as_simd_f32s(&channels[..SIDE]).0[index]
}

#[inline(always)]
fn put<S: Simd>(channels: &mut [f32], index: usize, value: S::f32s) {
    S::as_mut_simd_f32s(&mut channels[..SIDE]).0[index] = value;
}

/// V of a row of tiles, for sixteen channels.
pub(super) struct See<'a> {
    /// Six rows of pixels, with the zeros around a picture.
    pub(super) pixels: &'a [Lanes],
    /// Pixels of a row.
    pub(super) width: usize,
    pub(super) n_tiles: usize,
    /// From the first tile and channel on, and the distances of places and tiles.
    pub(super) seen: &'a mut [f32],
    pub(super) place: usize,
    pub(super) tile: usize,
}

impl WithSimd for See<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let zero = simd.splat_f32s(0.0);
        for tile in 0..self.n_tiles {
            let pixels = &self.pixels[tile * M..];
            let out = &mut self.seen[tile * self.tile..];
            for index in 0..SIDE / S::F32_LANES {
                let mut half = [[zero; T]; T];
                for column in 0..T {
                    let mut d = [zero; T];
                    for (row, d) in d.iter_mut().enumerate() {
                        *d = vector::<S>(&pixels[row * self.width + column], index);
                    }
                    for (half, value) in half.iter_mut().zip(seen(simd, d)) {
                        half[column] = value;
                    }
                }
                for (row, half) in half.into_iter().enumerate() {
                    for (column, value) in seen(simd, half).into_iter().enumerate() {
                        let at = (row * T + column) * self.place;
                        put::<S>(&mut out[at..], index, value);
                    }
                }
            }
        }
    }
}

/// U between some channels that are read and sixteen that are made.
pub(super) struct TransformKernels<'a> {
    /// Nine taps of every channel that is read.
    pub(super) taps: &'a [[Lanes; 9]],
    /// From the first channel of either kind on, and the distances of channels that are read and of places.
    pub(super) kernels: &'a mut [f32],
    pub(super) channel: usize,
    pub(super) place: usize,
}

impl WithSimd for TransformKernels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let zero = simd.splat_f32s(0.0);
        for (channel, taps) in self.taps.iter().enumerate() {
            let out = &mut self.kernels[channel * self.channel..];
            for index in 0..SIDE / S::F32_LANES {
                let mut half = [[zero; 3]; T];
                for column in 0..3 {
                    let g = [0, 3, 6].map(
                        #[inline(always)]
                        |row| vector::<S>(&taps[row + column], index),
                    );
                    for (half, value) in half.iter_mut().zip(kernel(simd, g)) {
                        half[column] = value;
                    }
                }
                for (row, half) in half.into_iter().enumerate() {
                    for (column, value) in kernel(simd, half).into_iter().enumerate() {
                        let at = (row * T + column) * self.place;
                        put::<S>(&mut out[at..], index, value);
                    }
                }
            }
        }
    }
}

/// Y of one tile, for sixteen channels.
pub(super) struct Show<'a> {
    /// From the first channel of the tile on, and the distance of places.
    pub(super) sums: &'a [f32],
    pub(super) place: usize,
    /// What is added to every pixel.
    pub(super) shifts: &'a Lanes,
    pub(super) pixels: &'a mut [Lanes; M * M],
}

impl WithSimd for Show<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let zero = simd.splat_f32s(0.0);
        for index in 0..SIDE / S::F32_LANES {
            let shifts = vector::<S>(self.shifts, index);
            let mut half = [[zero; T]; M];
            for column in 0..T {
                let mut m = [zero; T];
                for (row, m) in m.iter_mut().enumerate() {
                    *m = vector::<S>(&self.sums[(row * T + column) * self.place..], index);
                }
                for (half, value) in half.iter_mut().zip(shown(simd, m)) {
                    half[column] = value;
                }
            }
            for (row, half) in half.into_iter().enumerate() {
                for (column, value) in shown(simd, half).into_iter().enumerate() {
                    let value = simd.add_f32s(value, shifts);
                    put::<S>(&mut self.pixels[row * M + column], index, value);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::super::PLACES;
    use super::*;

    /// All three of one tile give the convolution of it.
    #[test]
    fn a_tile_is_convolved() {
        let number = |i: usize| ((i * 7919) % 23) as f32 / 11.0 - 1.0;
        let pixels: Vec<Lanes> = (0..T * T)
            .map(|i| std::array::from_fn(|lane| number(3 * i + lane)))
            .collect();
        let taps: [Lanes; 9] =
            std::array::from_fn(|tap| std::array::from_fn(|lane| number(5 * tap + 11 * lane)));
        let [mut v, mut u] = [[0.0; PLACES * SIDE]; 2];
        Arch::new().dispatch(See {
            pixels: &pixels,
            width: T,
            n_tiles: 1,
            seen: &mut v,
            place: SIDE,
            tile: 0,
        });
        Arch::new().dispatch(TransformKernels {
            taps: &[taps],
            kernels: &mut u,
            channel: 0,
            place: SIDE,
        });
        let products: Vec<f32> = v.iter().zip(&u).map(|(v, u)| v * u).collect();
        let mut out = [[0.0; SIDE]; M * M];
        Arch::new().dispatch(Show {
            sums: &products,
            place: SIDE,
            shifts: &[0.0; SIDE],
            pixels: &mut out,
        });
        for (pixel, found) in out.iter().enumerate() {
            for (lane, found) in found.iter().enumerate() {
                let expected: f32 = (0..9)
                    .map(|tap| {
                        let [row, column] = [pixel / M + tap / 3, pixel % M + tap % 3];
                        pixels[row * T + column][lane] * taps[tap][lane]
                    })
                    .sum();
                assert!(
                    (found - expected).abs() < 1e-5,
                    "{pixel}: {found} {expected}"
                );
            }
        }
    }
}
