//! Writing `.safetensors`: the same tensors and metadata give the same bytes.
//!
//! The safetensors crate keeps metadata in the order of a hash map, which differs from run to run.

use std::collections::BTreeMap;
use std::io::{self, Write};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::ops::{dims_of, in_rows};

/// The header's length is padded to this, so that tensors are aligned.
const ALIGNMENT: usize = 8;

/// The bytes of a file with these tensors as `f32`.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) when the tensor library fails.
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

/// Writes a safetensors file with these tensors, one at a time: `u8` as they are, all others as `dtype` (`f32` or `f16`).
///
/// # Errors
/// Those of the writer, and of the tensor library.
pub fn write_tensors(
    file: &mut dyn Write,
    tensors: &BTreeMap<String, Tensor>,
    dtype: DType,
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    file.write_all(&header(tensors, dtype, metadata))?;
    for tensor in tensors.values() {
        file.write_all(&bytes_of(tensor, dtype).map_err(io::Error::other)?)?;
    }
    Ok(())
}

/// The type in which a tensor is written.
fn stored(tensor: &Tensor, dtype: DType) -> (DType, &'static str) {
    match (tensor.dtype(), dtype) {
        (DType::U8, _) => (DType::U8, "U8"),
        (_, DType::F16) => (DType::F16, "F16"),
        _ => (DType::F32, "F32"),
    }
}

fn header(
    tensors: &BTreeMap<String, Tensor>,
    dtype: DType,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut entries = Map::new();
    if !metadata.is_empty() {
        entries.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut at = 0;
    for (key, tensor) in tensors {
        let (dtype, name) = stored(tensor, dtype);
        let dims = dims_of(tensor);
        let end = at + dims.iter().product::<usize>() * dtype.size_in_bytes();
        let entry = json!({"dtype": name, "shape": dims, "data_offsets": [at, end]});
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
    // Where there is room: a device that is full of a model has none for its copy.
    let flat = in_rows(&tensor.to_device(&Device::Cpu)?)?.flatten_all()?;
    Ok(match stored(tensor, dtype).0 {
        DType::U8 => flat.to_vec1::<u8>()?,
        DType::F16 => little_endian(
            &flat.to_dtype(DType::F16)?.to_vec1()?,
            half::f16::to_le_bytes,
        ),
        _ => {
            let values = flat.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            if cfg!(target_endian = "little") {
                bytemuck::cast_slice(&values).to_vec()
            } else {
                little_endian(&values, f32::to_le_bytes)
            }
        }
    })
}

fn little_endian<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| bytes(value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::weights::TensorFile;

    #[test]
    fn what_is_written_is_read_and_always_in_the_same_bytes() -> Result<()> {
        let tensor = |values: &[f32]| Tensor::from_slice(values, (values.len(), 1), &Device::Cpu);
        let tensors = BTreeMap::from([
            ("b".to_owned(), tensor(&[1.0, -2.5])?),
            ("a".to_owned(), tensor(&[0.5, 0.25, 3.0])?),
            (
                "none".to_owned(),
                Tensor::zeros((0, 2, 2), DType::F32, &Device::Cpu)?,
            ),
            (
                "mask".to_owned(),
                Tensor::from_slice(&[1u8, 0, 1], 3, &Device::Cpu)?,
            ),
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
            let mut written = Vec::new();
            write_tensors(&mut written, &tensors, dtype, &metadata)
                .and_then(|()| std::fs::write(&path, &written))
                .map_err(|error| Error::unreadable(String::new(), &error))?;
            let file = TensorFile::open(&path)?;
            assert_eq!(
                file.read("b", &Device::Cpu)?
                    .flatten_all()?
                    .to_vec1::<f32>()?,
                [1.0, -2.5]
            );
            assert_eq!(file.read_u8("mask")?, [1, 0, 1]);
            let none = file.read("none", &Device::Cpu)?;
            assert!(none.flatten_all()?.to_vec1::<f32>()?.is_empty());
            assert_eq!(
                file.metadata().get("key 3").map(String::as_str),
                Some("ü 3")
            );
        }
        Ok(())
    }
}
