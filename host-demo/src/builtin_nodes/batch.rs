//! ImageBatch, MaskBatch and MaskToImage: several pictures or masks as one, and masks as gray pictures.

use plugin_api::{
    Host, Inputs, NodeDescriptor, NodeError, Outputs, SharedTensor, Value as WireValue, port,
};
use schemars::JsonSchema;
use serde_json::{Map, Value};

use super::BuiltinNode;
use crate::pictures::{finite_values, tensor};

#[derive(JsonSchema)]
struct NoParameters {}

const IMAGES: [&str; 4] = ["image1", "image2", "image3", "image4"];
const MASKS: [&str; 4] = ["mask_1", "mask_2", "mask_3", "mask_4"];

fn sockets(descriptor: NodeDescriptor, names: [&str; 4], port: &str) -> NodeDescriptor {
    let [first, others @ ..] = names;
    let descriptor = descriptor.input(first, port, "The first of the batch; may be a batch itself");
    others.into_iter().fold(descriptor, |descriptor, name| {
        descriptor.optional_input(
            name,
            port,
            "Goes behind the ones before it; must have their size",
        )
    })
}

pub(super) fn image_descriptor() -> NodeDescriptor {
    let descriptor = NodeDescriptor::new::<NoParameters>(
        "ImageBatch",
        "Batch Images",
        "image",
        "Puts pictures of one size behind each other",
    );
    sockets(descriptor, IMAGES, port::IMAGE).output(
        "IMAGE",
        port::IMAGE,
        "All pictures, in the order of the inputs",
    )
}

pub(super) fn mask_descriptor() -> NodeDescriptor {
    let descriptor = NodeDescriptor::new::<NoParameters>(
        "MaskBatch",
        "Batch Masks",
        "mask",
        "Puts masks of one size behind each other: one per concept, in the order of the concepts",
    );
    sockets(descriptor, MASKS, port::MASK).output(
        "MASK",
        port::MASK,
        "All masks, in the order of the inputs",
    )
}

pub(super) fn mask_to_image_descriptor() -> NodeDescriptor {
    NodeDescriptor::new::<NoParameters>(
        "MaskToImage",
        "Convert Mask to Image",
        "mask",
        "Masks as gray pictures",
    )
    .input("mask", port::MASK, "One mask or several")
    .output("IMAGE", port::IMAGE, "White where the mask is 1")
}

pub(super) enum Batch {
    Images,
    Masks,
}

impl BuiltinNode for Batch {
    fn run(
        &mut self,
        inputs: &Inputs,
        _: &Map<String, Value>,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let names = match self {
            Self::Images => IMAGES,
            Self::Masks => MASKS,
        };
        let mut shape: Vec<usize> = Vec::new();
        let mut all = Vec::new();
        for name in names {
            let Some(one) = inputs.optional_tensor(name)? else {
                continue;
            };
            let own = self.checked_shape(name, one)?;
            if shape.is_empty() {
                shape = own;
            } else if own[1..] != shape[1..] {
                return Err(NodeError::invalid_input(
                    name,
                    format!(
                        "{name} is {}×{} pixels and the ones before it are {}×{}; a batch has one size",
                        own[2], own[1], shape[2], shape[1]
                    ),
                ));
            } else {
                shape[0] += own[0];
            }
            all.extend(finite_values(name, one)?);
        }
        Ok(vec![WireValue::Tensor(tensor(all, &shape)?)])
    }
}

impl Batch {
    fn checked_shape(&self, name: &str, one: &SharedTensor) -> Result<Vec<usize>, NodeError> {
        match self {
            Self::Images => port::image_size(name, one)?,
            Self::Masks => port::mask_size(name, one)?,
        };
        Ok(one.shape())
    }
}

pub(super) struct MaskToImage;

impl BuiltinNode for MaskToImage {
    fn run(
        &mut self,
        inputs: &Inputs,
        _: &Map<String, Value>,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let masks = inputs.tensor("mask")?;
        let [n, height, width] = port::mask_size("mask", masks)?;
        let values = finite_values("mask", masks)?
            .into_iter()
            .flat_map(|value| [value; 3])
            .collect();
        Ok(vec![WireValue::Tensor(tensor(
            values,
            &[n, height, width, 3],
        )?)])
    }
}
