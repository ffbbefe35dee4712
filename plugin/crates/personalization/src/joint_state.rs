//! Where the joint stage stands, as one file.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::concept_file::write_atomically;
use crate::error::{Error, Result};
use crate::optimizer::AdamWState;

/// The joint stage between two steps. Going on from it gives the same bits as never having stopped.
#[derive(Debug, Clone)]
pub struct JointState {
    /// Steps done.
    pub step: usize,
    /// Everything that is trained, by name: weights, and the tokens as `rows`.
    pub values: Vec<(String, Tensor)>,
    /// Moments, in the same order.
    pub optimizer: AdamWState,
}

impl JointState {
    /// Writes the state to a temporary sibling, then renames.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |error: &dyn std::fmt::Display| Error::CannotWrite {
            file: path.display().to_string(),
            reason: error.to_string(),
        };
        let mut raw = Vec::new();
        for (i, (name, value)) in self.values.iter().enumerate() {
            for (kind, tensor) in [
                ("value", value),
                ("m", &self.optimizer.m[i]),
                ("v", &self.optimizer.v[i]),
            ] {
                let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                raw.push((format!("{kind}.{name}"), tensor.dims().to_vec(), bytes));
            }
        }
        let views: std::result::Result<Vec<_>, safetensors::SafeTensorError> = raw
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((
                    name.as_str(),
                    TensorView::new(Dtype::F32, shape.clone(), bytes)?,
                ))
            })
            .collect();
        let views = views.map_err(|error| failed(&error))?;
        let steps = format!("{} {}", self.step, self.optimizer.t);
        let metadata = HashMap::from([("joint_state".to_owned(), steps)]);
        let bytes =
            safetensors::serialize(views, Some(metadata)).map_err(|error| failed(&error))?;
        write_atomically(path, &bytes)
    }

    /// Reads a state; values come in the order of their names.
    ///
    /// # Errors
    /// The file is missing, truncated, or no such state.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| Error::file(path, error))?;
        let (_, metadata) =
            SafeTensors::read_metadata(&bytes).map_err(|error| Error::file(path, error))?;
        let steps = metadata
            .metadata()
            .as_ref()
            .and_then(|entries| entries.get("joint_state"));
        let steps: Vec<usize> = steps
            .iter()
            .flat_map(|text| text.split(' '))
            .filter_map(|number| number.parse().ok())
            .collect();
        let [step, t] = steps[..] else {
            return Err(Error::file(path, "is no saved state of a joint stage"));
        };
        let tensors = SafeTensors::deserialize(&bytes).map_err(|error| Error::file(path, error))?;
        let tensor = |name: String| -> Result<Tensor> {
            let view = tensors
                .tensor(&name)
                .map_err(|error| Error::file(path, error))?;
            let read = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let values: Vec<f32> = view.data().chunks_exact(4).map(read).collect();
            Ok(Tensor::from_vec(values, view.shape(), device)?)
        };
        let mut names: Vec<&str> = tensors
            .names()
            .into_iter()
            .filter_map(|n| n.strip_prefix("value."))
            .collect();
        names.sort_unstable();
        let all = |kind: &str| {
            names
                .iter()
                .map(|name| tensor(format!("{kind}.{name}")))
                .collect::<Result<Vec<_>>>()
        };
        let values = names
            .iter()
            .map(ToString::to_string)
            .zip(all("value")?)
            .collect();
        Ok(Self {
            step,
            values,
            optimizer: AdamWState {
                m: all("m")?,
                v: all("v")?,
                t,
            },
        })
    }
}
