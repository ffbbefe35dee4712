//! ImageBatch, MaskBatch and MaskToImage: several pictures or masks as one, and masks as gray pictures.

use plugin_api::{
    Host, Inputs, NodeDescriptor, NodeError, Outputs, SharedTensor, Value as WireValue,
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
    sockets(descriptor, IMAGES, picture_ports::IMAGE).output(
        "IMAGE",
        picture_ports::IMAGE,
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
    sockets(descriptor, MASKS, picture_ports::MASK).output(
        "MASK",
        picture_ports::MASK,
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
    .input("mask", picture_ports::MASK, "One mask or several")
    .output("IMAGE", picture_ports::IMAGE, "White where the mask is 1")
}

pub(super) enum Batch {
    Images,
    Masks,
}

impl BuiltinNode for Batch {
    fn run(
        &mut self,
        inputs: &mut Inputs,
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
            all.extend_from_slice(&finite_values(name, one)?);
        }
        Ok(vec![WireValue::Tensor(tensor(all, &shape)?)])
    }
}

impl Batch {
    fn checked_shape(&self, name: &str, one: &SharedTensor) -> Result<Vec<usize>, NodeError> {
        match self {
            Self::Images => picture_ports::image_size(name, one)?,
            Self::Masks => picture_ports::mask_size(name, one)?,
        };
        Ok(one.shape().to_vec())
    }
}

pub(super) struct MaskToImage;

impl BuiltinNode for MaskToImage {
    fn run(
        &mut self,
        inputs: &mut Inputs,
        _: &Map<String, Value>,
        _: &Host,
    ) -> Result<Outputs, NodeError> {
        let masks = inputs.tensor("mask")?;
        let [n, height, width] = picture_ports::mask_size("mask", masks)?;
        let values = finite_values("mask", masks)?
            .iter()
            .flat_map(|&value| [value; 3])
            .collect();
        Ok(vec![WireValue::Tensor(tensor(
            values,
            &[n, height, width, 3],
        )?)])
    }
}
