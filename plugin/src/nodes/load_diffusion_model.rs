//! LoadDiffusionModel: a checkpoint becomes a model.

use candle_core::Device;
use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs};
use schemars::JsonSchema;
use serde::Deserialize;
use stable_diffusion::memory::Memory;
use stable_diffusion::ops::Precision;

use crate::device::device;
use crate::ports;
use crate::session;
use crate::values::model_value;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct LoadDiffusionModel;

/// Parameters of the node.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct Parameters {
    /// `sprites` for the bundled model, or the path of a Stable Diffusion 1.x / 2.x diffusers directory or single
    /// `.safetensors` file.
    #[serde(default = "bundled")]
    checkpoint: String,
    /// Path of another VAE for the model: a `.safetensors` file or a diffusers directory; empty for the checkpoint's own.
    #[serde(default)]
    vae: String,
    /// What the U-Net's frozen weights are in memory, and the factors of its products; sums, statistics, losses and whatever
    /// is trained are f32 in any case. `bf16` has 8 bits and takes half the memory; processors with matrix tiles (Intel AMX)
    /// are about twice as fast with it. `f16` has 11 bits and is for GPUs only. `auto` is f32 on a processor, bf16 on CUDA,
    /// f16 on Metal.
    #[serde(default)]
    precision: PrecisionChoice,
    /// What a step of learning keeps until its gradients are computed. `fast` keeps everything; `lean` computes the parts of
    /// the U-Net once more, for a third to a half more time and less memory, with the same results, and takes pictures
    /// of half again the model's area through the VAE in tiles, which changes them slightly; `auto` keeps everything where that
    /// is at most a quarter of the machine's memory, computes again where it is not and on GPUs, and never tiles.
    #[serde(default)]
    memory: MemoryChoice,
}

/// Choices of a parameter.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PrecisionChoice {
    /// What keeps the results.
    #[default]
    Auto,
    /// 24 bits.
    F32,
    /// 8 bits, and the range of f32.
    Bf16,
    /// 11 bits, and a small range.
    F16,
}

impl PrecisionChoice {
    fn on(self, device: &Device) -> Precision {
        match self {
            Self::F32 => Precision::F32,
            Self::Bf16 => Precision::Bf16,
            Self::F16 => Precision::F16,
            Self::Auto if device.is_cuda() => Precision::Bf16,
            Self::Auto if device.is_metal() => Precision::F16,
            Self::Auto => Precision::F32,
        }
    }
}

/// Choices of a parameter.
#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum MemoryChoice {
    /// What fits.
    #[default]
    Auto,
    /// Everything is kept.
    Fast,
    /// Little is kept.
    Lean,
}

impl From<MemoryChoice> for Memory {
    fn from(choice: MemoryChoice) -> Self {
        match choice {
            MemoryChoice::Auto => Self::Auto,
            MemoryChoice::Fast => Self::Fast,
            MemoryChoice::Lean => Self::Lean,
        }
    }
}

fn bundled() -> String {
    sprites::NAME.to_owned()
}

impl Node for LoadDiffusionModel {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>(
            "LoadDiffusionModel",
            "Load Diffusion Model",
            "Conceptloom/load",
            "Loads a Stable Diffusion checkpoint: the bundled one, a diffusers directory, or a single file",
        )
        .output("model", ports::DIFFUSION_MODEL, "Text encoder, U-Net, VAE and noise schedule")
        .aliases(&["checkpoint", "stable diffusion"])
    }

    fn validate(&self, parameters: &Parameters) -> Result<(), NodeError> {
        if parameters.checkpoint.trim().is_empty() {
            let message = "no checkpoint is named; name a diffusers directory or a .safetensors file, or sprites for the \
                           bundled model";
            return Err(NodeError::invalid_input("checkpoint", message));
        }
        Ok(())
    }

    fn fingerprint(&self, parameters: &Parameters) -> String {
        session::fingerprint(&parameters.checkpoint, &parameters.vae)
    }

    fn run(
        &mut self,
        _inputs: &mut Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        // A path that came over a wire was not looked at before.
        self.validate(&parameters)?;
        host.progress("loading", 0, 1, &parameters.checkpoint);
        let (precision, memory) = (parameters.precision.on(device()?), parameters.memory.into());
        let (checkpoint, vae) = (&parameters.checkpoint, &parameters.vae);
        let model = session::load_model(checkpoint, vae, precision, memory)?;
        host.progress("loading", 1, 1, &parameters.checkpoint);
        Ok(vec![model_value(model)])
    }
}
