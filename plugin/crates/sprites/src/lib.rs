//! The bundled checkpoint, embedded, so that everything runs before anything is downloaded.
//!
//! `sprites` is a small latent diffusion model in Stable Diffusion's own layout: pictures of 128×128, latents of
//! 32×32, a text encoder of width 128. What it can and cannot do stands in this crate's README, the licenses of the
//! drawings that it learned from in ATTRIBUTION.md, how it was trained in `training/`.
//!
//! Data only: this crate knows nothing of tensors.

/// Name under which the checkpoint is asked for.
pub const NAME: &str = "sprites";

macro_rules! embedded {
    ($($path:literal),+ $(,)?) => {
        &[$(($path, include_bytes!(concat!("../model/", $path)))),+]
    };
}

/// Files of the checkpoint by their path in a diffusers directory.
pub static FILES: &[(&str, &[u8])] = embedded![
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

#[cfg(test)]
mod tests {
    use super::FILES;

    #[test]
    fn the_weights_stay_small_enough_to_embed() {
        let bytes: usize = FILES.iter().map(|(_, content)| content.len()).sum();
        assert!(bytes < 30_000_000, "{bytes} bytes");
    }
}
