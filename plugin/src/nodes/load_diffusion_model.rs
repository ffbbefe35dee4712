//! LoadDiffusionModel: a checkpoint becomes a model.

use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, port};
use schemars::JsonSchema;
use serde::Deserialize;

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
        .output("model", port::DIFFUSION_MODEL, "Text encoder, U-Net, VAE and noise schedule")
        .aliases(&["checkpoint", "stable diffusion"])
    }

    fn fingerprint(&self, parameters: &Parameters) -> String {
        session::fingerprint(&parameters.checkpoint, &parameters.vae)
    }

    fn run(
        &mut self,
        _inputs: &Inputs,
        parameters: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        host.progress("loading", 0, 1, &parameters.checkpoint);
        let model = session::load_model(&parameters.checkpoint, &parameters.vae)?;
        host.progress("loading", 1, 1, &parameters.checkpoint);
        Ok(vec![model_value(model)])
    }
}
