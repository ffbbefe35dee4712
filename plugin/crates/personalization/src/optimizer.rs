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

use candle_core::Tensor;

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

    /// One step: the new parameters and the new state.
    ///
    /// `rates` has a learning rate per parameter.
    ///
    /// # Errors
    /// The tensor library fails.
    pub fn step(
        &self,
        parameters: &[Tensor],
        gradients: &[Tensor],
        rates: &[f64],
        config: &MStepConfig,
    ) -> Result<(Vec<Tensor>, Self)> {
        let [beta1, beta2] = config.betas;
        let t = self.t + 1;
        let (correction1, correction2) = (1.0 - beta1.powi(t as i32), 1.0 - beta2.powi(t as i32));
        let mut next = Self {
            m: Vec::new(),
            v: Vec::new(),
            t,
        };
        let mut moved = Vec::new();
        for (i, (parameter, gradient)) in parameters.iter().zip(gradients).enumerate() {
            let m = ((&self.m[i] * beta1)? + (gradient * (1.0 - beta1))?)?;
            let v = ((&self.v[i] * beta2)? + (gradient.sqr()? * (1.0 - beta2))?)?;
            let denominator = ((v.sqrt()? / correction2.sqrt())? + config.epsilon)?;
            let step = ((&m / denominator)? * (rates[i] / correction1))?;
            let decayed = (parameter * (1.0 - rates[i] * config.weight_decay))?;
            moved.push((decayed - step)?.detach());
            next.m.push(m.detach());
            next.v.push(v.detach());
        }
        Ok((moved, next))
    }
}

/// Scales all gradients together so that their joint norm is at most `max_norm` (PyTorch's `clip_grad_norm_`).
/// Returns them with the norm before.
///
/// # Errors
/// The tensor library fails.
pub fn clip_gradient_norm(gradients: &[Tensor], max_norm: f64) -> Result<(Vec<Tensor>, f64)> {
    let mut square = 0.0;
    for gradient in gradients {
        square += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
    }
    let norm = square.sqrt();
    let scale = (max_norm / (norm + 1e-6)).min(1.0);
    let scaled = gradients
        .iter()
        .map(|gradient| Ok((gradient * scale)?))
        .collect::<Result<_>>()?;
    Ok((scaled, norm))
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
        let (mut parameters, mut state) = (
            vec![tensor(1.0)],
            AdamWState::zeros(&[tensor(1.0)]).unwrap(),
        );
        let (mut theta, mut m, mut v) = (1.0f64, 0.0f64, 0.0f64);
        for (t, gradient) in [(1, 0.5f64), (2, -0.25)] {
            let gradients = [tensor(gradient as f32)];
            (parameters, state) = state
                .step(&parameters, &gradients, &[0.1], &config)
                .unwrap();
            theta *= 1.0 - 0.1 * 1e-2;
            m = 0.9 * m + 0.1 * gradient;
            v = 0.999 * v + 0.001 * gradient * gradient;
            theta -=
                0.1 * (m / (1.0 - 0.9f64.powi(t))) / ((v / (1.0 - 0.999f64.powi(t))).sqrt() + 1e-8);
        }
        let ours = f64::from(parameters[0].to_vec1::<f32>().unwrap()[0]);
        assert!((ours - theta).abs() < 1e-6, "{ours} {theta}");
    }

    #[test]
    fn the_joint_norm_is_clipped() {
        let gradients = [
            Tensor::new(&[3.0f32], &Device::Cpu).unwrap(),
            Tensor::new(&[4.0f32], &Device::Cpu).unwrap(),
        ];
        let (clipped, norm) = clip_gradient_norm(&gradients, 1.0).unwrap();
        assert!((norm - 5.0).abs() < 1e-6);
        assert!((clipped[0].to_vec1::<f32>().unwrap()[0] - 0.6).abs() < 1e-5);
    }
}
