//! Milliseconds of single operations at the sizes that Stable Diffusion 1.5 has at 512x512, or the bundled model at 256x256,
//! forward and to the input's gradient, weights being frozen.
//!
//! `cargo run --release -p stable-diffusion --example operation_cost -- [f32|bf16] [sd15|sprites] [words of names]`
//! `RAYON_NUM_THREADS` sets the threads.
#![expect(clippy::print_stdout, reason = "the figures are the program's output")]

use std::{
    error::Error,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor, Var};
use stable_diffusion::{
    ops::{self, Mask, Padding, Precision},
    rng::Rng,
};

/// Tensors, and what the kernels work in.
#[global_allocator]
static HEAP: machine_memory::Heap = machine_memory::Heap;

/// Each time is the least of so many, or of those of this time.
const N_TIMES: usize = 3;
const LEAST_TIME: Duration = Duration::from_millis(200);

/// Its name, the dimensions of its input, and what it does.
type Operation = (
    String,
    Vec<usize>,
    Box<dyn Fn(&Tensor) -> stable_diffusion::Result<Tensor> + Send + Sync>,
);

fn main() -> Result<(), Box<dyn Error>> {
    let _kept = machine_memory::keep_freed();
    let precision = match std::env::args().nth(1).as_deref() {
        None | Some("f32") => Precision::F32,
        Some("bf16") => Precision::Bf16,
        Some(other) => return Err(format!("f32 or bf16, not {other}").into()),
    };
    let (n_heads, sizes): (_, &[[usize; 2]]) = match std::env::args().nth(2).as_deref() {
        None | Some("sd15") => (8, &[[320, 64], [640, 32], [1280, 16], [1280, 8]]),
        Some("sprites") => (4, &[[64, 32], [128, 16], [192, 8]]),
        Some(other) => return Err(format!("sd15 or sprites, not {other}").into()),
    };
    let words = std::env::args().nth(3).unwrap_or_default();
    for (name, dims, operation) in operations(n_heads, sizes, precision)? {
        if !name.contains(&words) {
            continue;
        }
        let x = Var::from_tensor(&normal(&dims)?)?;
        // On a worker, as a pass is.
        let [forward, backward] = rayon::scope(|_| least_seconds(precision, &x, &operation))?;
        println!(
            "{name:40} forward {:8.3} ms, backward {:8.3} ms",
            1e3 * forward,
            1e3 * backward
        );
    }
    Ok(())
}

fn least_seconds(
    precision: Precision,
    x: &Tensor,
    operation: impl Fn(&Tensor) -> stable_diffusion::Result<Tensor>,
) -> stable_diffusion::Result<[f64; 2]> {
    let mut least = [f64::INFINITY; 2];
    let (begin, mut n_done) = (Instant::now(), 0);
    while n_done < N_TIMES || begin.elapsed() < LEAST_TIME {
        let start = Instant::now();
        let y = precision.within(|| operation(x))?;
        let forward = start.elapsed().as_secs_f64();
        let loss = y.sum_all()?;
        let start = Instant::now();
        loss.backward()?;
        let backward = start.elapsed().as_secs_f64();
        least = [least[0].min(forward), least[1].min(backward)];
        n_done += 1;
    }
    Ok(least)
}

fn operations(
    n_heads: usize,
    sizes: &[[usize; 2]],
    precision: Precision,
) -> Result<Vec<Operation>, Box<dyn Error>> {
    let mut all: Vec<Operation> = Vec::new();
    // As a model of this precision has them.
    let weight = |dims: &[usize]| -> stable_diffusion::Result<Tensor> {
        Ok((normal(dims)? * 0.05)?.to_dtype(precision.dtype())?)
    };
    for &[width, side] in sizes {
        let n = side * side;
        all.push((
            format!("self-attention {n}x{width}"),
            vec![1, n, width],
            Box::new(move |x| ops::attention(x, x, x, n_heads, Mask::None)),
        ));
        let context = normal(&[1, 77, width])?;
        all.push((
            format!("cross-attention {n}x{width}"),
            vec![1, n, width],
            Box::new(move |x| ops::attention(x, &context, &context, n_heads, Mask::None)),
        ));
        for n_out in [width, 8 * width] {
            let weight = weight(&[n_out, width])?;
            all.push((
                format!("linear {n}x{width} to {n_out}"),
                vec![1, n, width],
                Box::new(move |x| ops::linear(x, &weight, None)),
            ));
        }
        for n_in in [width, 2 * width] {
            let weight = weight(&[width, n_in, 3, 3])?;
            let padding = Padding::around(1);
            all.push((
                format!("convolution {side}x{side}, {n_in} to {width}"),
                vec![1, n_in, side, side],
                Box::new(move |x| ops::conv2d(x, &weight, None, 1, padding)),
            ));
        }
        let [scale, shift] = [normal(&[width])?, normal(&[width])?];
        let (group_scale, group_shift) = (scale.clone(), shift.clone());
        all.push((
            format!("group norm and SiLU {width}x{side}x{side}"),
            vec![1, width, side, side],
            Box::new(move |x| ops::group_norm_silu(x, &group_scale, &group_shift, 32, 1e-5)),
        ));
        all.push((
            format!("layer norm {n}x{width}"),
            vec![1, n, width],
            Box::new(move |x| ops::layer_norm(x, &scale, &shift, 1e-5)),
        ));
        all.push((
            format!("GEGLU {n}x{}", 8 * width),
            vec![1, n, 8 * width],
            Box::new(ops::geglu),
        ));
        all.push((
            format!("sum {n}x{width}"),
            vec![1, n, width],
            Box::new(|x| Ok((x + x)?)),
        ));
    }
    Ok(all)
}

fn normal(dims: &[usize]) -> stable_diffusion::Result<Tensor> {
    Rng::new(0, "operation cost", 0).normal(dims, &Device::Cpu)
}
