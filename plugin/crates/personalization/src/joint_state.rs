//! Where the joint stage stands, as one file.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use stable_diffusion::weights::{TensorFile, write_tensors};

use crate::error::{Error, Result};
use crate::optimizer::AdamWState;

/// Where the steps are, in the file's metadata.
const METADATA: &str = "joint_state";

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
    /// Numbers in it.
    pub(crate) fn numbers(&self) -> usize {
        let values = self.values.iter().map(|(_, value)| value.elem_count());
        3 * values.sum::<usize>()
    }

    /// Writes the state, tensor by tensor.
    pub(crate) fn write(&self, file: &mut dyn Write) -> io::Result<()> {
        let mut tensors = BTreeMap::new();
        for (i, (name, value)) in self.values.iter().enumerate() {
            let AdamWState { m, v, .. } = &self.optimizer;
            for (kind, tensor) in [("value", value), ("m", &m[i]), ("v", &v[i])] {
                tensors.insert(format!("{kind}.{name}"), tensor.clone());
            }
        }
        let steps = format!("{} {}", self.step, self.optimizer.t);
        let metadata = BTreeMap::from([(METADATA.to_owned(), steps)]);
        write_tensors(file, &tensors, DType::F32, &metadata)
    }

    /// Reads a state; values come in the order of their names.
    ///
    /// # Errors
    /// The file is missing, truncated, or no such state.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let file = TensorFile::open(path)?;
        let steps = file.metadata().get(METADATA);
        let steps: Vec<usize> = steps
            .iter()
            .flat_map(|text| text.split(' '))
            .filter_map(|number| number.parse().ok())
            .collect();
        let [step, t] = steps[..] else {
            return Err(Error::file(path, "is no saved state of a joint stage"));
        };
        let names: Vec<&str> = file
            .names()
            .filter_map(|name| name.strip_prefix("value."))
            .collect();
        let all = |kind: &str| -> Result<Vec<Tensor>> {
            let read = |name: &&str| Ok(file.read(&format!("{kind}.{name}"), device)?);
            names.iter().map(read).collect()
        };
        let values = names.iter().map(ToString::to_string);
        Ok(Self {
            step,
            values: values.zip(all("value")?).collect(),
            optimizer: AdamWState {
                m: all("m")?,
                v: all("v")?,
                t,
            },
        })
    }
}
