//! Softmax over the labels of one pixel, in fixed-width lanes that the compiler turns into vector instructions.

/// Adding and subtracting this rounds a float of magnitude < 2²² to the nearest integer, ties to even, in two
/// additions on any processor (`f32::round_ties_even` is a library call on baseline x86-64).
const ROUNDING: f32 = 12_582_912.0; // 1.5 · 2²³

/// Nearest integer, ties to even, for |x| < 2²².
#[inline(always)]
pub(crate) fn round_ties_even(x: f32) -> i32 {
    // The low bits of the sum count in two's complement.
    (x + ROUNDING).to_bits().wrapping_sub(ROUNDING.to_bits()) as i32
}

/// Probabilities below `exp(SMALLEST_LOGIT)` ≈ 1e-20 of the largest become exactly zero. They change no other value
/// in f32, but products of them in the lattice would be subnormal, which costs many processors two orders of
/// magnitude per operation.
const SMALLEST_LOGIT: f32 = -46.0;

/// `exp(x)` for x ≤ 0 (relative error < 2e-7), exactly 0 below [`SMALLEST_LOGIT`].
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; the Taylor-like minimax polynomial of degree 7 is that of Cephes `expf`.
#[inline(always)]
fn exp_nonpositive(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Selections, not branches: the compiler turns the loop around this into vectors.
    let counts = x >= SMALLEST_LOGIT;
    let clamped = if counts { x } else { SMALLEST_LOGIT };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUNDING;
    let n = shifted - ROUNDING;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4_f32;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = p * r + coefficient;
    }
    let mantissa = p * r * r + r + 1.0;
    // The low bits of `shifted` are n in two's complement: moved into the exponent field they scale by 2ⁿ.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    let kept = if counts { u32::MAX } else { 0 };
    f32::from_bits((mantissa * scale).to_bits() & kept)
}

/// Pixels whose softmax is taken at once.
pub(crate) const PIXELS: usize = 64;

/// Values of whole pixels side by side, whatever their lanes: what fills the widest registers.
const SIDE_BY_SIDE: usize = 32;

/// `softmax(logits)` of each pixel, in place; a lane at negative infinity gets exactly 0. At least one lane of each pixel
/// must be finite.
#[inline(always)]
pub(crate) fn softmax<const LANES: usize>(pixels: &mut [[f32; LANES]; PIXELS]) {
    const { assert!(LANES.is_power_of_two() && SIDE_BY_SIDE.is_multiple_of(LANES)) };
    let mut scales = [0.0; PIXELS];
    let (chunks, _) = pixels.as_flattened_mut().as_chunks_mut::<SIDE_BY_SIDE>();
    for (x, sums) in chunks
        .iter_mut()
        .zip(scales.chunks_mut(SIDE_BY_SIDE / LANES))
    {
        // One instruction; `f32::max`, which asks for NaN too, are four.
        let max = over_lanes::<LANES>(x, |a, b| if a > b { a } else { b });
        for i in 0..SIDE_BY_SIDE {
            x[i] = exp_nonpositive(x[i] - max[i]);
        }
        let sum = over_lanes::<LANES>(x, |a, b| a + b);
        for (pixel, of_pixel) in sums.iter_mut().enumerate() {
            *of_pixel = sum[pixel * LANES];
        }
    }
    // A division takes as long as all else together: one for each pixel.
    for scale in &mut scales {
        *scale = 1.0 / *scale;
    }
    for (q, scale) in pixels.iter_mut().zip(scales) {
        for q in q {
            *q *= scale;
        }
    }
}

/// In every lane what all lanes of its pixel come to, in the same order for each.
#[inline(always)]
fn over_lanes<const LANES: usize>(
    x: &[f32; SIDE_BY_SIDE],
    combine: impl Fn(f32, f32) -> f32,
) -> [f32; SIDE_BY_SIDE] {
    let mut y = *x;
    // Pairs of lanes, then pairs of pairs, ...; written out, so that each is one exchange within a register.
    let mut exchange = |distance: usize| {
        let x = y;
        for i in 0..SIDE_BY_SIDE {
            y[i] = combine(x[i], x[i ^ distance]);
        }
    };
    if LANES > 1 {
        exchange(1);
    }
    if LANES > 2 {
        exchange(2);
    }
    if LANES > 4 {
        exchange(4);
    }
    if LANES > 8 {
        exchange(8);
    }
    if LANES > 16 {
        exchange(16);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_follows_the_library() {
        let mut worst = 0.0_f64;
        for step in 0..=46_000 {
            let x = -(step as f32) / 1000.0;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_nonpositive(x)) / exact - 1.0).abs());
        }
        println!("exp: largest relative error {worst:.1e}");
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp_nonpositive(0.0), 1.0);
    }

    #[test]
    fn nothing_subnormal_leaves() {
        for x in [-46.1, -87.0, -1e4, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp_nonpositive(x), 0.0);
        }
        let mut pixels = [[0.0, -1.0, f32::NEG_INFINITY, f32::NEG_INFINITY]; PIXELS];
        softmax(&mut pixels);
        for q in pixels {
            assert!((q[0] + q[1] - 1.0).abs() < 1e-6);
            assert_eq!(q[2..], [0.0, 0.0]);
        }
    }

    fn follows_the_definition<const LANES: usize>() {
        let mut pixels: [[f32; LANES]; PIXELS] = std::array::from_fn(|pixel| {
            std::array::from_fn(|lane| ((pixel * 37 + lane * 101) % 64) as f32 / 3.0)
        });
        let logits = pixels;
        softmax(&mut pixels);
        for (q, logits) in pixels.iter().zip(&logits) {
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            for (&q, &logit) in q.iter().zip(logits) {
                let exact = f64::from(logit).exp() / sum;
                assert!(
                    (f64::from(q) - exact).abs() < 1e-6,
                    "{LANES} lanes: {q} {exact}"
                );
            }
        }
    }

    #[test]
    fn every_width_follows_the_definition() {
        follows_the_definition::<2>();
        follows_the_definition::<4>();
        follows_the_definition::<8>();
        follows_the_definition::<16>();
        follows_the_definition::<32>();
    }

    #[test]
    fn rounding_breaks_ties_to_even() {
        for x in [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49, -0.51, 30_000.5] {
            assert_eq!(round_ties_even(x) as f32, f32::round_ties_even(x));
        }
    }
}
