//! The safetensors format: eight bytes of header length, a JSON header, the data. Tensors are read
//! one at a time by seeking, so that a file larger than the memory can be opened and converted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::memory::{bytes_of, foresee};
use crate::ops::Precision;

/// A header longer than this is no header: the largest checkpoints have some 100 KB.
const MAX_HEADER: u64 = 64 << 20;

/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

enum Source {
    File(Mutex<File>),
    Embedded(&'static [u8]),
}

#[derive(Debug, Clone, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// An open safetensors file, or one embedded in the program.
pub struct TensorFile {
    name: String,
    source: Source,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    data_start: u64,
}

impl std::fmt::Debug for TensorFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TensorFile")
            .field("name", &self.name)
            .field("n_tensors", &self.entries.len())
            .finish()
    }
}

impl TensorFile {
    /// Refuses to have all of it in the memory of a machine that is too small for that, as numbers of this precision.
    pub(crate) fn foresee(&self, precision: Precision, device: &Device) -> Result<()> {
        let sizes = self.entries.values().map(|entry| bytes_of(&entry.shape));
        let width = (size_of::<f32>() / precision.dtype().size_in_bytes()) as u64;
        let all = sizes.fold(0, u64::saturating_add) / width;
        foresee(device, all, || self.name.clone())
    }

    /// Opens a file and reads its header.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the file is missing, truncated, a pickle, or not safetensors.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        refuse_pickle(path)?;
        let unreadable = |error: std::io::Error| match error.kind() {
            ErrorKind::NotFound => Error::unreadable(
                &name,
                "there is no such file or folder; name a .safetensors file or a model's folder",
            ),
            _ => Error::unreadable(&name, error),
        };
        let len = regular(path).map_err(unreadable)?;
        let file = File::open(path).map_err(unreadable)?;
        Self::parse(name, Source::File(Mutex::new(file)), len)
    }

    /// A file that is part of the program; `name` names it in errors.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the bytes are truncated or not safetensors.
    pub fn embedded(name: impl Into<String>, bytes: &'static [u8]) -> Result<Self> {
        Self::parse(name.into(), Source::Embedded(bytes), bytes.len() as u64)
    }

    fn parse(name: String, source: Source, len: u64) -> Result<Self> {
        let mut file = Self {
            name,
            source,
            entries: BTreeMap::new(),
            metadata: BTreeMap::new(),
            data_start: 8,
        };
        if len < 8 {
            return Err(file.foreign(format!("{len} bytes long")));
        }
        let mut header_len = [0; 8];
        file.read_at(0, &mut header_len)?;
        let header_len = u64::from_le_bytes(header_len);
        if header_len > MAX_HEADER {
            return Err(file.foreign("its first eight bytes are no header length"));
        }
        if header_len > len - 8 {
            return Err(file.damaged(format!(
                "truncated: {len} bytes long, its header alone has {header_len}"
            )));
        }
        file.data_start = 8 + header_len;
        let mut header = vec![0; header_len as usize];
        file.read_at(8, &mut header)?;
        file.read_header(&header, len - file.data_start)?;
        Ok(file)
    }

    fn read_header(&mut self, header: &[u8], data_len: u64) -> Result<()> {
        let values: Map<String, Value> =
            serde_json::from_slice(header).map_err(|e| self.foreign(e))?;
        let mut end = 0;
        for (key, value) in values {
            if key == "__metadata__" {
                self.metadata = serde_json::from_value(value)
                    .map_err(|e| self.fault(format!("its metadata: {e}")))?;
                continue;
            }
            let entry: Entry =
                serde_json::from_value(value).map_err(|e| self.fault(format!("{key}: {e}")))?;
            let [from, to] = entry.data_offsets;
            if from > to {
                return Err(self.damaged(format!("{key} ends before it starts")));
            }
            // Also where a 0 makes the product small: strides and parts of the shape are computed later.
            let mut sides = entry.shape.iter().map(|&side| side.max(1));
            if sides.try_fold(8, usize::checked_mul).is_none() {
                return Err(self.damaged(format!("{key} of shape {:?} is too large", entry.shape)));
            }
            if let Some(width) = width(&entry.dtype) {
                let n = entry
                    .shape
                    .iter()
                    .try_fold(width, |n, &d| n.checked_mul(d as u64));
                if n != Some(to - from) {
                    return Err(self.damaged(format!(
                        "{key} of shape {:?} has {} bytes",
                        entry.shape,
                        to - from
                    )));
                }
            }
            end = end.max(to);
            self.entries.insert(key, entry);
        }
        if end > data_len {
            return Err(self.damaged(format!(
                "truncated: {end} bytes of tensors announced, {data_len} there"
            )));
        }
        Ok(())
    }

    /// The path, or the name given to [`TensorFile::embedded`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Shape of a tensor, if the file has it.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// The header's free-form text.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// One tensor as f32; f16 and bf16 are widened.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the tensor is missing, of another type, or not finite.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let widen = widening(&entry.dtype).ok_or_else(|| {
            let dtype = &entry.dtype;
            self.fault(format!(
                "{name} is {dtype}, supported are F32, F16, BF16 and F64"
            ))
        })?;
        let [from, to] = entry.data_offsets;
        let mut values = Vec::with_capacity(entry.shape.iter().product());
        // A piece at a time: the raw bytes of a large tensor would be memory for nothing.
        let mut piece = vec![0; CHUNK.min((to - from) as usize)];
        let mut at = from;
        while at < to {
            let n = CHUNK.min((to - at) as usize);
            self.read_at(self.data_start + at, &mut piece[..n])?;
            widen(&piece[..n], &mut values);
            at += n as u64;
        }
        if !values.iter().all(|x| x.is_finite()) {
            return Err(self.fault(format!("{name} holds values that are not finite")));
        }
        Ok(Tensor::from_vec(values, entry.shape.as_slice(), device)?)
    }

    /// The bytes of one tensor of type U8.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the tensor is missing or of another type.
    pub fn read_u8(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.entry(name)?;
        if entry.dtype != "U8" {
            return Err(self.fault(format!("{name} is {}, not U8", entry.dtype)));
        }
        let [from, to] = entry.data_offsets;
        let mut bytes = vec![0; (to - from) as usize];
        self.read_at(self.data_start + from, &mut bytes)?;
        Ok(bytes)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let missing = || self.fault(format!("has no tensor {name}"));
        self.entries.get(name).ok_or_else(missing)
    }

    /// Adds the whole file to a hash.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if the file cannot be read to its end.
    pub fn hash_into(&self, hasher: &mut blake3::Hasher) -> Result<()> {
        let file = match &self.source {
            Source::Embedded(bytes) => {
                hasher.update(bytes);
                return Ok(());
            }
            Source::File(file) => file,
        };
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = vec![0; CHUNK];
        file.seek(SeekFrom::Start(0)).map_err(|e| self.fault(e))?;
        loop {
            match file.read(&mut buffer).map_err(|e| self.fault(e))? {
                0 => return Ok(()),
                n => hasher.update(&buffer[..n]),
            };
        }
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> Result<()> {
        match &self.source {
            Source::Embedded(bytes) => {
                buffer.copy_from_slice(&bytes[at as usize..at as usize + buffer.len()]);
                Ok(())
            }
            Source::File(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                let read = file
                    .seek(SeekFrom::Start(at))
                    .and_then(|_| file.read_exact(buffer));
                read.map_err(|e| self.fault(e))
            }
        }
    }

    fn foreign(&self, reason: impl std::fmt::Display) -> Error {
        self.fault(format!(
            "not a safetensors file: {reason}; name a .safetensors file"
        ))
    }

    fn damaged(&self, reason: impl std::fmt::Display) -> Error {
        self.fault(format!("{reason}; copy or download it again"))
    }

    fn fault(&self, reason: impl std::fmt::Display) -> Error {
        Error::unreadable(&self.name, reason)
    }
}

/// Appends bytes of one type as f32.
type Widen = fn(&[u8], &mut Vec<f32>);

/// A piece of a tensor never splits an element: its length is a multiple of every width.
fn widening(dtype: &str) -> Option<Widen> {
    Some(match dtype {
        "F64" => |b, v| append(b, v, |c| f64::from_le_bytes(c) as f32),
        "F32" => |b, v| append(b, v, f32::from_le_bytes),
        "F16" => |b, v| append(b, v, |c| f16::from_le_bytes(c).to_f32()),
        "BF16" => |b, v| append(b, v, |c| bf16::from_le_bytes(c).to_f32()),
        _ => return None,
    })
}

fn append<const N: usize>(bytes: &[u8], values: &mut Vec<f32>, widen: impl Fn([u8; N]) -> f32) {
    values.extend(bytes.as_chunks().0.iter().map(|&chunk| widen(chunk)));
}

/// Bytes per element of the types whose size can be checked.
fn width(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" => 8,
        "F32" | "I32" | "U32" => 4,
        "F16" | "BF16" | "I16" | "U16" => 2,
        "I8" | "U8" | "BOOL" => 1,
        _ => return None,
    })
}

/// Bytes of a file. What is none is not even opened: a pipe would be waited for.
pub(crate) fn regular(path: &Path) -> std::io::Result<u64> {
    let meta = path.metadata()?;
    if meta.is_file() {
        return Ok(meta.len());
    }
    let what = if meta.is_dir() { "a folder" } else { "no file" };
    Err(std::io::Error::other(format!(
        "this is {what}; name a file"
    )))
}

/// Refuses PyTorch's pickle files by their name: loading one runs whatever program it contains.
pub(crate) fn refuse_pickle(path: &Path) -> Result<()> {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default()
        .to_ascii_lowercase();
    if ["ckpt", "pt", "pth", "bin", "pkl"].contains(&extension.as_str()) {
        let reason = format!(
            ".{extension} files are pickles, which can run any program when loaded: convert it to .safetensors first"
        );
        return Err(Error::unreadable(path.display().to_string(), reason));
    }
    Ok(())
}
