//! The samplers of k-diffusion. `x` and what is returned are [B, 4, h, w]; `sigmas` fall, and end at 0.

use candle_core::Tensor;

use super::Problem;
use crate::error::Result;

/// a x + b y.
pub(super) fn combined(a: f64, x: &Tensor, b: f64, y: &Tensor) -> Result<Tensor> {
    Ok(((x * a)? + (y * b)?)?.detach())
}

/// Along the straight line from x through D(x, σ) to the next noise level.
fn towards(clean: &Tensor, x: &Tensor, sigma: f64, next: f64) -> Result<Tensor> {
    let rest = next / sigma;
    combined(rest, x, 1.0 - rest, clean)
}

pub(super) fn euler(problem: &mut dyn Problem, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let mut x = x.clone();
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let clean = problem.clean(&x, sigma)?;
        x = towards(&clean, &x, sigma, next)?;
        problem.on_step(&clean)?;
    }
    Ok(x)
}

pub(super) fn euler_ancestral(
    problem: &mut dyn Problem,
    x: &Tensor,
    sigmas: &[f64],
) -> Result<Tensor> {
    let mut x = x.clone();
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        // How much of the next level's noise is new.
        let new = (next.powi(2) * (sigma.powi(2) - next.powi(2)) / sigma.powi(2)).sqrt();
        let new = new.min(next);
        let clean = problem.clean(&x, sigma)?;
        x = towards(
            &clean,
            &x,
            sigma,
            (next.powi(2) - new.powi(2)).max(0.0).sqrt(),
        )?;
        if next > 0.0 {
            x = combined(1.0, &x, new, &problem.noise(&x)?)?;
        }
        problem.on_step(&clean)?;
    }
    Ok(x)
}

pub(super) fn heun(problem: &mut dyn Problem, x: &Tensor, sigmas: &[f64]) -> Result<Tensor> {
    let mut x = x.clone();
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let clean = problem.clean(&x, sigma)?;
        let end = towards(&clean, &x, sigma, next)?;
        x = if next > 0.0 {
            // The mean of the slopes at both ends.
            let slope = combined(1.0 / sigma, &x, -1.0 / sigma, &clean)?;
            let slope_there = combined(1.0 / next, &end, -1.0 / next, &problem.clean(&end, next)?)?;
            combined(1.0, &x, 0.5 * (next - sigma), &(slope + slope_there)?)?
        } else {
            end
        };
        problem.on_step(&clean)?;
    }
    Ok(x)
}

/// A step of DPM-Solver++ (2M) from λ to λ + h, λ = -ln σ.
struct Last {
    clean: Tensor,
    h: f64,
}

impl Last {
    /// D extrapolated to the middle of a step of length `h`.
    fn extrapolated(last: Option<&Self>, clean: &Tensor, h: f64) -> Result<Tensor> {
        last.map_or_else(
            || Ok(clean.clone()),
            |last| {
                let more = 0.5 * h / last.h;
                combined(1.0 + more, clean, -more, &last.clean)
            },
        )
    }
}

/// `eta` 0 is the ODE's solver, 1 the SDE's: as much noise is new as decays beyond what it would without.
pub(super) fn dpmpp_2m(
    problem: &mut dyn Problem,
    x: &Tensor,
    sigmas: &[f64],
    eta: f64,
) -> Result<Tensor> {
    let mut x = x.clone();
    let mut last: Option<Last> = None;
    for pair in sigmas.windows(2) {
        let (sigma, next) = (pair[0], pair[1]);
        let clean = problem.clean(&x, sigma)?;
        if next > 0.0 {
            let h = (sigma / next).ln();
            let middle = Last::extrapolated(last.as_ref(), &clean, h)?;
            let kept = next / sigma * (-eta * h).exp();
            x = combined(kept, &x, -(-(1.0 + eta) * h).exp_m1(), &middle)?;
            if eta > 0.0 {
                let new = next * (-(-2.0 * eta * h).exp_m1()).sqrt();
                x = combined(1.0, &x, new, &problem.noise(&x)?)?;
            }
            problem.on_step(&clean)?;
            last = Some(Last { clean, h });
        } else {
            problem.on_step(&clean)?;
            x = clean;
        }
    }
    Ok(x)
}
