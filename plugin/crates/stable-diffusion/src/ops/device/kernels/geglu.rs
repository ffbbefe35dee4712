//! GEGLU by a kernel each way.

use candle_core::{D, Result, Tensor};

use super::{
    Argument, Launch, Launcher, MOST, PACK_BYTES, aligned, int, launcher, memory::output, type_name,
};
use crate::ops::function::Function;

const N_THREADS: usize = 256;

/// value·gelu(gate) of its one operand (value, gate).
pub(in crate::ops::device) struct FusedGeglu(&'static dyn Launcher);

impl FusedGeglu {
    /// If there is a kernel for it.
    pub(in crate::ops::device) fn of(x: &Tensor) -> Option<Self> {
        launcher(&[x]).filter(|_| x.elem_count() <= MOST).map(Self)
    }

    fn launch(&self, kernel: &str, x: &Tensor, more: &[Argument<'_>]) -> Result<()> {
        let width = x.dim(D::Minus1)? / 2;
        let n_rows = x.elem_count() / (2 * width);
        // As the kernel does: packs where a row is whole ones.
        let pack = PACK_BYTES / x.dtype().size_in_bytes();
        let pack = if width.is_multiple_of(pack) { pack } else { 1 };
        let mut arguments = vec![Argument::Read(x)];
        arguments.extend_from_slice(more);
        arguments.extend([int(n_rows), int(width)]);
        self.0.launch(&Launch {
            source: "geglu",
            kernel: format!("{kernel}_{}", type_name(x.dtype()).unwrap_or_default()),
            grid: [(n_rows * width / pack).div_ceil(N_THREADS), 1, 1],
            n_threads: N_THREADS,
            shared_bytes: 0,
            arguments,
        })
    }
}

impl Function for FusedGeglu {
    const NAME: &'static str = "geglu";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = aligned(&operands[0])?;
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last /= 2;
        }
        let y = output(dims, x.dtype(), x.device())?;
        self.launch("geglu", &x, &[Argument::Write(&y)])?;
        Ok(y)
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let x = aligned(&operands[0])?;
        let dy = aligned(&dy.to_dtype(x.dtype())?)?;
        let dx = output(x.shape(), x.dtype(), x.device())?;
        self.launch(
            "geglu_gradient",
            &x,
            &[Argument::Read(&dy), Argument::Write(&dx)],
        )?;
        Ok(vec![Some(dx)])
    }
}
