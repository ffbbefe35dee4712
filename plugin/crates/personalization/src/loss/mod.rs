//! The two losses, one per file.

pub mod cross_attention;
pub mod masked_diffusion;

pub use cross_attention::cross_attention_loss;
pub use masked_diffusion::masked_diffusion_loss;
