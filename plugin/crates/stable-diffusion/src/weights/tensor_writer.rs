//! Writing `.safetensors`: the same tensors and metadata give the same bytes.
//!
//! The safetensors crate keeps metadata in the order of a hash map, which differs from run to run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// The header's length is padded to this, so that tensors are aligned.
const ALIGNMENT: usize = 8;

/// The bytes of a file with these tensors as `f32`.
///
/// # Errors
/// [`Error::Tensor`] when the tensor library fails.
pub fn encode_tensors(
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut bytes = header(tensors, DType::F32, metadata);
    for tensor in tensors.values() {
        bytes.extend(bytes_of(tensor, DType::F32)?);
    }
    Ok(bytes)
}

/// Writes a file with these tensors as `dtype` (`f32` or `f16`), one at a time. A file of this name is replaced only
/// once the new one is complete.
///
/// # Errors
/// [`Error::Unreadable`] when the file cannot be written, [`Error::Tensor`] when the tensor library fails.
pub fn save_tensors(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    dtype: DType,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let partial = path.with_extension("safetensors.partial");
    let unwritable = |error: io::Error| {
        let _ = std::fs::remove_file(&partial);
        Error::unreadable(
            path.display().to_string(),
            format!("it cannot be written: {error}"),
        )
    };
    let mut file = BufWriter::new(File::create(&partial).map_err(unwritable)?);
    let head = header(tensors, dtype, metadata);
    file.write_all(&head).map_err(unwritable)?;
    for tensor in tensors.values() {
        file.write_all(&bytes_of(tensor, dtype)?)
            .map_err(unwritable)?;
    }
    let file = file
        .into_inner()
        .map_err(|error| unwritable(error.into_error()))?;
    file.sync_all().map_err(unwritable)?;
    std::fs::rename(&partial, path).map_err(unwritable)
}

fn header(
    tensors: &BTreeMap<String, Tensor>,
    dtype: DType,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let name = if dtype == DType::F16 { "F16" } else { "F32" };
    let mut entries = Map::new();
    if !metadata.is_empty() {
        entries.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut at = 0;
    for (key, tensor) in tensors {
        let end = at + tensor.elem_count() * dtype.size_in_bytes();
        let entry = json!({"dtype": name, "shape": tensor.dims(), "data_offsets": [at, end]});
        entries.insert(key.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(entries).to_string();
    while !text.len().is_multiple_of(ALIGNMENT) {
        text.push(' ');
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

fn bytes_of(tensor: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(if dtype == DType::F16 {
        let values = flat.to_dtype(DType::F16)?.to_vec1::<half::f16>()?;
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    } else {
        let values = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::weights::TensorFile;

    #[test]
    fn what_is_written_is_read_and_always_in_the_same_bytes() -> Result<()> {
        let tensor = |values: &[f32]| Tensor::from_slice(values, (values.len(), 1), &Device::Cpu);
        let tensors = BTreeMap::from([
            ("b".to_owned(), tensor(&[1.0, -2.5])?),
            ("a".to_owned(), tensor(&[0.5, 0.25, 3.0])?),
        ]);
        let metadata: BTreeMap<String, String> = (0..20)
            .map(|i| (format!("key {i}"), format!("ü {i}")))
            .collect();
        let bytes = encode_tensors(&tensors, &metadata)?;
        assert_eq!(bytes, encode_tensors(&tensors, &metadata)?);
        let folder =
            tempfile::tempdir().map_err(|error| Error::unreadable(String::new(), &error))?;
        for dtype in [DType::F32, DType::F16] {
            let path = folder.path().join("x.safetensors");
            save_tensors(&path, &tensors, dtype, &metadata)?;
            let file = TensorFile::open(&path)?;
            assert_eq!(
                file.read("b", &Device::Cpu)?
                    .flatten_all()?
                    .to_vec1::<f32>()?,
                [1.0, -2.5]
            );
            assert_eq!(
                file.metadata().get("key 3").map(String::as_str),
                Some("ü 3")
            );
        }
        Ok(())
    }
}
