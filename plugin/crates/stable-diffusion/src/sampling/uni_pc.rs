//! UniPC (Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework", Algorithms 5 to 8) on the clean latent.
//!
//! ```text
//! α = 1 / sqrt(1 + σ²),  s = σ α,  λ = ln(α / s) = -ln σ,  h = λ_t - λ_0
//! base     = s_t / s_0 x - α_t (e^-h - 1) m_0                  all in the variance-preserving form α x
//! D_k      = (m_k - m_0) / r_k,   r_k = (λ_k - λ_0) / h        of the predictions before; r = 1 for the new one
//! x_t      = base + α_t h Σ_k ρ_k D_k,   Σ_k ρ_k r_k^(i-1) = i! φ_{i+1}(-h)
//! φ_1(x)   = (e^x - 1) / x,   φ_{i+1}(x) = (φ_i(x) - 1 / i!) / x
//! ```
//! The predictor leaves out the new prediction's term, the corrector takes the step again with it.

use candle_core::Tensor;
use nalgebra::{DMatrix, DVector};

use super::Problem;
use super::samplers::combined;
use crate::error::Result;

/// Predictions that a step builds on, the new one included.
const ORDER: usize = 3;

/// Stands for 0, whose λ is infinite.
const LEAST: f64 = 1e-3;

/// A prediction and where it was made.
struct Known {
    /// λ.
    lambda: f64,
    /// m [B, 4, h, w], the clean latent.
    clean: Tensor,
}

pub(super) fn uni_pc(problem: &mut dyn Problem, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let n_steps = sigmas.len() - 1;
    let largest = ORDER.min(n_steps.saturating_sub(1)).max(1);
    // α x at the noise level before the current one.
    let mut before = (x * alpha(sigmas[0]))?;
    let mut known: Vec<Known> = Vec::new();
    let mut here = before.clone();
    for (step, &sigma) in sigmas[..n_steps].iter().enumerate() {
        let clean = problem.clean(&(&here * (1.0 / alpha(sigma)))?.detach(), sigma)?;
        let now = Known {
            lambda: -sigma.ln(),
            clean,
        };
        if step > 0 {
            let order = order_of(step, n_steps, largest);
            let new = Some(&now);
            here = stepped(&before, &known, order, sigmas[step - 1], sigma, new)?;
        }
        problem.on_step(&now.clean)?;
        known.insert(0, now);
        known.truncate(ORDER);
        let next = if sigmas[step + 1] > 0.0 {
            sigmas[step + 1]
        } else {
            LEAST
        };
        before = here;
        let order = order_of(step + 1, n_steps, largest);
        here = stepped(&before, &known, order, sigma, next, None)?;
    }
    Ok((here * (1.0 / alpha(LEAST)))?)
}

/// Of the step that ends at the noise level `end` of `n_steps`: as many predictions as there are, and fewer towards the end.
fn order_of(end: usize, n_steps: usize, largest: usize) -> usize {
    largest.min(end).min(n_steps + 1 - end)
}

fn alpha(sigma: f64) -> f64 {
    1.0 / (1.0 + sigma * sigma).sqrt()
}

/// One step; `known` has the prediction at `from` first. With the prediction at `to`, the corrector's.
fn stepped(
    x: &Tensor,
    known: &[Known],
    order: usize,
    from: f64,
    to: f64,
    new: Option<&Known>,
) -> Result<Tensor> {
    let [now, earlier @ ..] = known else {
        return Ok(x.clone());
    };
    let h = from.ln() - to.ln();
    let weight = -(-h).exp_m1() * alpha(to);
    let kept = to * alpha(to) / (from * alpha(from));
    let mut out = combined(kept, x, weight, &now.clean)?;
    let mut terms: Vec<(f64, &Tensor)> = earlier
        .iter()
        .take(order - 1)
        .map(|known| ((known.lambda - now.lambda) / h, &known.clean))
        .collect();
    terms.extend(new.map(|new| (1.0, &new.clean)));
    let ratios: Vec<f64> = terms.iter().map(|(ratio, _)| *ratio).collect();
    for ((ratio, clean), rho) in terms.iter().zip(coefficients(&ratios, h)) {
        let scale = alpha(to) * h * rho / ratio;
        out = (out + combined(scale, clean, -scale, &now.clean)?)?;
    }
    Ok(out.detach())
}

/// ρ of every term.
fn coefficients(ratios: &[f64], h: f64) -> Vec<f64> {
    let n = ratios.len();
    // One term has its limit for small steps, as in the authors' code.
    if n <= 1 {
        return vec![0.5; n];
    }
    let x = -h;
    // φ_1
    let mut phi = x.exp_m1() / x;
    let mut factorial = 1.0;
    let mut right = Vec::with_capacity(n);
    for i in 1..=n {
        factorial *= i as f64;
        phi = (phi - 1.0 / factorial) / x;
        right.push(factorial * phi);
    }
    let left = DMatrix::from_fn(n, n, |i, k| ratios[k].powi(i as i32));
    left.lu()
        .solve(&DVector::from_vec(right))
        .map_or_else(|| vec![0.5; n], |rho| rho.iter().copied().collect())
}
