//! Writes the noise that sampling starts from, so that another program can start from the same:
//! `cargo run --release -p stable-diffusion --example initial_noise -- SEED LATENT_SIZE OUT.safetensors`

use candle_core::Device;
use stable_diffusion::rng::Rng;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [seed, size, out] = &arguments[..] else {
        return Err("usage: SEED LATENT_SIZE OUT.safetensors".into());
    };
    let size: usize = size.parse()?;
    let noise = Rng::new(seed.parse()?, "generate", 0).normal(&[1, 4, size, size], &Device::Cpu)?;
    Ok(noise.save_safetensors("latents", out)?)
}
