//! Weights in the order of the processor's tiles, as tensors: words in `[rows / 32, columns / 32, .., 2, 16, 16]`, see
//! [`super::tiles::Ordered`]. No other weight is of words.

use candle_core::{DType, Result, Tensor, bail};

use super::memory::Values;
use super::numbers::Numbers;
use super::tiles::{Factors, Ordered, Tiles, in_order};

/// What a block's shape ends in.
const BLOCK: [usize; 3] = [2, 16, 16];
/// Rows, and columns, of a block.
const SIDE: usize = 32;

/// Of a weight as others know it, whatever the order of its numbers: `[out, in, ..]`.
pub(crate) fn dims_of(weight: &Tensor) -> Vec<usize> {
    match weight.dims().strip_suffix(&BLOCK) {
        Some([rows, columns, taps @ ..]) if is_ordered(weight) => {
            [&[SIDE * rows, SIDE * columns], taps].concat()
        }
        _ => weight.dims().to_vec(),
    }
}

pub(crate) fn is_ordered(weight: &Tensor) -> bool {
    weight.dtype() == DType::U32 && weight.dims().ends_with(&BLOCK)
}

/// A frozen weight of a product of many rows, in the order of tiles if this processor multiplies it by tiles as it is;
/// it stays what it is otherwise. Three by three kernels are transformed where there is no matrix unit.
pub(crate) fn in_order_of_tiles(weight: Tensor) -> Result<Tensor> {
    let is_half = weight.device().is_cpu() && weight.dtype() == DType::BF16;
    let tiles = Tiles::get(Factors::Rounded).filter(|_| is_half && !weight.is_variable());
    let (Some(tiles), [n_rows, n_columns, kernel @ ..]) = (tiles, weight.dims()) else {
        return Ok(weight);
    };
    let is_for_tiles = match kernel {
        [] | [1, 1] => true,
        [3, 3] => tiles.have_matrix_unit(),
        _ => false,
    };
    let dims = [*n_rows, *n_columns];
    if !is_for_tiles || !Ordered::has(dims) {
        return Ok(weight);
    }
    ordered(tiles, &weight.contiguous()?)
}

/// The same on tiles that there are.
fn ordered(tiles: Tiles, weight: &Tensor) -> Result<Tensor> {
    /// Words of a line of the cache: no row of a tile lies in two of them.
    const LINE: usize = 16;
    let dims = weight.dims();
    let (n_words, n_taps) = (weight.elem_count() / 2, dims[2..].iter().product());
    let mut words = vec![0; n_words + LINE];
    let start = words.as_ptr().align_offset(4 * LINE).min(LINE);
    let values = Values::of(weight)?;
    let Numbers::Bf16(numbers) = values.numbers()? else {
        bail!("a weight {:?} in the order of tiles", weight.shape())
    };
    in_order(
        tiles,
        numbers,
        [dims[0], dims[1]],
        n_taps,
        &mut words[start..][..n_words],
    );
    let shape = [&[dims[0] / SIDE, dims[1] / SIDE], &dims[2..], &BLOCK].concat();
    let len = words.len();
    let words = Tensor::from_vec(words, len, weight.device())?;
    words.narrow(0, start, n_words)?.reshape(shape)
}

/// A weight with its rows one after the other.
pub(crate) fn in_rows(weight: &Tensor) -> Result<Tensor> {
    if !is_ordered(weight) {
        return Ok(weight.clone());
    }
    let weight = weight.contiguous()?;
    let values = Values::of(&weight)?;
    values.numbers()?.in_rows(|numbers| match numbers {
        Numbers::Bf16(numbers) => Tensor::from_slice(numbers, dims_of(&weight), weight.device()),
        _ => bail!("a weight {:?} in rows", weight.shape()),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use half::bf16;

    use super::*;
    use crate::rng::Rng;

    fn random(shape: &[usize]) -> Tensor {
        let noise = Rng::new(1, "test", 0).normal(shape, &Device::Cpu).unwrap();
        noise.to_dtype(DType::BF16).unwrap()
    }

    fn bits(x: &Tensor) -> Vec<u16> {
        let numbers = x.flatten_all().unwrap().to_vec1::<bf16>().unwrap();
        numbers.into_iter().map(bf16::to_bits).collect()
    }

    #[test]
    fn weights_keep_their_numbers_and_their_shape() {
        for shape in [&[128, 96][..], &[64, 32, 1, 1], &[64, 64, 3, 3]] {
            for tiles in Tiles::all() {
                let weight = random(shape);
                let ordered = ordered(tiles, &weight).unwrap();
                assert!(is_ordered(&ordered) && ordered.elem_count() * 2 == weight.elem_count());
                assert_eq!(dims_of(&ordered), shape);
                let back = in_rows(&ordered).unwrap();
                assert_eq!(back.dims(), shape);
                assert_eq!(bits(&back), bits(&weight));
            }
        }
    }

    #[test]
    fn weights_that_tiles_do_not_take_stay_what_they_are() {
        let f32 = Tensor::zeros((128, 96), DType::F32, &Device::Cpu).unwrap();
        let others = [&[96, 96][..], &[64, 48], &[64, 64, 5, 5], &[64]].map(random);
        for weight in [f32].into_iter().chain(others) {
            let kept = in_order_of_tiles(weight.clone()).unwrap();
            assert_eq!(kept.dims(), weight.dims());
            assert_eq!(kept.dtype(), weight.dtype());
        }
        let is_multiplied_so = Tiles::get(Factors::Rounded).is_some();
        let ordered = in_order_of_tiles(random(&[64, 32])).unwrap();
        assert_eq!(is_ordered(&ordered), is_multiplied_so);
    }
}
