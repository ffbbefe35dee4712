//! Element loops compiled once per instruction set, and the special functions they need.
//!
//! The functions are plain arithmetic without branches so that the compiler vectorizes the loops around them;
//! [`vectorize`] picks AVX-512, AVX2 or the baseline when the program runs.

use rayon::prelude::*;

use super::memory::unwritten;

/// Elements per parallel chunk of an element-wise loop.
pub(crate) const CHUNK: usize = 1 << 15;

/// How many items of `len` values each make a chunk that is worth another thread.
pub(crate) fn items_per_thread(len: usize) -> usize {
    (CHUNK / len.max(1)).max(1)
}

/// Runs `work` with the widest vector instructions of this processor. Everything `work` calls must be
/// `#[inline(always)]` to profit.
#[inline(always)]
pub(crate) fn vectorize<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// out[i] = f(x[i]) over all threads.
pub(crate) fn map(x: &[f32], f: impl Fn(f32) -> f32 + Sync) -> Vec<f32> {
    let mut out = unwritten(x.len());
    out.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .for_each(|(out, x)| {
            vectorize(
                #[inline(always)]
                || {
                    for (out, &x) in out.iter_mut().zip(x) {
                        *out = f(x);
                    }
                },
            );
        });
    out
}

/// out[i] = f(x[i], y[i]) over all threads. The slices have the same length.
pub(crate) fn zip_map(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) -> Vec<f32> {
    let mut out = unwritten(x.len());
    out.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK).zip(y.par_chunks(CHUNK)))
        .for_each(|(out, (x, y))| {
            vectorize(
                #[inline(always)]
                || {
                    for (out, (&x, &y)) in out.iter_mut().zip(x.iter().zip(y)) {
                        *out = f(x, y);
                    }
                },
            );
        });
    out
}

/// e^x to about one unit in the last place; 0 below -87.3 and saturated above 88.7.
///
/// e^x = 2^n·e^r with n = round(x / ln 2) and |r| <= ln 2 / 2; the polynomial is Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it rounds to an integer.
    let clamped = x.clamp(-87.3, 88.3);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4;
    let r = r + n * 2.121_944_4e-4;
    let p = 1.987_569_2e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    // The low bits of `shifted` hold n; moved into the exponent field they are 2^n.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.3 { 0.0 } else { p * power }
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function, absolute error below 3e-7 (Numerical Recipes' Chebyshev fit of erfc).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let z = x.abs();
    let t = 1.0 / (1.0 + 0.5 * z);
    let p = 0.170_872_77;
    let p = p * t - 0.822_152_23;
    let p = p * t + 1.488_515_9;
    let p = p * t - 1.135_204;
    let p = p * t + 0.278_868_07;
    let p = p * t - 0.186_288_06;
    let p = p * t + 0.096_784_18;
    let p = p * t + 0.374_091_96;
    let p = p * t + 1.000_023_7;
    let p = p * t - 1.265_512_2;
    let erfc = t * exp(p - z * z);
    let magnitude = 1.0 - erfc;
    if x < 0.0 { -magnitude } else { magnitude }
}

/// Sum of f(x) in sixteen lanes, so that it vectorizes and loses little to rounding.
#[inline(always)]
pub(crate) fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0f64;
    // Partial sums of 1024 values stay accurate in f32.
    for block in x.chunks(1024) {
        let mut lanes = [0.0f32; 16];
        let mut chunks = block.chunks_exact(16);
        for chunk in &mut chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += f(x);
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(chunks.remainder()) {
            *lane += f(x);
        }
        total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    total
}

/// Sum of f(x, y) in sixteen lanes. The slices have the same length.
#[inline(always)]
pub(crate) fn sum_zip_by(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f64 {
    let mut total = 0.0f64;
    for (x, y) in x.chunks(1024).zip(y.chunks(1024)) {
        let mut lanes = [0.0f32; 16];
        let (mut xs, mut ys) = (x.chunks_exact(16), y.chunks_exact(16));
        for (x, y) in (&mut xs).zip(&mut ys) {
            for (lane, (&x, &y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
                *lane += f(x, y);
            }
        }
        for (lane, (&x, &y)) in lanes
            .iter_mut()
            .zip(xs.remainder().iter().zip(ys.remainder()))
        {
            *lane += f(x, y);
        }
        total += lanes.iter().map(|&lane| f64::from(lane)).sum::<f64>();
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}): {error}");
        }
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn erf_is_accurate() {
        for (x, exact) in [
            (0.0, 0.0),
            (0.1, 0.112_462_92),
            (0.5, 0.520_499_9),
            (1.0, 0.842_700_8),
            (2.0, 0.995_322_3),
            (4.0, 1.0),
        ] {
            assert!((erf(x) - exact).abs() < 3e-7, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + exact).abs() < 3e-7, "erf(-{x}) = {}", erf(-x));
        }
    }

    #[test]
    fn sums_cover_the_remainder() {
        let x: Vec<f32> = (0..2055).map(|i| i as f32).collect();
        assert_eq!(sum_by(&x, |x| x), 2055.0 * 2054.0 / 2.0);
        assert_eq!(sum_zip_by(&x, &x, |x, y| x - y + 1.0), 2055.0);
    }
}
