//! Every operation of every backend against the same function in candle's operations: values, gradients of every subset
//! of its operands, finite differences, and the two rules about what is kept.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{DType, Device, Tensor, Var};
use stable_diffusion::{
    Result,
    ops::{self, Backend, Mask, Padding, Precision, composed},
    rng::Rng,
};

const BACKENDS: [Backend; 2] = [Backend::Host, Backend::Device];

type Function = dyn Fn(&[Tensor]) -> Result<Tensor>;

/// A function of some operands, twice.
struct Case {
    name: String,
    shapes: Vec<Vec<usize>>,
    kernel: Box<Function>,
    oracle: Box<Function>,
}

fn case(
    name: impl Into<String>,
    shapes: &[&[usize]],
    kernel: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
    oracle: impl Fn(&[Tensor]) -> candle_core::Result<Tensor> + 'static,
) -> Case {
    Case {
        name: name.into(),
        shapes: shapes.iter().map(|shape| shape.to_vec()).collect(),
        kernel: Box::new(kernel),
        oracle: Box::new(move |operands| Ok(oracle(operands)?)),
    }
}

fn random(shape: &[usize], index: u64) -> Tensor {
    Rng::new(7, "test of ops", index)
        .normal(shape, &Device::Cpu)
        .unwrap()
}

impl Case {
    fn operands(&self) -> Vec<Tensor> {
        self.shapes
            .iter()
            .zip(0..)
            .map(|(shape, index)| random(shape, index))
            .collect()
    }

    /// Values and, for the operands of `trained`, gradients of Σ y·r for a fixed r.
    fn gradients(&self, f: &Function, trained: usize) -> (Tensor, Vec<Option<Tensor>>) {
        let is_trained = |index: usize| trained >> index & 1 == 1;
        let operands: Vec<Tensor> = self
            .operands()
            .into_iter()
            .enumerate()
            .map(|(index, tensor)| {
                if is_trained(index) {
                    Var::from_tensor(&tensor).unwrap().into_inner()
                } else {
                    tensor
                }
            })
            .collect();
        let y = f(&operands).unwrap();
        assert_eq!(
            y.track_op(),
            trained != 0,
            "{}: graph for trained operands {trained:b}",
            self.name
        );
        let loss = (&y * random(y.dims(), 99)).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        (
            y.detach(),
            operands
                .iter()
                .map(|operand| gradients.get(operand).cloned())
                .collect(),
        )
    }

    fn check(&self) {
        for backend in BACKENDS {
            backend.within(|| self.check_here(&format!("{backend:?}: {}", self.name)));
        }
    }

    fn check_here(&self, name: &str) {
        for trained in 0..1 << self.shapes.len() {
            let (y, gradients) = self.gradients(&self.kernel, trained);
            let (expected, oracle) = self.gradients(&self.oracle, trained);
            assert_close(name, "value", &y, &expected, 2e-5);
            for (index, (gradient, oracle)) in gradients.iter().zip(oracle).enumerate() {
                if trained >> index & 1 == 1 {
                    let what = format!("gradient {index} of trained {trained:b}");
                    let gradient = gradient.as_ref().unwrap();
                    assert_close(name, &what, gradient, &oracle.unwrap(), 5e-5);
                } else {
                    assert!(
                        gradient.is_none(),
                        "{name}: frozen operand {index} has a gradient"
                    );
                }
            }
        }
        self.check_finite_differences(name);
    }

    /// The slope along a random direction of all operands.
    fn check_finite_differences(&self, name: &str) {
        let (_, gradients) = self.gradients(&self.kernel, (1 << self.shapes.len()) - 1);
        let directions: Vec<Tensor> = self
            .shapes
            .iter()
            .zip(200..)
            .map(|(shape, index)| random(shape, index))
            .collect();
        let dot = |a: &Tensor, b: &Tensor| -> f64 {
            let product =
                (a.to_dtype(DType::F64).unwrap() * b.to_dtype(DType::F64).unwrap()).unwrap();
            product.sum_all().unwrap().to_scalar().unwrap()
        };
        let slope: f64 = gradients
            .iter()
            .zip(&directions)
            .map(|(g, d)| dot(g.as_ref().unwrap(), d))
            .sum();
        let value = |step: f64| {
            let moved: Vec<Tensor> = self
                .operands()
                .iter()
                .zip(&directions)
                .map(|(operand, direction)| (operand + (direction * step).unwrap()).unwrap())
                .collect();
            let y = (self.kernel)(&moved).unwrap();
            dot(&y, &random(y.dims(), 99))
        };
        let step = 2e-3;
        // Fourth order, so that the step can be large enough for f32.
        let difference = (8.0 * (value(step) - value(-step)) - value(2.0 * step)
            + value(-2.0 * step))
            / (12.0 * step);
        let scale: f64 = gradients
            .iter()
            .zip(&directions)
            .map(|(g, d)| {
                let g = g.as_ref().unwrap();
                (dot(g, g) * dot(d, d)).sqrt()
            })
            .sum();
        let error = (difference - slope).abs();
        assert!(
            error < 5e-3 * scale.max(1.0),
            "{name}: slope {slope}, differences {difference}"
        );
    }
}

fn assert_close(name: &str, what: &str, found: &Tensor, expected: &Tensor, tolerance: f32) {
    assert_eq!(found.dims(), expected.dims(), "{name}: {what}");
    let largest = |tensor: &Tensor| -> f32 {
        let flat = tensor.abs().unwrap().flatten_all().unwrap();
        flat.max(0).unwrap().to_scalar().unwrap()
    };
    let error = largest(&(found - expected).unwrap());
    let scale = largest(expected).max(1.0);
    assert!(
        error <= tolerance * scale,
        "{name}: {what} off by {error} of {scale}"
    );
}

#[test]
fn linear() {
    // Rows beyond one tile, widths that are no multiple of a vector, a single row, a batch.
    for (x, out) in [
        (&[3usize, 5][..], 7),
        (&[1, 33], 20),
        (&[2, 70, 19], 45),
        (&[600, 24], 300),
    ] {
        let (n_in, weight) = (x[x.len() - 1], [out, x[x.len() - 1]]);
        let shapes = [x, &weight[..], &[out]];
        let name = format!("linear {x:?} to {out}");
        case(
            &name,
            &shapes,
            |t| ops::linear(&t[0], &t[1], Some(&t[2])),
            |t| composed::linear(&t[0], &t[1], Some(&t[2])),
        )
        .check();
        case(
            format!("{name} without bias"),
            &shapes[..2],
            |t| ops::linear(&t[0], &t[1], None),
            |t| composed::linear(&t[0], &t[1], None),
        )
        .check();
        assert_eq!(n_in, weight[1]);
    }
    case(
        "linear of a transposed view",
        &[&[2, 6, 9], &[4, 6]],
        |t| ops::linear(&t[0].transpose(1, 2)?, &t[1], None),
        |t| composed::linear(&t[0].transpose(1, 2)?, &t[1], None),
    )
    .check();
}

#[test]
fn linear_between_planes_and_tokens() {
    case(
        "planes to tokens",
        &[&[2, 6, 3, 5], &[4, 6, 1, 1], &[4]],
        |t| ops::linear_from_channels(&t[0], &t[1], Some(&t[2])),
        |t| composed::linear(&t[0].flatten_from(2)?.transpose(1, 2)?, &t[1], Some(&t[2])),
    )
    .check();
    case(
        "tokens to planes",
        &[&[2, 15, 6], &[4, 6], &[4]],
        |t| ops::linear_to_channels(&t[0], &t[1], Some(&t[2]), [3, 5]),
        |t| {
            let y = composed::linear(&t[0], &t[1], Some(&t[2]))?;
            y.transpose(1, 2)?.reshape((2, 4, 3, 5))
        },
    )
    .check();
}

#[test]
fn conv2d() {
    let asymmetric = Padding {
        before: 0,
        after: 1,
    };
    // (batch, in, height, width, out, kernel, stride, padding); the large ones have several pixel tiles.
    let cases = [
        (1, 3, 5, 7, 4, 3, 1, Padding::around(1)),
        (2, 2, 6, 5, 3, 3, 2, Padding::around(1)),
        (2, 3, 8, 8, 2, 3, 2, asymmetric),
        (1, 2, 9, 4, 5, 3, 1, Padding::NONE),
        (2, 5, 4, 3, 6, 1, 1, Padding::NONE),
        (1, 4, 6, 6, 3, 1, 2, Padding::NONE),
        (1, 2, 7, 7, 3, 5, 3, Padding::around(2)),
        (2, 3, 23, 29, 5, 3, 1, Padding::around(1)),
        (1, 33, 17, 3, 40, 3, 1, Padding::around(1)),
        (1, 2, 1, 1, 2, 3, 1, Padding::around(1)),
        // Of channels and pixels enough for fewer products, with tiles cut off.
        (2, 17, 45, 47, 20, 3, 1, Padding::around(1)),
    ];
    for (batch, n_in, height, width, out, kernel, stride, padding) in cases {
        let weight = [out, n_in, kernel, kernel];
        let name = format!(
            "conv2d {batch}x{n_in}x{height}x{width} to {out}, {kernel}/{stride} {padding:?}"
        );
        for bias in [&[out][..], &[batch, out]] {
            case(
                format!("{name}, bias {bias:?}"),
                &[&[batch, n_in, height, width], &weight, bias],
                move |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
                move |t| composed::conv2d(&t[0], &t[1], Some(&t[2]), stride, padding),
            )
            .check();
        }
    }
    case(
        "conv2d of a permuted view",
        &[&[2, 5, 6, 3], &[4, 3, 3, 3]],
        |t| {
            ops::conv2d(
                &t[0].permute((0, 3, 1, 2))?,
                &t[1],
                None,
                1,
                Padding::around(1),
            )
        },
        |t| {
            composed::conv2d(
                &t[0].permute((0, 3, 1, 2))?,
                &t[1],
                None,
                1,
                Padding::around(1),
            )
        },
    )
    .check();
}

#[test]
fn normalizations() {
    for (shape, groups) in [
        (&[2usize, 6, 3, 5][..], 3),
        (&[1, 8, 40, 31], 2),
        (&[3, 4, 7], 4),
    ] {
        let n_channels = shape[1];
        let shapes = [shape, &[n_channels], &[n_channels]];
        case(
            format!("group_norm {shape:?}"),
            &shapes,
            move |t| ops::group_norm(&t[0], &t[1], &t[2], groups, 1e-5),
            move |t| composed::group_norm(&t[0], &t[1], &t[2], groups, 1e-5),
        )
        .check();
        case(
            format!("group_norm_silu {shape:?}"),
            &shapes,
            move |t| ops::group_norm_silu(&t[0], &t[1], &t[2], groups, 1e-5),
            move |t| composed::silu(&composed::group_norm(&t[0], &t[1], &t[2], groups, 1e-5)?),
        )
        .check();
    }
    for shape in [&[5usize, 17][..], &[2, 40, 33], &[1, 8]] {
        let width = shape[shape.len() - 1];
        case(
            format!("layer_norm {shape:?}"),
            &[shape, &[width], &[width]],
            |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5),
            |t| composed::layer_norm(&t[0], &t[1], &t[2], 1e-5),
        )
        .check();
    }
}

#[test]
fn activations() {
    let shape: &[usize] = &[3, 5, 14];
    case(
        "silu",
        &[shape],
        |t| ops::silu(&t[0]),
        |t| composed::silu(&t[0]),
    )
    .check();
    case(
        "quick_gelu",
        &[shape],
        |t| ops::quick_gelu(&t[0]),
        |t| composed::quick_gelu(&t[0]),
    )
    .check();
    case(
        "gelu_erf",
        &[shape],
        |t| ops::gelu_erf(&t[0]),
        |t| composed::gelu_erf(&t[0]),
    )
    .check();
    case(
        "geglu",
        &[shape],
        |t| ops::geglu(&t[0]),
        |t| composed::geglu(&t[0]),
    )
    .check();
    case(
        "silu of 100003",
        &[&[100_003]],
        |t| ops::silu(&t[0]),
        |t| composed::silu(&t[0]),
    )
    .check();
    for (height, width) in [(6, 10), (5, 9)] {
        case(
            format!("upsample_nearest to {height}x{width}"),
            &[&[2, 3, 3, 5]],
            move |t| ops::upsample_nearest(&t[0], height, width),
            move |t| composed::upsample_nearest(&t[0], height, width),
        )
        .check();
    }
}

#[test]
fn attention() {
    // (batch, queries, keys, heads, channels per head); 64 queries make a tile.
    for (batch, n, m, heads, width) in [
        (1, 5, 7, 1, 3),
        (2, 64, 77, 2, 5),
        (1, 130, 9, 3, 40),
        (2, 70, 70, 2, 8),
        (1, 1, 1, 1, 1),
    ] {
        let name = format!("attention {batch}x{n}x{m}, {heads} heads of {width}");
        let (q, k) = ([batch, n, heads * width], [batch, m, heads * width]);
        case(
            &name,
            &[&q, &k, &k],
            move |t| ops::attention(&t[0], &t[1], &t[2], heads, Mask::None),
            move |t| Ok(composed::attention(&t[0], &t[1], &t[2], heads, Mask::None)?.0),
        )
        .check();
        let watched = vec![m - 1, 0, m / 2];
        let positions: Vec<u32> = watched.iter().map(|&position| position as u32).collect();
        case(
            format!("{name}, observed"),
            &[&q, &k, &k],
            move |t| {
                let (out, columns) = ops::observed_attention(&t[0], &t[1], &t[2], heads, &watched)?;
                Ok(Tensor::cat(
                    &[out.flatten_all()?, columns.flatten_all()?],
                    0,
                )?)
            },
            move |t| {
                let (out, map) = composed::attention(&t[0], &t[1], &t[2], heads, Mask::None)?;
                let columns =
                    map.index_select(&Tensor::new(positions.clone(), &Device::Cpu)?, 3)?;
                Tensor::cat(&[out.flatten_all()?, columns.flatten_all()?], 0)
            },
        )
        .check();
    }
    for n in [4, 77] {
        case(
            format!("causal attention of {n}"),
            &[&[2, n, 6], &[2, n, 6], &[2, n, 6]],
            |t| ops::attention(&t[0], &t[1], &t[2], 2, Mask::Causal),
            |t| Ok(composed::attention(&t[0], &t[1], &t[2], 2, Mask::Causal)?.0),
        )
        .check();
    }
}

/// Sizes for which the processor's tiles are used, if it has them.
fn large_cases() -> Vec<Case> {
    let context = [1, 300, 64];
    vec![
        case(
            "large linear",
            &[&[1, 310, 70], &[330, 70], &[330]],
            |t| ops::linear(&t[0], &t[1], Some(&t[2])),
            |t| composed::linear(&t[0], &t[1], Some(&t[2])),
        ),
        case(
            "large convolution",
            &[&[2, 33, 19, 17], &[40, 33, 3, 3], &[2, 40]],
            |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, Padding::around(1)),
            |t| composed::conv2d(&t[0], &t[1], Some(&t[2]), 1, Padding::around(1)),
        ),
        case(
            "large attention",
            &[&[1, 70, 64], &context, &context],
            |t| ops::attention(&t[0], &t[1], &t[2], 2, Mask::None),
            |t| Ok(composed::attention(&t[0], &t[1], &t[2], 2, Mask::None)?.0),
        ),
        // More keys than a block has, and heads that are no whole tiles.
        case(
            "attention over many keys",
            &[&[1, 37, 80], &[1, 1047, 80], &[1, 1047, 80]],
            |t| ops::attention(&t[0], &t[1], &t[2], 2, Mask::None),
            |t| Ok(composed::attention(&t[0], &t[1], &t[2], 2, Mask::None)?.0),
        ),
        case(
            "large observed attention",
            &[&[1, 70, 64], &context, &context],
            |t| {
                let (out, seen) = ops::observed_attention(&t[0], &t[1], &t[2], 2, &[0, 299, 31])?;
                Ok(Tensor::cat(&[out.flatten_all()?, seen.flatten_all()?], 0)?)
            },
            |t| {
                let (out, map) = composed::attention(&t[0], &t[1], &t[2], 2, Mask::None)?;
                let seen = map.index_select(&Tensor::new(&[0u32, 299, 31], map.device())?, 3)?;
                Tensor::cat(&[out.flatten_all()?, seen.contiguous()?.flatten_all()?], 0)
            },
        ),
        case(
            "large causal attention",
            &[&[1, 300, 32], &[1, 300, 32], &[1, 300, 32]],
            |t| ops::attention(&t[0], &t[1], &t[2], 1, Mask::Causal),
            |t| Ok(composed::attention(&t[0], &t[1], &t[2], 1, Mask::Causal)?.0),
        ),
    ]
}

#[test]
fn large_operations() {
    for case in large_cases() {
        case.check();
    }
}

#[test]
fn rounded_factors_give_nearly_the_same() {
    for case in large_cases() {
        let all = (1 << case.shapes.len()) - 1;
        let (expected, expected_gradients) = case.gradients(&case.oracle, all);
        let (found, gradients) = Precision::Bf16.within(|| case.gradients(&case.kernel, all));
        let name = &case.name;
        assert_close(name, "value", &found, &expected, 2e-2);
        for (found, expected) in gradients.iter().zip(&expected_gradients) {
            let (found, expected) = (found.as_ref().unwrap(), expected.as_ref().unwrap());
            assert_close(name, "gradient", found, expected, 3e-2);
        }
    }
}

/// Frozen weights of products may lie in memory as bf16: the same bits as the same numbers in f32 give.
#[test]
fn frozen_weights_may_be_bf16_in_memory() {
    let around = Padding::around(1);
    type Product = dyn Fn(&Tensor, &Tensor) -> Result<Tensor>;
    let projection = |x: &Tensor, w: &Tensor| ops::linear(x, w, None);
    let planes = |x: &Tensor, w: &Tensor| ops::linear_to_channels(x, w, None, [20, 16]);
    let convolution =
        move |stride| move |x: &Tensor, w: &Tensor| ops::conv2d(x, w, None, stride, around);
    let cases: [(&[usize], &[usize], &Product); 8] = [
        (&[3, 24], &[17, 24], &projection),
        (&[600, 64], &[320, 64], &projection),
        (&[250, 700], &[320, 700], &projection),
        (&[1, 320, 64], &[320, 64], &planes),
        (&[2, 5, 7, 6], &[4, 5, 3, 3], &convolution(1)),
        (&[1, 64, 24, 24], &[96, 64, 3, 3], &convolution(1)),
        (&[1, 40, 24, 24], &[33, 40, 3, 3], &convolution(1)),
        (&[1, 32, 40, 40], &[64, 32, 3, 3], &convolution(2)),
    ];
    for precision in [Precision::F32, Precision::Bf16] {
        for (x, weight, operation) in cases {
            let half = random(weight, 1).to_dtype(DType::BF16).unwrap();
            let x = Var::from_tensor(&random(x, 0)).unwrap();
            let run = |weight: &Tensor| -> [Vec<f32>; 2] {
                let y = precision.within(|| operation(&x, weight)).unwrap();
                let loss = (&y * random(y.dims(), 99)).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                [&y, gradients.get(&x).unwrap()]
                    .map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap())
            };
            let expected = run(&half.to_dtype(DType::F32).unwrap());
            assert!(run(&half) == expected, "{precision:?} {x:?} {weight:?}");
        }
    }
}

/// Operations of half precision, the parameters of which are as what they are multiplied with or f32, as those that are
/// trained are; the oracle has the same rounded numbers in f32.
#[test]
fn half_precision_keeps_to_its_bits() {
    for (half, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2.5e-3)] {
        for case in half_cases() {
            for parameters in [half, DType::F32] {
                let name = format!("{half:?} with parameters {parameters:?}: {}", case.name);
                let operands = case.operands().into_iter().enumerate();
                let operands: Vec<(Tensor, Tensor)> = operands
                    .map(|(index, tensor)| {
                        let own = if index == 0 || case.name.contains("attention") {
                            half
                        } else {
                            parameters
                        };
                        let variable = |tensor: Tensor| Var::from_tensor(&tensor).unwrap();
                        let rounded = variable(tensor.to_dtype(own).unwrap());
                        let oracle = variable(rounded.to_dtype(DType::F32).unwrap().detach());
                        (rounded.into_inner(), oracle.into_inner())
                    })
                    .collect();
                let (rounded, oracle): (Vec<_>, Vec<_>) = operands.into_iter().unzip();
                let y = (case.kernel)(&rounded).unwrap();
                let expected = (case.oracle)(&oracle).unwrap();
                assert_eq!(y.dtype(), half, "{name}");
                let f32_of = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
                assert_close(&name, "value", &f32_of(&y), &expected, tolerance);
                let weights = random(y.dims(), 99).to_dtype(half).unwrap();
                let gradients_of = |y: &Tensor| {
                    let loss = (f32_of(y) * f32_of(&weights)).unwrap();
                    loss.sum_all().unwrap().backward().unwrap()
                };
                let (found, expected) = (gradients_of(&y), gradients_of(&expected));
                for (index, (own, oracle)) in rounded.iter().zip(&oracle).enumerate() {
                    let gradient = found.get(own).unwrap();
                    assert_eq!(gradient.dtype(), own.dtype(), "{name}: gradient {index}");
                    let what = format!("gradient {index}");
                    let expected = expected.get(oracle).unwrap();
                    assert_close(&name, &what, &f32_of(gradient), expected, tolerance);
                }
            }
        }
    }
}

fn half_cases() -> Vec<Case> {
    let around = Padding::around(1);
    vec![
        case(
            "linear",
            &[&[2, 9, 24], &[17, 24], &[17]],
            |t| ops::linear(&t[0], &t[1], Some(&t[2])),
            |t| composed::linear(&t[0], &t[1], Some(&t[2])),
        ),
        case(
            "convolution with a bias per sample",
            &[&[2, 5, 7, 6], &[4, 5, 3, 3], &[2, 4]],
            move |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), 1, around),
            move |t| composed::conv2d(&t[0], &t[1], Some(&t[2]), 1, around),
        ),
        case(
            "halving convolution",
            &[&[1, 3, 8, 8], &[4, 3, 3, 3], &[4]],
            move |t| ops::conv2d(&t[0], &t[1], Some(&t[2]), 2, around),
            move |t| composed::conv2d(&t[0], &t[1], Some(&t[2]), 2, around),
        ),
        case(
            "group norm and SiLU",
            &[&[2, 8, 5, 5], &[8], &[8]],
            |t| ops::group_norm_silu(&t[0], &t[1], &t[2], 2, 1e-5),
            |t| composed::silu(&composed::group_norm(&t[0], &t[1], &t[2], 2, 1e-5)?),
        ),
        case(
            "layer norm",
            &[&[2, 9, 16], &[16], &[16]],
            |t| ops::layer_norm(&t[0], &t[1], &t[2], 1e-5),
            |t| composed::layer_norm(&t[0], &t[1], &t[2], 1e-5),
        ),
        case(
            "GEGLU",
            &[&[2, 9, 16]],
            |t| ops::geglu(&t[0]),
            |t| composed::geglu(&t[0]),
        ),
        case(
            "attention",
            &[&[2, 9, 16], &[2, 7, 16], &[2, 7, 16]],
            |t| ops::attention(&t[0], &t[1], &t[2], 2, Mask::None),
            |t| Ok(composed::attention(&t[0], &t[1], &t[2], 2, Mask::None)?.0),
        ),
    ]
}

#[test]
fn scores_of_any_size_stay_finite() {
    for backend in BACKENDS {
        let q = (random(&[1, 3, 4], 0) * 1e4).unwrap();
        let k = (random(&[1, 5, 4], 1) * 1e4).unwrap();
        let observed = || ops::observed_attention(&q, &k, &k, 1, &[0, 1, 2, 3, 4]);
        let (out, columns) = backend.within(observed).unwrap();
        let values = |tensor: &Tensor| -> Vec<f32> {
            let flat = tensor.flatten_all().unwrap();
            flat.to_vec1().unwrap()
        };
        let sums = values(&columns.sum(3).unwrap());
        assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-6), "{sums:?}");
        assert!(values(&out).iter().all(|x| x.is_finite()), "{backend:?}");
    }
}

#[test]
fn misfits_are_errors() {
    for backend in BACKENDS {
        backend.within(|| misfits_are_errors_of(backend));
    }
}

fn misfits_are_errors_of(backend: Backend) {
    let (x, plane) = (random(&[2, 3], 0), random(&[1, 3, 4, 4], 1));
    let errors = [
        ops::linear(&x, &random(&[4, 5], 2), None).err(),
        ops::conv2d(&plane, &random(&[2, 4, 3, 3], 2), None, 1, Padding::NONE).err(),
        ops::conv2d(&plane, &random(&[2, 3, 7, 7], 2), None, 1, Padding::NONE).err(),
        ops::conv2d(
            &plane,
            &random(&[2, 3, 3, 3], 2),
            Some(&random(&[3], 3)),
            1,
            Padding::NONE,
        )
        .err(),
        ops::group_norm(&plane, &random(&[3], 2), &random(&[3], 3), 2, 1e-5).err(),
        ops::layer_norm(&x, &random(&[2], 2), &random(&[2], 3), 1e-5).err(),
        ops::geglu(&x).err(),
        ops::attention(
            &random(&[1, 2, 6], 2),
            &random(&[1, 2, 6], 3),
            &random(&[1, 2, 6], 4),
            4,
            Mask::None,
        )
        .err(),
        ops::observed_attention(
            &random(&[1, 2, 6], 2),
            &random(&[1, 2, 6], 3),
            &random(&[1, 2, 6], 4),
            2,
            &[2],
        )
        .err(),
    ];
    for (index, error) in errors.iter().enumerate() {
        assert!(error.is_some(), "{backend:?}: case {index} was accepted");
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let run = |n_threads: usize| -> Vec<Vec<f32>> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .build()
            .unwrap();
        pool.install(|| {
            let variable =
                |shape: &[usize], index| Var::from_tensor(&random(shape, index)).unwrap();
            let (x, weight) = (variable(&[2, 40, 33, 31], 0), variable(&[48, 40, 3, 3], 1));
            let y = ops::conv2d(&x, &weight, None, 1, Padding::around(1)).unwrap();
            let gamma = variable(&[48], 2);
            let y = ops::group_norm_silu(&y, &gamma, &gamma, 8, 1e-5).unwrap();
            let tokens = variable(&[200, 48], 3);
            let h = ops::linear_from_channels(&y, &tokens, None).unwrap();
            let z = ops::attention(&h, &h, &h, 5, Mask::None).unwrap();
            let z = ops::layer_norm(&z, &variable(&[200], 4), &variable(&[200], 5), 1e-5).unwrap();
            let gradients = ops::geglu(&z)
                .unwrap()
                .sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap();
            let of =
                |tensor: &Tensor| -> Vec<f32> { tensor.flatten_all().unwrap().to_vec1().unwrap() };
            let mut all = vec![of(&z)];
            all.extend([&x, &weight, &gamma, &tokens].map(|v| of(gradients.get(v).unwrap())));
            all
        })
    };
    let one = run(1);
    assert!(one == run(2) && one == run(5));
}
