//! Attention by one kernel, and its backward by three. The columns that are observed come out of the same pass, and their
//! gradient goes into the same backward.

use std::collections::HashSet;
use std::sync::OnceLock;

use candle_core::{DType, Result, Tensor};

use super::{
    Argument, Launch, Launcher, MOST, MOST_BLOCKS, aligned, int, launcher, memory::output,
    type_name,
};
use crate::ops::{
    Mask,
    function::{Function, Reads},
};

/// What heads can be padded to.
const WIDTHS: [usize; 5] = [32, 48, 64, 80, 160];
/// Blocks that a card is given to do if there is work for them, about twice as many as large ones have multiprocessors.
const ENOUGH_BLOCKS: usize = 256;
const MEANS_THREADS: usize = 256;

/// Operands q, k and v. The value is O, or, if keys are observed, O in f32 and behind it the observed columns of P, flat.
pub(in crate::ops::device) struct Fused {
    launcher: &'static dyn Launcher,
    sizes: Sizes,
    mask: Mask,
    positions: Vec<usize>,
    engine: Engine,
    /// From the forward pass to the backward pass: L `[B, heads, N]`.
    log_sums: OnceLock<Tensor>,
}

#[derive(Clone, Copy)]
struct Sizes {
    n_samples: usize,
    n_queries: usize,
    n_keys: usize,
    n_heads: usize,
    head_width: usize,
}

/// How the kernels of a type and width cut tiles: the constants of `attention.cuh`.
#[derive(Clone, Copy)]
struct Engine {
    width: usize,
    /// Of a tile that a block keeps, and of one that goes by.
    rows: usize,
    columns: usize,
    /// Numbers from one row of a tile to the next.
    pitch: usize,
    /// Numbers that lanes exchange.
    scratch: usize,
    n_threads: usize,
    /// Of the width of a head that a block sums up for keys and values.
    part: usize,
    bytes: usize,
}

/// What a value consists of: O of the operands' type, or in f32 and with observed columns.
struct Parts {
    narrow: Option<Tensor>,
    wide: Option<Tensor>,
    observed: Option<Tensor>,
}

impl Engine {
    fn new(dtype: DType, head_width: usize) -> Option<Self> {
        let width = WIDTHS.into_iter().find(|&width| width >= head_width)?;
        let is_wide = width > 80;
        let part = if is_wide { 80 } else { width };
        let bytes = dtype.size_in_bytes();
        Some(if dtype == DType::F32 {
            let (rows, columns) = (if is_wide { 32 } else { 64 }, 32);
            Self {
                width,
                rows,
                columns,
                pitch: width + 4,
                scratch: rows * (columns + 4),
                n_threads: 256,
                part,
                bytes,
            }
        } else {
            Self {
                width,
                rows: 64,
                columns: if is_wide { 32 } else { 64 },
                pitch: width + 8,
                scratch: 0,
                n_threads: 128,
                part,
                bytes,
            }
        })
    }

    /// Shared memory for so many tiles of either kind.
    fn shared_bytes(&self, n_rows: usize, n_columns: usize) -> usize {
        let tiles = (n_rows * self.rows + n_columns * self.columns) * self.pitch;
        (tiles + self.scratch) * self.bytes
    }
}

impl Fused {
    /// If there are kernels for it. Shapes have been compared before.
    pub(in crate::ops::device) fn of(
        operands: [&Tensor; 3],
        n_heads: usize,
        mask: Mask,
        positions: &[usize],
    ) -> Option<Self> {
        let [q, k, _] = operands;
        let (n_samples, n_queries, width) = q.dims3().ok()?;
        let sizes = Sizes {
            n_samples,
            n_queries,
            n_keys: k.dim(1).ok()?,
            n_heads,
            head_width: width / n_heads,
        };
        // A key has one column at most.
        let mut seen = HashSet::new();
        let are_distinct = positions.iter().all(|position| seen.insert(position));
        let is_fit = sizes.head_width.is_multiple_of(8)
            && are_distinct
            && n_samples.max(n_heads) <= MOST_BLOCKS
            && n_samples * n_heads * n_queries <= MOST
            && sizes.n_keys <= MOST;
        let engine = Engine::new(q.dtype(), sizes.head_width)?;
        let launcher = launcher(&operands).filter(|_| is_fit)?;
        Some(Self {
            launcher,
            sizes,
            mask,
            positions: positions.to_vec(),
            engine,
            log_sums: OnceLock::new(),
        })
    }

    /// Elements of O and of the observed columns.
    fn lengths(&self) -> (usize, usize) {
        let n_rows = self.n_rows();
        (
            n_rows * self.sizes.head_width,
            n_rows * self.positions.len(),
        )
    }

    /// Queries of all heads.
    fn n_rows(&self) -> usize {
        self.sizes.n_samples * self.sizes.n_heads * self.sizes.n_queries
    }

    /// O of q's type, and the observed columns `[B, heads, N, positions]`, from the value of a node with some.
    pub(in crate::ops::device) fn unpack(
        value: &Tensor,
        q: &Tensor,
        n_heads: usize,
        n_observed: usize,
    ) -> Result<Vec<Tensor>> {
        let (n_samples, n_queries, _) = q.dims3()?;
        let n_out = q.elem_count();
        let out = value.narrow(0, 0, n_out)?.reshape(q.shape())?;
        let observed = value.narrow(0, n_out, value.elem_count() - n_out)?;
        let shape = (n_samples, n_heads, n_queries, n_observed);
        Ok(vec![out.to_dtype(q.dtype())?, observed.reshape(shape)?])
    }

    /// The kernel of a name for this type and width.
    fn named(&self, kernel: &str, dtype: DType) -> String {
        let name = type_name(dtype).unwrap_or_default();
        format!("{kernel}_{name}_{}", self.engine.width)
    }

    fn launch(
        &self,
        kernel: String,
        dtype: DType,
        grid: [usize; 3],
        (n_threads, shared_bytes): (usize, usize),
        mut arguments: Vec<Argument<'_>>,
    ) -> Result<()> {
        let sizes = &self.sizes;
        let source = match dtype {
            DType::F32 => "attention_f32",
            DType::F16 => "attention_f16",
            _ => "attention_bf16",
        };
        arguments.extend([
            int(sizes.n_queries),
            int(sizes.n_keys),
            int(self.positions.len()),
            int(sizes.n_heads),
            int(sizes.head_width),
            Argument::Int(i32::from(self.mask == Mask::Causal)),
            Argument::Float((std::f64::consts::LOG2_E / (sizes.head_width as f64).sqrt()) as f32),
        ]);
        self.launcher.launch(&Launch {
            source,
            kernel,
            grid,
            n_threads,
            shared_bytes,
            arguments,
        })
    }

    /// Blocks of so many tiles for every head of every sample.
    fn grid(&self, n_tiles: usize) -> [usize; 3] {
        [n_tiles, self.sizes.n_heads, self.sizes.n_samples]
    }

    /// The value and L.
    fn attend(&self, [q, k, v]: [&Tensor; 3]) -> Result<(Tensor, Tensor)> {
        let (n_out, n_observed) = self.lengths();
        let (sizes, engine) = (&self.sizes, &self.engine);
        let is_plain = self.positions.is_empty();
        let value = if is_plain {
            output(q.shape(), q.dtype(), q.device())?
        } else {
            output(n_out + n_observed, DType::F32, q.device())?
        };
        let positions: Vec<u32> = self.positions.iter().map(|&i| i as u32).collect();
        let positions = (!is_plain).then(|| Tensor::new(positions, q.device()));
        let positions = positions.transpose()?;
        let parts = self.parts(&value)?;
        let log_sums = output(
            (sizes.n_samples, sizes.n_heads, sizes.n_queries),
            DType::F32,
            q.device(),
        )?;
        let arguments = vec![
            Argument::Read(q),
            Argument::Read(k),
            Argument::Read(v),
            Argument::read_if(positions.as_ref()),
            Argument::write_if(parts.narrow.as_ref()),
            Argument::write_if(parts.wide.as_ref()),
            Argument::Write(&log_sums),
            Argument::write_if(parts.observed.as_ref()),
        ];
        let grid = self.grid(sizes.n_queries.div_ceil(engine.rows));
        let block = (engine.n_threads, engine.shared_bytes(1, 2));
        self.launch(
            self.named("attend", q.dtype()),
            q.dtype(),
            grid,
            block,
            arguments,
        )?;
        Ok((value, log_sums))
    }

    /// Of a value or its gradient.
    fn parts(&self, value: &Tensor) -> Result<Parts> {
        let (n_out, n_observed) = self.lengths();
        let value = value.contiguous()?;
        Ok(if self.positions.is_empty() {
            Parts {
                narrow: Some(value),
                wide: None,
                observed: None,
            }
        } else {
            Parts {
                narrow: None,
                wide: Some(value.narrow(0, 0, n_out)?),
                observed: Some(value.narrow(0, n_out, n_observed)?),
            }
        })
    }

    /// The observed column of every key; -1 for those without one, of the same bits.
    fn slots(&self, like: &Tensor) -> Result<Tensor> {
        let mut slots = vec![u32::MAX; self.sizes.n_keys];
        for (slot, &position) in (0..).zip(&self.positions) {
            slots[position] = slot;
        }
        Tensor::new(slots, like.device())
    }

    /// How many parts queries are taken in for the gradients of keys and values, so that there are enough blocks.
    fn n_parts(&self) -> usize {
        let (sizes, engine) = (&self.sizes, &self.engine);
        let n_blocks = self.n_key_tiles() * sizes.n_heads * sizes.n_samples;
        let n_tiles = sizes.n_queries.div_ceil(engine.columns);
        // Two tiles for a block, at least.
        ENOUGH_BLOCKS.div_ceil(n_blocks).min(n_tiles.div_ceil(2))
    }

    /// Tiles of keys, each for every part of a head's width.
    fn n_key_tiles(&self) -> usize {
        self.sizes.n_keys.div_ceil(self.engine.rows) * (self.engine.width / self.engine.part)
    }
}

impl Function for Fused {
    const NAME: &'static str = "attention";

    fn reads_value(&self) -> Reads {
        Reads::Numbers
    }

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let [q, k, v] = [0, 1, 2].map(|i| aligned(&operands[i]));
        let (value, log_sums) = self.attend([&q?, &k?, &v?])?;
        let _ = self.log_sums.set(log_sums);
        Ok(value)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        value: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [q, k, v] = [0, 1, 2].map(|i| aligned(&operands[i]));
        let (q, k, v) = (q?, k?, v?);
        let (dtype, device) = (q.dtype(), q.device());
        let (sizes, engine) = (&self.sizes, &self.engine);
        let log_sums = match self.log_sums.get() {
            Some(log_sums) => log_sums.clone(),
            None => self.attend([&q, &k, &v])?.1,
        };

        let (value, gradient) = (self.parts(value)?, self.parts(dy)?);
        let d_out = gradient.narrow.or(gradient.wide);
        let Some(d_out) = d_out
            .map(|d_out| aligned(&d_out.to_dtype(dtype)?))
            .transpose()?
        else {
            return Ok(Vec::new());
        };
        let d_observed = Argument::read_if(gradient.observed.as_ref());
        let means = output(
            (sizes.n_samples, sizes.n_heads, sizes.n_queries),
            DType::F32,
            device,
        )?;
        let arguments = vec![
            Argument::read_if(value.narrow.as_ref()),
            Argument::read_if(value.wide.as_ref()),
            Argument::Read(&d_out),
            Argument::read_if(value.observed.as_ref()),
            d_observed,
            Argument::Write(&means),
            int(self.n_rows()),
        ];
        let n_blocks = self.n_rows().div_ceil(MEANS_THREADS / 32);
        let kernel = format!("attention_means_{}", type_name(dtype).unwrap_or_default());
        self.launch(
            kernel,
            dtype,
            [n_blocks, 1, 1],
            (MEANS_THREADS, 0),
            arguments,
        )?;

        let slots = gradient
            .observed
            .as_ref()
            .map(|_| self.slots(&q))
            .transpose()?;
        let read = [
            Argument::Read(&q),
            Argument::Read(&k),
            Argument::Read(&v),
            Argument::Read(&d_out),
            Argument::Read(&log_sums),
            Argument::Read(&means),
            Argument::read_if(slots.as_ref()),
            d_observed,
        ];
        let block = (engine.n_threads, engine.shared_bytes(2, 2));
        let mut gradients = vec![None; 3];
        if wanted[0] {
            let dq = output(q.shape(), dtype, device)?;
            let mut arguments = read.to_vec();
            arguments.push(Argument::Write(&dq));
            let grid = self.grid(sizes.n_queries.div_ceil(engine.rows));
            self.launch(
                self.named("query_gradient", dtype),
                dtype,
                grid,
                block,
                arguments,
            )?;
            gradients[0] = Some(dq);
        }
        if wanted[1] || wanted[2] {
            let n_parts = self.n_parts();
            let mut dims = vec![n_parts];
            dims.extend(k.dims());
            let (dk, dv) = (
                output(&*dims, DType::F32, device)?,
                output(&*dims, DType::F32, device)?,
            );
            let mut arguments = read.to_vec();
            arguments.extend([Argument::Write(&dk), Argument::Write(&dv), int(n_parts)]);
            let grid = self.grid(self.n_key_tiles() * n_parts);
            self.launch(
                self.named("key_gradients", dtype),
                dtype,
                grid,
                block,
                arguments,
            )?;
            let joined = |sums: &Tensor| -> Result<Tensor> {
                let sum = if n_parts == 1 {
                    sums.squeeze(0)
                } else {
                    sums.sum(0)
                };
                sum?.to_dtype(dtype)
            };
            gradients[1] = wanted[1].then(|| joined(&dk)).transpose()?;
            gradients[2] = wanted[2].then(|| joined(&dv)).transpose()?;
        }
        Ok(gradients)
    }
}
