//! Products by the processor's matrix tiles (Intel AMX): bf16 times bf16, summed in f32. Where it has no tiles and vectors
//! of bf16 (AVX512-BF16), those multiply rounded factors the same way.
//!
//! Factors are f32. They are rounded to bf16, or each is the sum of three bf16 numbers,
//!
//! ```text
//! a = a₁ + a₂ + a₃,   a₁ = bf16(a), a₂ = bf16(a - a₁), a₃ = bf16(a - a₁ - a₂)
//! a·b = a₁·b₁ + a₁·b₂ + a₂·b₁ + a₂·b₂ + a₁·b₃ + a₃·b₁ + O(2⁻²⁴) |a·b|
//! ```
//!
//! which is as exact as f32 is, and still faster than the processor's vectors of f32.
//!
//! | file | what |
//! | --- | --- |
//! | `factors.rs` | when they are worth it |
//! | `block.rs` | how tiles lie |
//! | `kernel.rs` | multiplying tiles; unsafe code |
//! | `vectors.rs` | the same by vectors of bf16; unsafe code |
//! | `words.rs` | numbers and scores into tiles; unsafe code |
//! | `pack.rs` | factors into tiles, whatever their strides |
//! | `order.rs` | weights that are kept so |
//! | `product.rs` | matrix products |
//! | `convolution.rs` | 3x3 convolutions, without gathering windows |
//! | `sheet.rs` | the pictures of these, packed |

mod block;
mod convolution;
mod factors;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod kernel;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[path = "no_kernel.rs"]
mod kernel;
mod order;
mod pack;
mod product;
mod sheet;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod vectors;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod words;

pub(crate) use self::{
    block::{BLOCK, Strip},
    convolution::{Convolution3x3, Direction},
    factors::{Factors, Means},
    kernel::{Configured, Tiles},
    order::{Blocks, Ordered, in_order},
    pack::Side,
    product::{Both, Packed, block_product, columns_of_both, multiply, multiply_both},
};

/// For tests: numbers from -1 to 1.
#[cfg(test)]
fn numbers(n: usize, step: usize) -> Vec<f32> {
    (0..n)
        .map(|i| ((i * step) % 97) as f32 / 48.0 - 1.0)
        .collect()
}
