//! 2-D convolution. Its backward is convolutions and products too: candle's has one thread per output.

use candle_core::{DType, Result, Tensor, bail};

use crate::ops::{
    Padding,
    function::{Function, Reads, in_type_of, only, sum_to},
};

/// Operands x, W and perhaps b `[out]` or `[B, out]`.
pub(super) struct Conv {
    stride: usize,
    padding: Padding,
}

impl Conv {
    pub(super) fn new(
        x: &Tensor,
        weight: &Tensor,
        stride: usize,
        padding: Padding,
    ) -> Result<Self> {
        let (_, n_in, height, width) = x.dims4()?;
        let (_, weight_in, kernel_height, kernel_width) = weight.dims4()?;
        if n_in != weight_in {
            bail!("conv2d: the weight takes {weight_in} channels, the input has {n_in}");
        }
        for (side, kernel) in [(height, kernel_height), (width, kernel_width)] {
            let padded = side + padding.before + padding.after;
            if stride == 0 || kernel == 0 || padded < kernel {
                bail!("conv2d: kernel {kernel} with stride {stride} on {padded} padded pixels");
            }
        }
        Ok(Self { stride, padding })
    }

    /// x without a bias.
    fn convolved(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let Padding { before, after } = self.padding;
        if before == after {
            return convolution(x, weight, before, self.stride);
        }
        convolution(&self.padded(x)?, weight, 0, self.stride)
    }

    fn padded(&self, x: &Tensor) -> Result<Tensor> {
        let Padding { before, after } = self.padding;
        x.pad_with_zeros(2, before, after)?
            .pad_with_zeros(3, before, after)?
            .contiguous()
    }

    /// The convolution of dy, its pixels `stride` apart, with the kernel turned by half a circle.
    fn input_gradient(&self, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let turned = weight
            .contiguous()?
            .flip(&[2, 3])?
            .transpose(0, 1)?
            .contiguous()?;
        let mut spread = dy.clone();
        for axis in [2, 3] {
            spread = spread_apart(&spread, axis, self.stride)?;
            let kernel = weight.dim(axis)?;
            let wanted = x.dim(axis)? + kernel - 1;
            let left = kernel as isize - 1 - self.padding.before as isize;
            let right = wanted as isize - spread.dim(axis)? as isize - left;
            spread = pad_or_crop(&spread, axis, left, right)?;
        }
        convolution(&spread.contiguous()?, &turned, 0, 1)
    }

    /// A product per place of the kernel.
    fn weight_gradient(&self, x: &Tensor, weight: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let (n_out, n_in, height, width) = weight.dims4()?;
        let (_, _, out_height, out_width) = dy.dims4()?;
        let padded = self.padded(x)?;
        let dy = dy.flatten_from(2)?;
        let mut places = Vec::with_capacity(height * width);
        for row in 0..height {
            let rows = every(&padded, 2, row, out_height, self.stride)?;
            for column in 0..width {
                let seen = every(&rows, 3, column, out_width, self.stride)?;
                let seen = seen.contiguous()?.flatten_from(2)?;
                places.push(dy.matmul(&seen.t()?)?.sum(0)?);
            }
        }
        let places = Tensor::stack(&places, 2)?;
        places.reshape((n_out, n_in, height, width))
    }
}

impl Function for Conv {
    const NAME: &'static str = "conv2d";

    fn forward(&self, operands: &[Tensor]) -> Result<Tensor> {
        let x = operands[0].contiguous()?;
        let y = self.convolved(&x, &in_type_of(&x, &operands[1])?.contiguous()?)?;
        let bias = operands.get(2).map(|bias| in_type_of(&x, bias));
        match bias.transpose()? {
            Some(bias) if bias.rank() == 2 => y.broadcast_add(&bias.unsqueeze(2)?.unsqueeze(3)?),
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
            None => Ok(y),
        }
    }

    fn backward(
        &self,
        operands: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let [x, weight, ..] = operands else {
            return Ok(Vec::new());
        };
        let dy = dy.contiguous()?;
        let gradient = |operand: usize| match operand {
            0 => self.input_gradient(x, &in_type_of(x, weight)?, &dy),
            1 => self.weight_gradient(x, weight, &dy),
            _ if operands[2].rank() == 2 => dy.flatten_from(2)?.sum(2),
            _ => sum_to(&dy, 1),
        };
        only(wanted, gradient)
    }

    fn reads(&self, operand: usize, wanted: &[bool]) -> Reads {
        Reads::if_so(match operand {
            0 => wanted[1],
            1 => wanted[0],
            _ => false,
        })
    }
}

/// candle's; on a CPU it has none for bf16.
fn convolution(x: &Tensor, weight: &Tensor, padding: usize, stride: usize) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype() == DType::BF16 {
        let [x, weight] = [x.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?];
        let y = x.conv2d(&weight, padding, stride, 1, 1)?;
        return y.to_dtype(DType::BF16);
    }
    x.conv2d(weight, padding, stride, 1, 1)
}

/// Zeros between neighbors along an axis, so that they are `stride` apart.
fn spread_apart(x: &Tensor, axis: usize, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return Ok(x.clone());
    }
    let n = x.dim(axis)?;
    let wide = x
        .unsqueeze(axis + 1)?
        .pad_with_zeros(axis + 1, 0, stride - 1)?;
    wide.flatten(axis, axis + 1)?
        .narrow(axis, 0, (n - 1) * stride + 1)
}

fn pad_or_crop(x: &Tensor, axis: usize, left: isize, right: isize) -> Result<Tensor> {
    let crop = |side: isize| side.min(0).unsigned_abs();
    let pad = |side: isize| side.max(0).unsigned_abs();
    let kept = x.dim(axis)? - crop(left) - crop(right);
    x.narrow(axis, crop(left), kept)?
        .pad_with_zeros(axis, pad(left), pad(right))
}

/// `n` places of an axis, from `first` on, `stride` apart.
fn every(x: &Tensor, axis: usize, first: usize, n: usize, stride: usize) -> Result<Tensor> {
    if stride == 1 {
        return x.narrow(axis, first, n);
    }
    let places: Vec<u32> = (0..n).map(|i| (first + i * stride) as u32).collect();
    let places = Tensor::new(places, x.device())?;
    x.contiguous()?.index_select(&places, axis)
}
