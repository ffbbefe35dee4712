//! Kernels of our own beside the same operations in candle's, on the device that `CONCEPTLOOM_DEVICE` names: what they differ
//! by, and what both take.
//!
//! `cargo run --release -p stable-diffusion --example kernel_cost -- [sd15|sprites] [times] [f32,bf16,f16]`
//!
//! Sizes are those of Stable Diffusion 1.5 at 512x512, or small ones. Every line of the output is a JSON object, one for every
//! operation at every precision. Errors are those of the values and gradients, in parts of the largest number, against candle's
//! f32 of the same rounded operands. Seconds are of both in turn (A B A B), forward without a graph, and forward and backward.
//! On a device without kernels of our own both are candle's.
#![expect(clippy::print_stdout, reason = "the figures are the program's output")]

use std::{error::Error, time::Instant};

use candle_core::{DType, Device, Tensor, Var};
use serde_json::json;
use stable_diffusion::{
    device,
    ops::{self, Backend, Mask, Precision, kernels::Kernels},
    rng::Rng,
};

/// Positions of two learned tokens in a prompt of 77.
const POSITIONS: [usize; 2] = [4, 6];
const N_GROUPS: usize = 32;

/// An operation of some operands.
struct Operation {
    name: String,
    shapes: Vec<Vec<usize>>,
    /// How many of them the backward is measured to; the others are frozen.
    n_trained: usize,
    run: Box<Function>,
}

type Function = dyn Fn(&[Tensor]) -> stable_diffusion::Result<Vec<Tensor>>;

/// Values, and gradients of Σ values·r for a fixed r.
type Results = Vec<Tensor>;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let operations = match arguments.next().as_deref() {
        None | Some("sd15") => operations(&[(320, 64), (640, 32), (1280, 16), (1280, 8)], 8),
        Some("sprites") => operations(&[(64, 8)], 4),
        Some(other) => return Err(format!("sd15 or sprites, not {other}").into()),
    };
    let n_times = arguments.next().map_or(Ok(10), |n| n.parse())?;
    let precisions = arguments
        .next()
        .unwrap_or_else(|| "f32,bf16,f16".to_owned());
    let device = device::of_environment()?;
    for name in precisions.split(',') {
        let precision = match name {
            "f32" => Precision::F32,
            "bf16" => Precision::Bf16,
            "f16" => Precision::F16,
            other => return Err(format!("f32, bf16 or f16, not {other}").into()),
        };
        for operation in &operations {
            let measured =
                Backend::Device.within(|| measure(operation, precision, n_times, device))?;
            println!("{measured}");
        }
    }
    Ok(())
}

fn measure(
    operation: &Operation,
    precision: Precision,
    n_times: usize,
    device: &Device,
) -> Result<serde_json::Value, Box<dyn Error>> {
    let mut operands = Vec::new();
    for (shape, index) in operation.shapes.iter().zip(0..) {
        let tensor = Rng::new(0, "kernel cost", index).normal(shape, device)?;
        operands.push(tensor.to_dtype(precision.dtype())?);
    }
    let exact: Vec<Tensor> = operands
        .iter()
        .map(|tensor| tensor.to_dtype(DType::F32))
        .collect::<Result<_, _>>()?;
    let expected = Kernels::Candle.within(|| operation.results(&exact))?;
    let mut sides = Vec::new();
    for kernels in [Kernels::Own, Kernels::Candle] {
        let found = kernels.within(|| operation.results(&operands))?;
        let mut error = 0.0f32;
        for (found, expected) in found.iter().zip(&expected) {
            error = error.max(distance(found, expected)?);
        }
        sides.push((kernels, error, Vec::new(), Vec::new()));
    }
    for _ in 0..n_times {
        for (kernels, _, forward, both) in &mut sides {
            kernels.within(|| -> Result<(), Box<dyn Error>> {
                forward.push(seconds(device, || Ok((operation.run)(&operands)?))?);
                both.push(seconds(device, || operation.results(&operands))?);
                Ok(())
            })?;
        }
    }
    let json_of = |(_, error, forward, both): &(Kernels, f32, Vec<f64>, Vec<f64>)| json!({"error": error, "forward": forward, "both": both});
    Ok(json!({
        "operation": operation.name, "precision": format!("{:?}", precision.dtype()).to_lowercase(),
        "has_own": Kernels::are_own(device), "own": json_of(&sides[0]), "candle": json_of(&sides[1]),
    }))
}

/// What some work takes until the device is done with it.
fn seconds<T>(
    device: &Device,
    work: impl FnOnce() -> Result<T, Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    device.synchronize()?;
    let start = Instant::now();
    work()?;
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64())
}

/// The largest difference in parts of the largest number; infinite if one is not a number.
fn distance(found: &Tensor, expected: &Tensor) -> Result<f32, Box<dyn Error>> {
    let largest = |tensor: &Tensor| tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let expected = expected.to_dtype(DType::F32)?;
    let difference = (found.to_dtype(DType::F32)? - &expected)?;
    if !difference.sum_all()?.to_scalar::<f32>()?.is_finite() {
        return Ok(f32::INFINITY);
    }
    Ok(largest(&difference)? / largest(&expected)?.max(f32::MIN_POSITIVE))
}

impl Operation {
    fn results(&self, operands: &[Tensor]) -> Result<Results, Box<dyn Error>> {
        let mut all = Vec::new();
        for (operand, index) in operands.iter().zip(0..) {
            all.push(if index < self.n_trained {
                Var::from_tensor(operand)?.into_inner()
            } else {
                operand.clone()
            });
        }
        let mut results = (self.run)(&all)?;
        let mut loss = Tensor::zeros((), DType::F32, operands[0].device())?;
        for (value, index) in results.iter().zip(100..) {
            let weights = Rng::new(0, "kernel cost", index).normal(value.dims(), value.device())?;
            loss = (loss + (value.to_dtype(DType::F32)? * weights)?.sum_all()?)?;
        }
        let gradients = loss.backward()?;
        results.iter_mut().for_each(|value| *value = value.detach());
        let trained = all.iter().take(self.n_trained);
        results.extend(trained.filter_map(|operand| gradients.get(operand).cloned()));
        Ok(results)
    }
}

/// Those of levels of so many channels and pixels to a side.
fn operations(levels: &[(usize, usize)], n_heads: usize) -> Vec<Operation> {
    let mut all = Vec::new();
    for &(width, side) in levels {
        let n = side * side;
        let (tokens, words) = (vec![1, n, width], vec![1, 77, width]);
        all.push(Operation {
            name: format!("self-attention {n}x{width}"),
            shapes: vec![tokens.clone(); 3],
            n_trained: 3,
            run: Box::new(move |t| {
                Ok(vec![ops::attention(
                    &t[0],
                    &t[1],
                    &t[2],
                    n_heads,
                    Mask::None,
                )?])
            }),
        });
        all.push(Operation {
            name: format!("cross-attention {n}x{width}"),
            shapes: vec![tokens.clone(), words.clone(), words.clone()],
            n_trained: 3,
            run: Box::new(move |t| {
                Ok(vec![ops::attention(
                    &t[0],
                    &t[1],
                    &t[2],
                    n_heads,
                    Mask::None,
                )?])
            }),
        });
        all.push(Operation {
            name: format!("observed cross-attention {n}x{width}"),
            shapes: vec![tokens, words.clone(), words],
            n_trained: 3,
            run: Box::new(move |t| {
                let (out, seen) =
                    ops::observed_attention(&t[0], &t[1], &t[2], n_heads, &POSITIONS)?;
                Ok(vec![out, seen])
            }),
        });
        all.push(Operation {
            name: format!("group norm and SiLU {width}x{side}x{side}"),
            shapes: vec![vec![1, width, side, side], vec![width], vec![width]],
            n_trained: 1,
            run: Box::new(|t| {
                Ok(vec![ops::group_norm_silu(
                    &t[0], &t[1], &t[2], N_GROUPS, 1e-5,
                )?])
            }),
        });
        all.push(Operation {
            name: format!("GEGLU {n}x{}", 8 * width),
            shapes: vec![vec![1, n, 8 * width]],
            n_trained: 1,
            run: Box::new(|t| Ok(vec![ops::geglu(&t[0])?])),
        });
    }
    all
}
