//! AdamW (Loshchilov and Hutter 2019) with PyTorch's semantics. Its state is data, so that a run can be resumed.
//!
//! ```text
//! θ ← θ (1 - η ω)
//! m ← β₁ m + (1 - β₁) g,   v ← β₂ v + (1 - β₂) g²
//! θ ← θ - η (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε)
//! ```
//! | symbol | meaning |
//! | --- | --- |
//! | θ, g | a parameter and its gradient, after clipping |
//! | η, ω | learning rate and weight decay |
//! | m, v | moments, zeros at t = 0 |

use candle_core::{Tensor, Var};

use crate::config::MStepConfig;
use crate::error::Result;

/// Moments of a list of parameters.
#[derive(Debug, Clone)]
pub struct AdamWState {
    /// First moments, one per parameter.
    pub m: Vec<Tensor>,
    /// Second moments.
    pub v: Vec<Tensor>,
    /// Steps so far.
    pub t: usize,
}

impl AdamWState {
    /// The state before the first step.
    ///
    /// # Errors
    /// The tensor library fails.
    pub fn zeros(parameters: &[Tensor]) -> Result<Self> {
        let zeros = || {
            parameters
                .iter()
                .map(|p| Ok(p.zeros_like()?.detach()))
                .collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            m: zeros()?,
            v: zeros()?,
            t: 0,
        })
    }

    /// One step, variable by variable, so that no more than one is there twice. A gradient is freed when it was used.
    ///
    /// * `scale`: of all gradients, see [`clipping`]
    /// * `rates`: a learning rate per variable
    ///
    /// # Errors
    /// The tensor library fails.
    pub fn step(
        &mut self,
        variables: &[&Var],
        gradients: Vec<Tensor>,
        scale: &Tensor,
        rates: &[f64],
        config: &MStepConfig,
    ) -> Result<()> {
        self.t += 1;
        let [beta1, beta2] = config.betas;
        let correction = |beta: f64| 1.0 - beta.powi(self.t as i32);
        let (correction1, correction2) = (correction(beta1), correction(beta2));
        let moments = self.m.iter_mut().zip(&mut self.v);
        for (((variable, gradient), &rate), (m, v)) in
            variables.iter().zip(gradients).zip(rates).zip(moments)
        {
            let gradient = gradient.broadcast_mul(scale)?;
            *m = ((&*m * beta1)? + (&gradient * (1.0 - beta1))?)?.detach();
            *v = ((&*v * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?.detach();
            let denominator = ((v.sqrt()? / correction2.sqrt())? + config.epsilon)?;
            let step = ((&*m / denominator)? * (rate / correction1))?;
            let decayed = (variable.as_detached_tensor() * (1.0 - rate * config.weight_decay))?;
            variable.set(&(decayed - step)?)?;
        }
        Ok(())
    }
}

/// What all gradients are to be multiplied by, so that their joint norm is at most `max_norm` (PyTorch's
/// `clip_grad_norm_`): a scalar that stays on the device. There must be a gradient.
///
/// # Errors
/// The tensor library fails.
pub fn clipping(gradients: &[Tensor], max_norm: f64) -> Result<Tensor> {
    let squares = gradients
        .iter()
        .map(|gradient| gradient.sqr()?.sum_all())
        .collect::<candle_core::Result<Vec<_>>>()?;
    let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
    Ok(((norm + 1e-6)?.recip()? * max_norm)?.minimum(1.0)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn two_steps_are_those_of_the_formula() {
        let config = MStepConfig {
            learning_rate: 0.1,
            ..MStepConfig::break_a_scene()
        };
        let tensor = |v: f32| Tensor::new(&[v], &Device::Cpu).unwrap();
        let variable = Var::from_tensor(&tensor(1.0)).unwrap();
        let mut state = AdamWState::zeros(&[tensor(1.0)]).unwrap();
        let (mut theta, mut m, mut v) = (1.0f64, 0.0f64, 0.0f64);
        for (t, gradient) in [(1, 0.5f64), (2, -0.25)] {
            let gradients = vec![tensor(2.0 * gradient as f32)];
            let scale = Tensor::new(0.5f32, &Device::Cpu).unwrap();
            state
                .step(&[&variable], gradients, &scale, &[0.1], &config)
                .unwrap();
            theta *= 1.0 - 0.1 * 1e-2;
            m = 0.9 * m + 0.1 * gradient;
            v = 0.999 * v + 0.001 * gradient * gradient;
            theta -=
                0.1 * (m / (1.0 - 0.9f64.powi(t))) / ((v / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8);
        }
        let ours = f64::from(variable.to_vec1::<f32>().unwrap()[0]);
        assert!((ours - theta).abs() < 1e-6, "{ours} {theta}");
    }

    #[test]
    fn the_joint_norm_is_clipped() {
        let gradients = [
            Tensor::new(&[3.0f32], &Device::Cpu).unwrap(),
            Tensor::new(&[4.0f32], &Device::Cpu).unwrap(),
        ];
        let scale = |max_norm: f64| -> f32 {
            let scale = clipping(&gradients, max_norm).unwrap();
            scale.to_scalar().unwrap()
        };
        assert!((scale(1.0) - 0.2).abs() < 1e-6);
        assert_eq!(scale(6.0), 1.0);
    }
}
