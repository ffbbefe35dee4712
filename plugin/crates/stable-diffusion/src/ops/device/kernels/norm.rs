//! Group normalization by two kernels each way.

use std::sync::OnceLock;

use candle_core::{DType, Result, Tensor};

use super::{
    Argument, Launch, Launcher, MOST, MOST_BLOCKS, aligned, int, launcher, memory::output,
    type_name,
};
use crate::ops::{After, device::norm::Normalization, function::Function};

const N_THREADS: usize = 256;
const N_WARPS: usize = N_THREADS / 32;
/// Numbers of a chunk of a group, at least, if there are so many; and chunks of a group, at most.
const LEAST_CHUNK: usize = 4096;
const MOST_CHUNKS: usize = 16;

/// Operands x, γ and β. Gradients of γ and β are those of the form it stands for.
pub(in crate::ops::device) struct FusedGroups {
    launcher: &'static dyn Launcher,
    n_groups: usize,
    epsilon: f64,
    after: After,
    form: Normalization,
    /// From the forward pass to the backward pass: `[groups of all samples, chunks, 2]`.
    sums: OnceLock<Tensor>,
}

/// How the numbers of a group are cut into chunks.
struct Chunks {
    n: usize,
    chunk: usize,
    n_chunks: usize,
    /// Groups of all samples.
    n_groups: usize,
    plane: usize,
}

impl FusedGroups {
    /// If there are kernels for it.
    pub(in crate::ops::device) fn of(
        x: &Tensor,
        [weight, bias]: [&Tensor; 2],
        n_groups: usize,
        epsilon: f64,
        after: After,
    ) -> Option<Self> {
        let has_fit_parameters = weight.dtype() == bias.dtype()
            && (weight.dtype() == x.dtype() || weight.dtype() == DType::F32)
            && weight.device().same_device(x.device())
            && bias.device().same_device(x.device());
        let n_blocks = x.dims().first()? * n_groups;
        let is_fit = has_fit_parameters
            && n_blocks <= MOST_BLOCKS
            && x.elem_count() / n_blocks.max(1) <= MOST;
        let launcher = launcher(&[x]).filter(|_| is_fit)?;
        Some(Self {
            launcher,
            n_groups,
            epsilon,
            after,
            form: Normalization::of_groups(n_groups, epsilon, after),
            sums: OnceLock::new(),
        })
    }

    fn chunks(&self, x: &Tensor) -> Result<Chunks> {
        let n_groups = x.dim(0)? * self.n_groups;
        let n = x.elem_count() / n_groups;
        // Whole packs of any type.
        let chunk = n.div_ceil(MOST_CHUNKS).max(LEAST_CHUNK).next_multiple_of(8);
        Ok(Chunks {
            n,
            chunk,
            n_chunks: n.div_ceil(chunk),
            n_groups,
            plane: x.elem_count() / (x.dim(0)? * x.dim(1)?),
        })
    }

    /// A tensor of two sums per chunk.
    fn sums(&self, x: &Tensor) -> Result<Tensor> {
        let chunks = self.chunks(x)?;
        output(
            (chunks.n_groups, chunks.n_chunks, 2),
            DType::F32,
            x.device(),
        )
    }

    fn launch(
        &self,
        kernel: &str,
        x: &Tensor,
        shared_bytes: usize,
        mut arguments: Vec<Argument<'_>>,
    ) -> Result<()> {
        let chunks = self.chunks(x)?;
        arguments.extend([
            int(chunks.n),
            int(chunks.chunk),
            int(self.n_groups),
            int(x.dim(1)? / self.n_groups),
            int(chunks.plane),
            Argument::Float(self.epsilon as f32),
        ]);
        self.launcher.launch(&Launch {
            source: "group_norm",
            kernel: format!("{kernel}_{}", type_name(x.dtype()).unwrap_or_default()),
            grid: [chunks.n_chunks, chunks.n_groups, 1],
            n_threads: N_THREADS,
            shared_bytes,
            arguments,
        })
    }

    /// Mean and squares of every chunk of x.
    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let sums = self.sums(x)?;
        // Three numbers for every warp.
        let arguments = vec![Argument::Read(x), Argument::Write(&sums)];
        self.launch(
            "group_statistics",
            x,
            N_WARPS * 3 * size_of::<f32>(),
            arguments,
        )?;
        Ok(sums)
    }

    fn with_silu(&self) -> Argument<'static> {
        Argument::Int(i32::from(self.after == After::Silu))
    }
}

/// γ, β, and whether they are f32.
fn parameters<'a>(weight: &'a Tensor, bias: &'a Tensor) -> [Argument<'a>; 3] {
    let are_f32 = Argument::Int(i32::from(weight.dtype() == DType::F32));
    [Argument::Read(weight), Argument::Read(bias), are_f32]
}

impl Function for FusedGroups {
    const NAME: &'static str = "normalization";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = aligned(&operands[0])?;
        let (weight, bias) = (operands[1].contiguous()?, operands[2].contiguous()?);
        let sums = self.statistics(&x)?;
        let y = output(x.shape(), x.dtype(), x.device())?;
        let mut arguments = vec![Argument::Read(&x), Argument::Read(&sums)];
        arguments.extend(parameters(&weight, &bias));
        arguments.extend([Argument::Write(&y), self.with_silu()]);
        self.launch("group_normalize", &x, 0, arguments)?;
        let _ = self.sums.set(sums);
        Ok(y)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        y: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut gradients = vec![None; 3];
        if wanted[1] || wanted[2] {
            gradients = self
                .form
                .backward(operands, y, dy, &[false, wanted[1], wanted[2]])?;
        }
        if !wanted[0] {
            return Ok(gradients);
        }
        let x = aligned(&operands[0])?;
        let (weight, bias) = (operands[1].contiguous()?, operands[2].contiguous()?);
        let dy = aligned(&dy.to_dtype(x.dtype())?)?;
        let sums = match self.sums.get() {
            Some(sums) => sums.clone(),
            None => self.statistics(&x)?,
        };
        let gradient_sums = self.sums(&x)?;
        let mut arguments = vec![
            Argument::Read(&x),
            Argument::Read(&dy),
            Argument::Read(&sums),
        ];
        arguments.extend(parameters(&weight, &bias));
        arguments.extend([Argument::Write(&gradient_sums), self.with_silu()]);
        self.launch(
            "group_gradient_sums",
            &x,
            N_WARPS * size_of::<f32>(),
            arguments,
        )?;

        let dx = output(x.shape(), x.dtype(), x.device())?;
        let mut arguments = vec![
            Argument::Read(&x),
            Argument::Read(&dy),
            Argument::Read(&sums),
            Argument::Read(&gradient_sums),
        ];
        arguments.extend(parameters(&weight, &bias));
        arguments.extend([Argument::Write(&dx), self.with_silu()]);
        self.launch("group_gradient", &x, 0, arguments)?;
        gradients[0] = Some(dx);
        Ok(gradients)
    }
}
