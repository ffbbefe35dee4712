//! Every operation of every backend against the same function in candle's operations: values, gradients of every subset
//! of its operands, finite differences, and the two rules about what is kept.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod case;
mod precision;

use candle_core::{Device, Tensor, Var};
use stable_diffusion::ops::{self, Backend, Mask, Padding, composed};

use case::{BACKENDS, case, large_cases, random};

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

/// Some and many tokens: those of a large plane are taken in parts.
#[test]
fn gated_linear() {
    for n_tokens in [7, 1100] {
        case(
            format!("gated linear of {n_tokens} tokens"),
            &[&[2, n_tokens, 8], &[12, 8], &[12]],
            |t| ops::gated_linear(&t[0], &t[1], Some(&t[2])),
            |t| composed::geglu(&composed::linear(&t[0], &t[1], Some(&t[2]))?),
        )
        .check();
    }
    case(
        "gated linear without a bias",
        &[&[5, 8], &[6, 8]],
        |t| ops::gated_linear(&t[0], &t[1], None),
        |t| composed::geglu(&composed::linear(&t[0], &t[1], None)?),
    )
    .check();
}

#[test]
fn what_lies_between_layers() {
    let plane: &[usize] = &[2, 3, 4, 5];
    case(
        "add",
        &[plane, plane],
        |t| ops::add(&t[0], &t[1]),
        |t| &t[0] + &t[1],
    )
    .check();
    case(
        "add scaled",
        &[plane, plane],
        |t| ops::add_scaled(&t[0], &t[1], 0.3),
        |t| &t[0] + (&t[1] * 0.3)?,
    )
    .check();
    case(
        "join channels",
        &[plane, &[2, 2, 4, 5]],
        |t| ops::join_channels(&t[0], &t[1]),
        |t| Tensor::cat(&[&t[0], &t[1]], 1),
    )
    .check();
    case(
        "shift",
        &[&[2, 3], &[3]],
        |t| ops::shift(&t[0], &t[1]),
        |t| t[0].broadcast_add(&t[1]),
    )
    .check();
    case(
        "for samples",
        &[&[1, 4, 5]],
        |t| ops::for_samples(&t[0], 3),
        |t| t[0].broadcast_as((3, 4, 5))?.contiguous(),
    )
    .check();
    // Many numbers are shared among threads.
    for (n_heads, side) in [(1, 4), (3, 4), (3, 8000)] {
        case(
            format!("mean of {n_heads} heads of {side}"),
            &[&[2, n_heads, side, 5]],
            |t| ops::mean_of_heads(&t[0]),
            |t| t[0].mean(1),
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

#[test]
fn large_operations() {
    for case in large_cases() {
        case.check();
    }
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
