//! Kernels at the shapes of Stable Diffusion 1.5 at 256 pixels: forward, and forward with input gradient.
#![expect(clippy::unwrap_used, reason = "a bench may panic")]

use std::hint::black_box;

use candle_core::{Device, Tensor, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use stable_diffusion::{
    Result,
    ops::{self, Mask, Padding},
    rng::Rng,
};

fn random(shape: &[usize]) -> Tensor {
    Rng::new(0, "bench", 0).normal(shape, &Device::Cpu).unwrap()
}

fn bench(c: &mut Criterion, name: &str, x: &[usize], f: impl Fn(&Tensor) -> Result<Tensor>) {
    let x = random(x);
    c.bench_function(name, |b| b.iter(|| black_box(f(&x).unwrap())));
    let variable = Var::from_tensor(&x).unwrap();
    c.bench_function(&format!("{name}, with gradient"), |b| {
        b.iter(|| black_box(f(&variable).unwrap().backward().unwrap()));
    });
}

fn kernels(c: &mut Criterion) {
    for (channels, side) in [(320, 32), (640, 16), (1280, 8)] {
        let weight = random(&[channels, channels, 3, 3]);
        bench(
            c,
            &format!("conv3x3 {channels} at {side}x{side}"),
            &[1, channels, side, side],
            |x| ops::conv2d(x, &weight, None, 1, Padding::around(1)),
        );
        let wide = random(&[8 * channels, channels]);
        bench(
            c,
            &format!("linear {channels} to {}", 8 * channels),
            &[1, side * side, channels],
            |x| ops::linear(x, &wide, None),
        );
        let ones = Tensor::ones(channels, candle_core::DType::F32, &Device::Cpu).unwrap();
        bench(
            c,
            &format!("group_norm_silu {channels} at {side}x{side}"),
            &[1, channels, side, side],
            |x| ops::group_norm_silu(x, &ones, &ones, 32, 1e-5),
        );
        bench(
            c,
            &format!("geglu {}", 4 * channels),
            &[1, side * side, 8 * channels],
            ops::geglu,
        );
        bench(
            c,
            &format!("self-attention {}x{channels}", side * side),
            &[1, side * side, channels],
            |x| ops::attention(x, x, x, 8, Mask::None),
        );
        let context = random(&[1, 77, channels]);
        bench(
            c,
            &format!("cross-attention {}x{channels}", side * side),
            &[1, side * side, channels],
            |x| Ok(ops::observed_attention(x, &context, &context, 8, &[4, 6])?.0),
        );
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
