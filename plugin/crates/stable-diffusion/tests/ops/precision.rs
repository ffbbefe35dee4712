//! Other precisions than f32: factors that are rounded, weights in half the memory, and everything in half precision.

use candle_core::{DType, Tensor, Var};
use stable_diffusion::{
    Result,
    ops::{self, Mask, Padding, Precision, composed},
};

use crate::case::{Case, assert_close, case, large_cases, random};

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
/// trained are.
#[test]
fn half_precision_keeps_to_its_bits() {
    for (half, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2.5e-3)] {
        for case in half_cases() {
            for parameters in [half, DType::F32] {
                let name = format!("{half:?} with parameters {parameters:?}: {}", case.name);
                let y = case.check_rounded(&name, half, parameters, tolerance);
                assert_eq!(y, half, "{name}");
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
