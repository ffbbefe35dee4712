//! The masked diffusion loss (P Eq. 3; BaS `train.py`).
//!
//! ```text
//! L_mask = mean over samples, channels and pixels of ((ε_θ(z_t, t, y) - target) · U)²,   U = max_{c in y} M_c
//! ```
//! | symbol | shape | meaning |
//! | --- | --- | --- |
//! | ε_θ | `[B, 4, h, w]` | the U-Net's prediction |
//! | target | `[B, 4, h, w]` | the noise, or the velocity |
//! | U | `[1, 1, h, w]` in {0, 1} | union of the sampled concepts' masks, nearest |
//!
//! Divided by all elements, not by those inside: small masks get small gradients, as in BaS.

use candle_core::Tensor;

use crate::error::Result;

/// L_mask, a scalar; differentiable in `prediction`.
///
/// # Errors
/// Shapes that do not fit.
pub fn masked_diffusion_loss(
    prediction: &Tensor,
    target: &Tensor,
    union: &Tensor,
) -> Result<Tensor> {
    Ok((prediction - target)?
        .broadcast_mul(union)?
        .sqr()?
        .mean_all()?)
}
