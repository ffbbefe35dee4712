//! Our own CUDA kernels without a card: the same source, compiled for the processor and run by an emulation of CUDA's threads,
//! launched by the same code, beside the operations in candle's own.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../ops/case.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod case;
mod emulator;
#[path = "../small/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod small;

use candle_core::{DType, Device, Tensor, Var};
use stable_diffusion::{
    Result,
    ops::{
        self, Backend, Mask, composed,
        kernels::{Argument, Kernels, Launch, Launcher},
    },
    unet::Watch,
};

use case::{Case, case};
use emulator::emulator;

const HALVES: [(DType, f32); 2] = [(DType::BF16, 2e-2), (DType::F16, 2.5e-3)];

/// Does some work with our kernels, run by the emulation.
fn own<R>(work: impl FnOnce() -> R) -> R {
    Backend::Device.within(|| Kernels::By(emulator()).within(work))
}

/// In f32 and in half precision, all operands trained; the first case with every set of trained operands too, and beside finite
/// differences.
fn check(cases: &[Case]) {
    own(|| cases[0].check_as(&cases[0].name));
    for case in &cases[1..] {
        own(|| case.check_trained(&case.name, (1 << case.shapes.len()) - 1));
    }
    check_rounded(cases);
}

fn check_rounded(cases: &[Case]) {
    for case in cases {
        for (half, tolerance) in HALVES {
            for parameters in [half, DType::F32] {
                let name = format!("{half:?} with parameters {parameters:?}: {}", case.name);
                own(|| case.check_rounded(&name, half, parameters, tolerance));
                if case.name.contains("attention") {
                    break;
                }
            }
        }
    }
}

/// That kernels whose names begin so were run, of every type.
fn expect_launched(kernels: &[&str]) {
    let launched = emulator().launched();
    for kernel in kernels {
        for name in ["f32", "f16", "bf16"] {
            let beginning = format!("{kernel}_{name}");
            assert!(
                launched.iter().any(|name| name.starts_with(&beginning)),
                "{beginning} was not run, but {launched:?}"
            );
        }
    }
}

fn attention(
    [n_samples, n_queries, n_keys]: [usize; 3],
    n_heads: usize,
    head: usize,
    mask: Mask,
) -> Case {
    let (q, k) = (
        [n_samples, n_queries, n_heads * head],
        [n_samples, n_keys, n_heads * head],
    );
    case(
        format!(
            "attention of {n_samples}x{n_queries} over {n_keys} in {n_heads} heads of {head}, {mask:?}"
        ),
        &[&q, &k, &k],
        move |t| ops::attention(&t[0], &t[1], &t[2], n_heads, mask),
        move |t| Ok(composed::attention(&t[0], &t[1], &t[2], n_heads, mask)?.0),
    )
}

/// Output and observed columns one behind the other.
fn observed(
    [n_samples, n_queries, n_keys]: [usize; 3],
    n_heads: usize,
    head: usize,
    positions: &[usize],
) -> Case {
    let (q, k) = (
        [n_samples, n_queries, n_heads * head],
        [n_samples, n_keys, n_heads * head],
    );
    let (own, all) = (
        positions.to_vec(),
        positions.iter().map(|&i| i as u32).collect::<Vec<_>>(),
    );
    case(
        format!(
            "observed attention of {n_samples}x{n_queries} over {n_keys} in {n_heads} heads of {head}, {positions:?}"
        ),
        &[&q, &k, &k],
        move |t| {
            let (out, seen) = ops::observed_attention(&t[0], &t[1], &t[2], n_heads, &own)?;
            assert_eq!((out.dtype(), seen.dtype()), (t[0].dtype(), DType::F32));
            Ok(Tensor::cat(
                &[
                    out.to_dtype(DType::F32)?.flatten_all()?,
                    seen.flatten_all()?,
                ],
                0,
            )?)
        },
        move |t| {
            let (out, map) = composed::attention(&t[0], &t[1], &t[2], n_heads, Mask::None)?;
            let seen = map.index_select(&Tensor::new(&*all, map.device())?, 3)?;
            Tensor::cat(&[out.flatten_all()?, seen.contiguous()?.flatten_all()?], 0)
        },
    )
}

/// Every width that heads are padded to, and widths in between; lengths around those of tiles.
#[test]
fn attention_is_candles() {
    check(&[
        attention([2, 5, 3], 2, 8, Mask::None),
        attention([1, 65, 77], 2, 40, Mask::None),
        attention([1, 66, 33], 1, 48, Mask::None),
        attention([1, 63, 65], 2, 64, Mask::None),
        attention([1, 33, 70], 1, 80, Mask::None),
        attention([1, 34, 35], 2, 160, Mask::None),
        attention([1, 1, 1], 1, 16, Mask::None),
        attention([1, 20, 130], 1, 128, Mask::None),
    ]);
    check_rounded(&[
        attention([2, 200, 130], 3, 40, Mask::None),
        attention([1, 130, 129], 1, 160, Mask::None),
        attention([2, 129, 200], 1, 64, Mask::None),
    ]);
    expect_launched(&[
        "attend",
        "query_gradient",
        "key_gradients",
        "attention_means",
    ]);
}

#[test]
fn causal_attention_is_candles() {
    check(&[
        attention([2, 77, 77], 2, 32, Mask::Causal),
        attention([1, 70, 70], 1, 64, Mask::Causal),
        attention([1, 131, 131], 1, 8, Mask::Causal),
        attention([1, 67, 67], 1, 160, Mask::Causal),
    ]);
}

#[test]
fn observed_attention_is_candles() {
    let all: Vec<usize> = (0..70).rev().collect();
    check(&[
        observed([2, 17, 7], 2, 8, &[4, 0]),
        // No kernel gives a key two columns.
        observed([1, 5, 7], 1, 8, &[3, 3]),
        observed([1, 65, 77], 2, 40, &[76, 4, 6]),
        observed([1, 20, 35], 1, 160, &[3]),
        observed([1, 70, 70], 1, 64, &all),
        observed([1, 33, 9], 2, 80, &[0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ]);
    check_rounded(&[
        observed([2, 200, 77], 3, 40, &[5, 7]),
        observed([1, 70, 70], 1, 48, &all),
    ]);
}

/// Queries in several parts, each with sums of its own.
#[test]
fn gradients_of_few_keys_are_sums_of_parts() {
    check_rounded(&[
        attention([1, 600, 5], 1, 40, Mask::None),
        observed([1, 300, 77], 2, 160, &[1, 70]),
    ]);
    let case = attention([1, 300, 5], 1, 40, Mask::None);
    own(|| case.check_trained(&case.name, 7));
}

/// Scores far from zero: no weight overflows, and the largest one decides.
#[test]
fn large_scores_are_no_trouble() {
    let scaled = |t: &Tensor| t * 30.0;
    let case = case(
        "attention of large queries",
        &[&[1, 40, 64], &[1, 70, 64], &[1, 70, 64]],
        move |t| ops::attention(&scaled(&t[0])?, &t[1], &t[2], 1, Mask::None),
        move |t| Ok(composed::attention(&scaled(&t[0])?, &t[1], &t[2], 1, Mask::None)?.0),
    );
    let (expected, _) = case.gradients(&case.oracle, 0);
    let (found, _) = own(|| case.gradients(&case.kernel, 0));
    case::assert_close(&case.name, "value", &found, &expected, 2e-5);
}

fn groups(dims: &[usize], n_groups: usize, with_silu: bool) -> Case {
    let parameters = [dims[1]];
    case(
        format!("group norm of {dims:?} in {n_groups} groups, SiLU {with_silu}"),
        &[dims, &parameters, &parameters],
        move |t| {
            let norm = if with_silu {
                ops::group_norm_silu
            } else {
                ops::group_norm
            };
            norm(&t[0], &t[1], &t[2], n_groups, 1e-5)
        },
        move |t| {
            let y = composed::group_norm(&t[0], &t[1], &t[2], n_groups, 1e-5)?;
            if with_silu { composed::silu(&y) } else { Ok(y) }
        },
    )
}

/// Planes of whole packs and others, groups of one chunk and of several, a plane of one number.
#[test]
fn group_normalization_is_candles() {
    check(&[
        groups(&[2, 8, 5, 5], 2, true),
        groups(&[2, 8, 5, 5], 2, false),
        groups(&[1, 6, 4, 4], 3, true),
        groups(&[3, 12, 1], 4, false),
    ]);
    check_rounded(&[
        groups(&[1, 4, 71, 73], 2, true),
        groups(&[1, 4, 96, 72], 2, true),
        groups(&[1, 2, 300, 240], 1, false),
    ]);
    let many = groups(&[1, 4, 96, 72], 2, true);
    own(|| many.check_trained(&many.name, 7));
    expect_launched(&[
        "group_statistics",
        "group_normalize",
        "group_gradient_sums",
        "group_gradient",
    ]);
}

/// A mean far from zero does not cost the variance its digits.
#[test]
fn statistics_do_not_cancel() {
    let x = (case::random(&[1, 4, 40, 40], 0) * 1e-2).unwrap();
    let (weight, bias) = (case::random(&[4], 1), case::random(&[4], 2));
    let norm = |x: &Tensor| ops::group_norm(x, &weight, &bias, 2, 1e-9).unwrap();
    let expected = norm(&x);
    let found = own(|| norm(&(&x + 64.0).unwrap()));
    // x itself has lost digits by then: half of one at 64, in 0.01.
    case::assert_close("group norm", "value", &found, &expected, 2e-3);
}

#[test]
fn geglu_is_candles() {
    let geglu = |dims: &[usize]| {
        case(
            format!("GEGLU {dims:?}"),
            &[dims],
            |t| ops::geglu(&t[0]),
            |t| composed::geglu(&t[0]),
        )
    };
    check(&[
        geglu(&[2, 9, 16]),
        geglu(&[1, 6]),
        geglu(&[3, 40, 80]),
        geglu(&[700, 2]),
        geglu(&[5, 5, 36]),
    ]);
    expect_launched(&["geglu", "geglu_gradient"]);
}

/// Operands that are views: of other strides, broadcast over samples, or beginning where no piece of 16 bytes does.
#[test]
fn views_are_taken() {
    let (q, k) = (case::random(&[2, 11, 16], 0), case::random(&[1, 7, 16], 1));
    let k = k.broadcast_as((2, 7, 16)).unwrap();
    let q = q
        .transpose(0, 1)
        .unwrap()
        .contiguous()
        .unwrap()
        .transpose(0, 1)
        .unwrap();
    let x = case::random(&[1025], 2)
        .narrow(0, 1, 1024)
        .unwrap()
        .reshape((1, 4, 16, 16))
        .unwrap();
    let affine = case::random(&[9], 3).narrow(0, 5, 4).unwrap();
    let run = || -> Result<[Tensor; 3]> {
        Ok([
            ops::attention(&q, &k, &k, 2, Mask::None)?,
            ops::group_norm_silu(&x, &affine, &affine, 2, 1e-5)?,
            ops::geglu(&x)?,
        ])
    };
    let (expected, found) = (run().unwrap(), own(run).unwrap());
    for (found, expected) in found.iter().zip(&expected) {
        case::assert_close("views", "value", found, expected, 2e-5);
    }
}

/// What no kernel is for is computed all the same, without one.
#[test]
fn other_shapes_are_candles() {
    #[derive(Debug)]
    struct Refuses;
    impl Launcher for Refuses {
        fn launch(&self, launch: &Launch<'_>) -> candle_core::Result<()> {
            candle_core::bail!("{launch:?} was not to be launched")
        }
    }
    static REFUSES: Refuses = Refuses;
    let cases = [
        attention([1, 9, 7], 2, 12, Mask::None),
        attention([1, 9, 7], 1, 168, Mask::None),
    ];
    Backend::Device.within(|| {
        Kernels::By(&REFUSES).within(|| {
            for case in &cases {
                case.check_as(&case.name);
            }
            let x = Tensor::zeros((2, 0, 6), DType::F32, &Device::Cpu).unwrap();
            assert_eq!(ops::geglu(&x).unwrap().dims(), [2, 0, 3]);
            // An error of a launch is one of the operation.
            let fit = attention([1, 9, 7], 1, 8, Mask::None);
            let error = (fit.kernel)(&fit.operands()).unwrap_err().to_string();
            assert!(error.contains("attend_f32_32"), "{error}");
        });
    });
}

/// A network with a loss of its prediction and of what was observed, and the gradient of its context.
#[test]
fn a_network_is_candles() {
    let unet = small::unet();
    let latents = small::random(&[1, 4, 8, 8], 0);
    let context = Var::from_tensor(&small::random(&[1, 10, 24], 1)).unwrap();
    let run = || {
        let seen = unet
            .forward_observed(&latents, &[500.0], &context, Watch::All(&[2, 5]))
            .unwrap();
        let mut loss = seen.prediction.sqr().unwrap().mean_all().unwrap();
        for layer in &seen.attention {
            loss = (loss + layer.probabilities.sqr().unwrap().sum_all().unwrap()).unwrap();
        }
        let gradients = loss.backward().unwrap();
        (
            seen.prediction.detach(),
            gradients.get(&context).unwrap().clone(),
        )
    };
    let (expected, expected_gradient) = Backend::Device.within(|| Kernels::Candle.within(run));
    let (found, gradient) = own(run);
    case::assert_close("network", "prediction", &found, &expected, 2e-5);
    case::assert_close("network", "gradient", &gradient, &expected_gradient, 5e-5);
}

/// The emulation finds what it is there to find.
#[test]
fn faults_are_found() {
    let x = case::random(&[64], 0);
    let run = |kernel: &str| {
        let y = x.zeros_like().unwrap();
        let launch = Launch {
            source: "faulty",
            kernel: kernel.to_owned(),
            grid: [1, 1, 1],
            n_threads: 64,
            shared_bytes: 256,
            arguments: vec![Argument::Read(&x), Argument::Write(&y)],
        };
        emulator()
            .launch(&launch)
            .map(|()| y)
            .map_err(|error| error.to_string())
    };
    let found: Vec<f32> = run("faultless").unwrap().to_vec1().unwrap();
    let mut expected: Vec<f32> = x.to_vec1().unwrap();
    expected.rotate_left(1);
    assert_eq!(found, expected);
    let values = |y: Tensor| y.to_vec1::<f32>().unwrap();
    assert_eq!(values(run("sends").unwrap()), values(x.clone()));
    for (kernel, sentence) in [
        ("does_not_wait", "in another order"),
        ("reads_too_early", "in another order"),
        ("does_not_wait_at_all", "has come"),
        ("waits_alone", "do not come"),
        ("shuffles_alone", "do not come"),
        ("reads_outside", "ended the emulation"),
        ("shares_outside", "ended the emulation"),
        ("no_such", "there is no kernel no_such"),
    ] {
        let error = run(kernel).unwrap_err();
        assert!(error.contains(sentence), "{kernel}: {error}");
    }
}
