//! The only source of randomness: ChaCha8, one stream per purpose and step.
//!
//! A stream is named by (seed, purpose, index), so that any step can be entered again without
//! replaying the ones before it, and so that adding a draw to one purpose moves no other.
//! Values are drawn on the CPU whatever the device: the same seed gives the same bits everywhere.

use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

use crate::error::Result;

/// Domain of the key derivation. Changing it changes every picture.
const CONTEXT: &str = "stable-diffusion rng 2026-11 seed, index, stream";

/// One stream of random numbers.
#[derive(Debug, Clone)]
pub struct Rng(ChaCha8Rng);

impl Rng {
    /// The stream `stream` of step `index` under `seed`.
    pub fn new(seed: u64, stream: &str, index: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&seed.to_le_bytes());
        hasher.update(&index.to_le_bytes());
        hasher.update(stream.as_bytes());
        Self(ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()))
    }

    /// Standard normal values, f32, in row-major order.
    pub fn normal(&mut self, shape: &[usize], device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(
            self.normals(shape.iter().product()),
            shape,
            device,
        )?)
    }

    /// `n` standard normal values.
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        // Drawn in f64: the tail of the f32 ziggurat is cut at 2^-24.
        (0..n)
            .map(|_| {
                let value: f64 = StandardNormal.sample(&mut self.0);
                value as f32
            })
            .collect()
    }

    /// A value in `0..n`, each equally likely. `n` must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "a value below 0 was asked for");
        // Rejection, not a remainder: the remainder favors small values.
        let n = n as u64;
        let zone = u64::MAX - (u64::MAX % n + 1) % n;
        loop {
            let value = self.0.next_u64();
            if value <= zone {
                return (value % n) as usize;
            }
        }
    }

    /// A value in [0, 1) with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// `k` different values of `0..n` in random order. `k` must not exceed `n`.
    pub fn sample_without_replacement(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "{k} different values of {n} were asked for");
        let mut values: Vec<usize> = (0..n).collect();
        for i in 0..k {
            let j = i + self.below(n - i);
            values.swap(i, j);
        }
        values.truncate(k);
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden values: if one of these changes, every seed that anybody wrote down means another picture.
    #[test]
    fn seeds_mean_what_they_always_meant() {
        let mut rng = Rng::new(42, "generate", 0);
        let drawn = format!(
            "{:?} {:?} {} {:?}",
            rng.normals(4),
            [rng.below(10), rng.below(1000), rng.below(1)],
            rng.uniform(),
            rng.sample_without_replacement(8, 5)
        );
        let golden = "[-0.29445258, 0.8756318, -2.139191, -1.0031862] [6, 531, 0] 0.7450970906148286 \
             [3, 5, 0, 6, 7]";
        assert_eq!(drawn, golden);
    }

    #[test]
    fn seed_purpose_and_index_each_name_another_stream() {
        let first = |seed, stream, index| Rng::new(seed, stream, index).normals(1)[0];
        let streams = [
            first(1, "a", 0),
            first(2, "a", 0),
            first(1, "b", 0),
            first(1, "a", 1),
            first(1, "a", 1 << 32),
        ];
        for (i, a) in streams.iter().enumerate() {
            assert!(streams[..i].iter().all(|b| a != b), "{streams:?}");
        }
        assert_eq!(first(1, "a", 0), streams[0]);
    }

    #[test]
    fn values_are_distributed_as_documented() {
        let mut rng = Rng::new(5, "test", 0);
        let values = rng.normals(40_000);
        let mean = values.iter().sum::<f32>() / 40_000.0;
        let variance = values.iter().map(|x| x * x).sum::<f32>() / 40_000.0;
        assert!(
            mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03,
            "{mean} {variance}"
        );
        let mut counts = [0; 6];
        (0..6000).for_each(|_| counts[rng.below(6)] += 1);
        assert!(counts.iter().all(|n| (850..1150).contains(n)), "{counts:?}");
        let mut all = rng.sample_without_replacement(9, 9);
        all.sort_unstable();
        assert_eq!(all, (0..9).collect::<Vec<_>>());
        assert!((0..1000).all(|_| (0.0..1.0).contains(&rng.uniform())));
    }
}
