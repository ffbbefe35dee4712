//! What is tested: a function of some operands beside its oracle, and what has to hold for it.

use candle_core::{DType, Device, Tensor, Var};
use stable_diffusion::{
    Result,
    ops::{self, Backend, Mask, Padding, composed},
    rng::Rng,
};

pub(crate) const BACKENDS: [Backend; 2] = [Backend::Host, Backend::Device];

pub(crate) type Function = dyn Fn(&[Tensor]) -> Result<Tensor>;

/// A function of some operands, twice.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) shapes: Vec<Vec<usize>>,
    pub(crate) kernel: Box<Function>,
    pub(crate) oracle: Box<Function>,
}

pub(crate) fn case(
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

pub(crate) fn random(shape: &[usize], index: u64) -> Tensor {
    Rng::new(7, "test of ops", index)
        .normal(shape, &Device::Cpu)
        .unwrap()
}

impl Case {
    pub(crate) fn operands(&self) -> Vec<Tensor> {
        self.shapes
            .iter()
            .zip(0..)
            .map(|(shape, index)| random(shape, index))
            .collect()
    }

    /// Values and, for the operands of `trained`, gradients of Σ y·r for a fixed r.
    pub(crate) fn gradients(&self, f: &Function, trained: usize) -> (Tensor, Vec<Option<Tensor>>) {
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

    pub(crate) fn check(&self) {
        for backend in BACKENDS {
            backend.within(|| self.check_as(&format!("{backend:?}: {}", self.name)));
        }
    }

    /// Values, gradients for every set of trained operands, and slopes.
    pub(crate) fn check_as(&self, name: &str) {
        for trained in 0..1 << self.shapes.len() {
            self.check_trained(name, trained);
        }
        self.check_finite_differences(name);
    }

    /// Values, and gradients of the operands of `trained` and of no others.
    pub(crate) fn check_trained(&self, name: &str, trained: usize) {
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

    /// Values and gradients of half precision, the parameters of which may be of another type than what they are multiplied
    /// with; the oracle has the same rounded numbers in f32. Returns the type of the value.
    pub(crate) fn check_rounded(
        &self,
        name: &str,
        half: DType,
        parameters: DType,
        tolerance: f32,
    ) -> DType {
        let operands = self.operands().into_iter().enumerate();
        let operands: Vec<(Tensor, Tensor)> = operands
            .map(|(index, tensor)| {
                let own = if index == 0 || self.name.contains("attention") {
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
        let y = (self.kernel)(&rounded).unwrap();
        let expected = (self.oracle)(&oracle).unwrap();
        let f32_of = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap();
        assert_close(name, "value", &f32_of(&y), &expected, tolerance);
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
            assert_close(name, &what, &f32_of(gradient), expected, tolerance);
        }
        y.dtype()
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

pub(crate) fn assert_close(
    name: &str,
    what: &str,
    found: &Tensor,
    expected: &Tensor,
    tolerance: f32,
) {
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

/// Sizes for which the processor's tiles are used, if it has them.
pub(crate) fn large_cases() -> Vec<Case> {
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
