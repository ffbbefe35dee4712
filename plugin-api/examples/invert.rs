//! A plugin of one node: pictures with their light and dark exchanged.

use plugin_api::{Host, Inputs, Node, NodeDescriptor, NodeError, Outputs, Value};
use schemars::JsonSchema;
use serde::Deserialize;

/// Light becomes dark.
#[derive(Default)]
struct Invert;

#[derive(Deserialize, JsonSchema)]
struct Parameters {
    /// How much: 0 leaves the pictures as they are, 1 inverts them.
    #[serde(default = "whole")]
    #[schemars(range(min = 0.0, max = 1.0))]
    strength: f32,
}

fn whole() -> f32 {
    1.0
}

impl Node for Invert {
    type Parameters = Parameters;

    fn descriptor() -> NodeDescriptor {
        NodeDescriptor::new::<Parameters>("Invert", "Invert", "color", "Light becomes dark")
            .input("images", "IMAGE", "[batch, height, width, 3] in 0..=1")
            .output("images", "IMAGE", "The inverted pictures")
    }

    fn run(
        &mut self,
        inputs: &mut Inputs,
        Parameters { strength }: Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError> {
        let mut images = inputs.take_tensor("images")?.make_unique()?;
        let values = images.as_mut_slice::<f32>()?;
        let parts = values.len().div_ceil(1 << 20);
        for (i, part) in values.chunks_mut(1 << 20).enumerate() {
            if host.is_canceled() {
                return Err(NodeError::canceled());
            }
            for value in part {
                *value += strength * (1.0 - 2.0 * *value);
            }
            host.progress("invert", i + 1, parts, "");
        }
        Ok(vec![Value::Tensor(images)])
    }
}

plugin_api::export_plugin! { name: "invert", nodes: [Invert] }
