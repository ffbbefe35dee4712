//! Weights by name: what a file holds, and the cursor by which a network takes what it needs.
//!
//! A network never fails half-way through a damaged checkpoint: [`Weights::get`] always returns a
//! tensor, and [`WeightMap::build`] reports everything missing, misshapen and left over at once.

mod tensor_file;
mod tensor_writer;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor, Var};

pub use tensor_file::TensorFile;
pub(crate) use tensor_file::{refuse_pickle, regular};
pub use tensor_writer::{encode_tensors, write_tensors};

use crate::error::{CheckpointError, Error, Misshapen, Result};
use crate::ops::{Backend, Precision, dims_of, in_order_of_tiles, in_rows, is_ordered};
use crate::rng::Rng;

/// Prefix that the text encoder's tensors have in Stable Diffusion's files and in transformers
/// before 5, and lack since.
const OPTIONAL_PREFIX: &str = "text_model.";

/// Whether a tensor of this name is a table of constants, or a part of CLIP beside its text encoder, which some exporters
/// wrote along.
pub(crate) fn is_unused(name: &str) -> bool {
    name.ends_with("position_ids")
        || [
            "text_projection.weight",
            "text_projection",
            "logit_scale",
            "visual_projection.weight",
        ]
        .contains(&name)
        || name.starts_with("vision_model.")
}

/// The tensors of one component (U-Net, VAE, text encoder) by their name in diffusers' layout; f32, or of the type of a
/// [`Precision`]. Those of a network that computes in bf16 on a CPU may be words in the order in which the processor multiplies
/// them; [`Self::in_rows`] has numbers for all.
#[derive(Debug, Clone, Default)]
pub struct WeightMap(pub BTreeMap<String, Tensor>);

impl WeightMap {
    /// Reads every tensor of `file`, one at a time.
    ///
    /// # Errors
    /// [`crate::Error::Unreadable`] naming the tensors that are of no supported type or not finite.
    pub fn read(file: &TensorFile, device: &Device) -> Result<Self> {
        Self::read_in(Precision::F32, file, device)
    }

    /// [`Self::read`] in a precision; no more than one tensor is f32 besides.
    pub(crate) fn read_in(
        precision: Precision,
        file: &TensorFile,
        device: &Device,
    ) -> Result<Self> {
        file.foresee(precision, device)?;
        let names = file.names().filter(|name| !is_unused(name));
        let tensors = names.map(|name| {
            let tensor = in_precision(precision, file.read(name, device)?)?;
            Ok((name.to_owned(), tensor))
        });
        Ok(Self(tensors.collect::<Result<_>>()?))
    }

    /// The same weights in this precision; variables stay what they are. On a CPU that are the matrices and kernels.
    ///
    /// # Errors
    /// [`Error::Argument`] for f16 on a CPU, [`Error::Tensor`] when the tensor library fails.
    pub(crate) fn in_precision(self, precision: Precision) -> Result<Self> {
        // One at a time: those that nobody else holds are freed on the way.
        let weights = self.0.into_iter();
        let converted = weights.map(|(name, weight)| Ok((name, in_precision(precision, weight)?)));
        Ok(Self(converted.collect::<Result<_>>()?))
    }

    /// The same weights, `factors` of them in the order in which this processor multiplies them, where it has one.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the tensor library fails.
    pub(crate) fn in_order_of_tiles(mut self, factors: &BTreeSet<String>) -> Result<Self> {
        for (name, weight) in &mut self.0 {
            if factors.contains(name) {
                // One at a time, as in `in_precision`.
                *weight = in_order_of_tiles(std::mem::replace(weight, zero(&[], &Device::Cpu)?))?;
            }
        }
        Ok(self)
    }

    /// The same weights with their rows one after the other, as files have them.
    ///
    /// # Errors
    /// [`Error::Tensor`] when the tensor library fails.
    pub fn in_rows(&self) -> Result<Self> {
        let weights = self.0.iter();
        let in_rows = weights.map(|(name, weight)| Ok((name.clone(), in_rows(weight)?)));
        Ok(Self(in_rows.collect::<Result<_>>()?))
    }

    /// (1 - strength) · these + strength · `other`, for networks of one shape.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] when the tensor library fails.
    pub(crate) fn towards(&self, other: &Self, strength: f64) -> Result<Self> {
        let between = |(name, weight): (&String, &Tensor)| {
            let Some(goal) = other
                .0
                .get(name)
                .filter(|goal| dims_of(goal) == dims_of(weight))
            else {
                return Ok((name.clone(), weight.clone()));
            };
            let (weight, goal) = (in_rows(weight)?, in_rows(goal)?);
            let [from, to] = [weight.to_dtype(DType::F32)?, goal.to_dtype(DType::F32)?];
            let step = ((to - &from)? * strength)?;
            let between = (from + step)?.to_dtype(weight.dtype())?;
            Ok((name.clone(), between.detach()))
        };
        Ok(Self(self.0.iter().map(between).collect::<Result<_>>()?))
    }

    /// Random weights for whatever `build` asks for, on the CPU: matrices and kernels from
    /// N(0, 1/fan_in), norm weights 1, biases 0. Each tensor has its own random stream, so the
    /// order of the requests does not matter.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn random(seed: u64, build: impl Fn(Weights) -> Result<()>) -> Result<Self> {
        Self::random_in(Precision::F32, seed, build)
    }

    /// [`Self::random`] in a precision; no more than one tensor is f32 besides.
    ///
    /// # Errors
    /// Those of `build`, and [`Error::Argument`] for f16.
    pub fn random_in(
        precision: Precision,
        seed: u64,
        build: impl Fn(Weights) -> Result<()>,
    ) -> Result<Self> {
        let shapes = Self::shapes(build)?.into_iter();
        let made = shapes.map(|(name, shape)| {
            let tensor = in_precision(precision, random(seed, &name, &shape)?)?;
            Ok((name, tensor))
        });
        Ok(Self(made.collect::<Result<_>>()?))
    }

    /// A map in which the weights that `is_trained` names are variables, copies of these in f32, and the variables by name,
    /// in order. The other weights are shared.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] when the tensor library fails.
    pub fn trainable(
        &self,
        is_trained: impl Fn(&str) -> bool,
    ) -> Result<(Self, Vec<(String, Var)>)> {
        let mut weights = self.clone();
        let mut variables = Vec::new();
        for (name, weight) in &mut weights.0 {
            if is_trained(name) {
                // Detached, because a variable made from a variable is the same one.
                let variable = Var::from_tensor(&in_rows(weight)?.detach().to_dtype(DType::F32)?)?;
                *weight = variable.as_tensor().clone();
                variables.push((name.clone(), variable));
            }
        }
        Ok((weights, variables))
    }

    /// The same weights, none of them a variable.
    #[must_use]
    pub fn detach(&self) -> Self {
        let detached = |(name, weight): (&String, &Tensor)| (name.clone(), weight.detach());
        Self(self.0.iter().map(detached).collect())
    }

    /// The name and shape of every tensor that `build` asks for, without allocating any of them:
    /// what it gets is one zero, broadcast.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn shapes(build: impl Fn(Weights) -> Result<()>) -> Result<BTreeMap<String, Vec<usize>>> {
        Ok(Self::asked(build)?.shapes)
    }

    /// The names of what `build` asks for by [`Weights::factor`].
    ///
    /// # Errors
    /// Those of `build`.
    pub(crate) fn factors(build: impl Fn(Weights) -> Result<()>) -> Result<BTreeSet<String>> {
        Ok(Self::asked(build)?.factors)
    }

    fn asked(build: impl Fn(Weights) -> Result<()>) -> Result<Asked> {
        let asked = Arc::new(Mutex::new(Asked::default()));
        build(Weights::new(Source::Shapes {
            asked: Arc::clone(&asked),
        }))?;
        let asked = std::mem::take(&mut *lock(&asked));
        Ok(asked)
    }

    /// Builds a network from this map; `component` names the file or component in errors.
    ///
    /// # Errors
    /// [`CheckpointError`] unless the network takes exactly the tensors of this map in their shapes.
    pub fn build<T>(&self, component: &str, f: impl FnOnce(Weights) -> Result<T>) -> Result<T> {
        let weights = Weights::new(Source::Map(Arc::new(self.0.clone())));
        let report = Arc::clone(&weights.report);
        let built = f(weights);
        let report = std::mem::take(&mut *lock(&report));
        let unexpected: Vec<String> = self
            .0
            .keys()
            .filter(|name| !report.taken.contains(*name) && !is_unused(name))
            .cloned()
            .collect();
        if report.missing.is_empty()
            && report.misshapen.is_empty()
            && (unexpected.is_empty() || built.is_err())
        {
            return built;
        }
        Err(CheckpointError {
            file: component.to_owned(),
            missing: report.missing,
            unexpected,
            misshapen: report.misshapen,
        }
        .into())
    }

    /// The same weights on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let moved = self
            .0
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), tensor.to_device(device)?)));
        Ok(Self(moved.collect::<Result<_>>()?))
    }
}

/// A weight of [`WeightMap::in_precision`].
pub(crate) fn in_precision(precision: Precision, weight: Tensor) -> Result<Tensor> {
    if weight.is_variable() || is_ordered(&weight) && precision == Precision::Bf16 {
        return Ok(weight);
    }
    let weight = in_rows(&weight)?;
    if precision == Precision::F32 {
        return Ok(weight);
    }
    let on_host = Backend::of_product(&weight, &weight) == Backend::Host;
    if on_host && precision == Precision::F16 {
        let reason = "f16 is for GPUs; on a processor choose bf16, f32 or auto";
        return Err(Error::argument("precision", reason));
    }
    if on_host && weight.rank() < 2 {
        return Ok(weight);
    }
    Ok(weight.detach().to_dtype(precision.dtype())?)
}

/// Where a cursor's tensors come from.
#[derive(Clone)]
enum Source {
    Map(Arc<BTreeMap<String, Tensor>>),
    Shapes { asked: Arc<Mutex<Asked>> },
}

/// What was asked for.
#[derive(Debug, Default)]
struct Asked {
    shapes: BTreeMap<String, Vec<usize>>,
    factors: BTreeSet<String>,
}

#[derive(Default)]
struct Report {
    taken: BTreeSet<String>,
    missing: Vec<String>,
    misshapen: Vec<Misshapen>,
}

/// A panicking builder leaves a report that nobody reads, so poison says nothing here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A cursor into a [`WeightMap`]: the path by which a layer is reached is its name in the file.
#[derive(Clone)]
pub struct Weights {
    source: Source,
    path: String,
    report: Arc<Mutex<Report>>,
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weights")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Weights {
    fn new(source: Source) -> Self {
        Self {
            source,
            path: String::new(),
            report: Arc::default(),
        }
    }

    /// The cursor at `name` below this one; `name` may hold several steps (`to_out.0`).
    pub fn pp(&self, name: impl Display) -> Self {
        Self {
            source: self.source.clone(),
            path: self.join(&name.to_string()),
            report: Arc::clone(&self.report),
        }
    }

    /// The path from the component's root, without a trailing dot.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The device of the tensors.
    pub fn device(&self) -> Device {
        match &self.source {
            Source::Map(map) => map
                .values()
                .next()
                .map_or(Device::Cpu, |tensor| tensor.device().clone()),
            Source::Shapes { .. } => Device::Cpu,
        }
    }

    /// Whether the map holds `name` below this cursor. A random map holds nothing yet.
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Map(map) => find(map, &self.join(name)).is_some(),
            Source::Shapes { .. } => false,
        }
    }

    /// The tensor `name` below this cursor. One that is missing or of another shape than `shape`
    /// is reported by [`WeightMap::build`] and is zero here.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let name = self.join(name);
        match &self.source {
            Source::Map(map) => Ok(in_rows(&self.take(map, name, shape)?)?),
            Source::Shapes { asked } => {
                lock(asked).shapes.insert(name, shape.to_vec());
                zero(shape, &Device::Cpu)
            }
        }
    }

    /// [`Self::get`] of a weight that multiplies many rows at a time, for operations of products: it may be in the order of
    /// tiles.
    pub(crate) fn factor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match &self.source {
            Source::Map(map) => self.take(map, self.join(name), shape),
            Source::Shapes { asked } => {
                lock(asked).factors.insert(self.join(name));
                self.get(name, shape)
            }
        }
    }

    fn take(
        &self,
        map: &BTreeMap<String, Tensor>,
        name: String,
        shape: &[usize],
    ) -> Result<Tensor> {
        let mut report = lock(&self.report);
        let Some((found, tensor)) = find(map, &name) else {
            if !report.missing.contains(&name) {
                report.missing.push(name);
            }
            return zero(shape, &self.device());
        };
        report.taken.insert(found.clone());
        let dims = dims_of(tensor);
        if dims == shape {
            return Ok(tensor.clone());
        }
        let misshapen = Misshapen {
            name,
            expected: shape.to_vec(),
            found: dims,
        };
        if !report.misshapen.contains(&misshapen) {
            report.misshapen.push(misshapen);
        }
        zero(shape, tensor.device())
    }

    fn join(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }
}

/// The entry `name`, with or without the prefix that not all exporters write.
fn find<'a>(map: &'a BTreeMap<String, Tensor>, name: &str) -> Option<(&'a String, &'a Tensor)> {
    map.get_key_value(name)
        .or_else(|| match name.strip_prefix(OPTIONAL_PREFIX) {
            Some(bare) => map.get_key_value(bare),
            None => map.get_key_value(&format!("{OPTIONAL_PREFIX}{name}")),
        })
}

fn zero(shape: &[usize], device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros((), DType::F32, device)?.broadcast_as(shape)?)
}

fn random(seed: u64, name: &str, shape: &[usize]) -> Result<Tensor> {
    if name.ends_with("bias") {
        return Ok(Tensor::zeros(shape, DType::F32, &Device::Cpu)?);
    }
    if shape.len() < 2 {
        return Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?);
    }
    let fan_in: usize = shape[1..].iter().product();
    let noise = Rng::new(seed, name, 0).normal(shape, &Device::Cpu)?;
    Ok((noise * (fan_in.max(1) as f64).powf(-0.5))?)
}

#[cfg(test)]
mod tests;
