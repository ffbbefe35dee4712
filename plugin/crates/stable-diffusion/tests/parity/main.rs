//! The model against PyTorch: everything that `tests/reference/record_parity.py` recorded.
//!
//! | file | what is compared |
//! |---|---|
//! | `checkpoint.rs` | two whole checkpoints: prompt, text encoder, U-Net, attention, VAE, samplers, one training step |
//! | `true_width.rs` | one level of SD 1.5's true widths, with weights that both sides make up |
//! | `tokenizer.rs` | ids of awkward prompts |

#![expect(
    clippy::unwrap_used,
    reason = "a test's helpers fail the test by panicking"
)]
#![expect(clippy::print_stdout, reason = "the table of errors is the result")]

mod checkpoint;
mod hash_noise;
mod losses;
mod recording;
mod tokenizer;
mod true_width;
