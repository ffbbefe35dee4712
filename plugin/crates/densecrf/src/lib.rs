//! The fully connected conditional random field of Krähenbühl and Koltun, *Efficient Inference in Fully Connected
//! CRFs with Gaussian Edge Potentials* (2011): every pixel talks to every other, and mean field still takes time
//! linear in the pixels, because the messages are Gaussian filters on a permutohedral lattice.
//!
//! Pure algorithm on slices: no tensor library, no image files, no plugin contract, no unsafe code.
//!
//! ```text
//! E(x) = Σ_i U_i(x_i) + Σ_{i≠j} [x_i ≠ x_j] Σ_k w_k k_k(f_i, f_j)          energy of a labeling (eq. 1–3)
//! k(f_i, f_j) = exp(-|f_i - f_j|² / 2),   f = (x, y)/σ_xy  or  (x, y)/σ_xy ⊕ (r, g, b)/σ_rgb
//! ```
//!
//! | step | equation | function |
//! | --- | --- | --- |
//! | constants, each with its source | eq. 3 | [`CrfConfig::cutler`] |
//! | label planes to unary energies | U = -ln softmax | [`unary_from_planes`] |
//! | picture to two filters | K ≈ slice · blur · splat | [`DenseCrf::new`], [`Lattice::build`] |
//! | mean field | alg. 1 | [`DenseCrf::infer`] |
//! | the answer | argmax_l Q_i(l) | [`Marginals::labels`] |
//!
//! The lattice depends on the picture only, so one [`DenseCrf`] is kept per picture and asked again whenever the
//! planes change. Conventions (symmetric normalization, the message from a pixel to itself included) are those of
//! `pydensecrf`, against which the tests compare.
//!
//! ```
//! use densecrf::{CrfConfig, DenseCrf, unary_from_planes};
//!
//! // Dark left, bright right; the mask (the second plane) claims a dark pixel and misses a bright one.
//! let rgb: Vec<u8> = [10, 12, 11, 240, 241, 239].iter().flat_map(|&gray| [gray; 3]).collect();
//! let planes = [1., 0., 1., 0., 1., 0.,  0., 1., 0., 1., 0., 1.];
//! let config = CrfConfig::cutler();
//! let crf = DenseCrf::new(6, 1, &rgb, &config)?;
//! let marginals = crf.infer(&unary_from_planes(&planes, 2)?, 2, config.iterations)?;
//! assert_eq!(marginals.labels(), [0, 0, 0, 1, 1, 1]);
//! # Ok::<(), densecrf::CrfError>(())
//! ```
//!
//! Results are the same bits for any number of threads: pixels are read in bands whose size is fixed, each sums for itself,
//! and the bands' sums are added up in their order.

mod config;
mod error;
mod lattice;
mod mean_field;
mod simd;
mod softmax;
mod unary;

pub use config::{Appearance, CrfConfig, Smoothness};
pub use error::CrfError;
pub use lattice::Lattice;
pub use mean_field::{DenseCrf, MAX_LABELS, Marginals};
pub use unary::unary_from_planes;
