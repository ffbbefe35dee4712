//! Softmax over the labels of one pixel, in fixed-width lanes that the compiler turns into vector instructions.

/// Adding and subtracting this rounds a float of magnitude < 2²² to the nearest integer, ties to even, in two
/// additions on any processor (`f32::round_ties_even` is a library call on baseline x86-64).
const ROUNDING: f32 = 12_582_912.0; // 1.5 · 2²³

/// Nearest integer, ties to even, for |x| < 2²².
pub(crate) fn round_ties_even(x: f32) -> f32 {
    (x + ROUNDING) - ROUNDING
}

/// Probabilities below `exp(SMALLEST_LOGIT)` ≈ 1e-20 of the largest become exactly zero. They change no other value
/// in f32, but products of them in the lattice would be subnormal, which costs many processors two orders of
/// magnitude per operation.
const SMALLEST_LOGIT: f32 = -46.0;

/// `exp(x)` for x ≤ 0 (relative error < 2e-7), exactly 0 below [`SMALLEST_LOGIT`].
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; the Taylor-like minimax polynomial of degree 7 is that of Cephes `expf`.
fn exp_nonpositive(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.max(SMALLEST_LOGIT);
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
    if x < SMALLEST_LOGIT {
        0.0
    } else {
        mantissa * scale
    }
}

/// `softmax(logits)`; a lane at negative infinity gets exactly 0. At least one lane must be finite.
pub(crate) fn softmax<const LANES: usize>(logits: &[f32; LANES]) -> [f32; LANES] {
    let max = logits
        .iter()
        .fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    let mut q = [0.0; LANES];
    for (q, &logit) in q.iter_mut().zip(logits) {
        *q = exp_nonpositive(logit - max);
    }
    let scale = 1.0 / q.iter().sum::<f32>();
    for q in &mut q {
        *q *= scale;
    }
    q
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
        let q = softmax(&[0.0, -1.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
        assert!((q[0] + q[1] - 1.0).abs() < 1e-6);
        assert_eq!(q[2..], [0.0, 0.0]);
    }

    #[test]
    fn rounding_breaks_ties_to_even() {
        for x in [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49, -0.51, 30_000.5] {
            assert_eq!(round_ties_even(x), f32::round_ties_even(x));
        }
    }
}
