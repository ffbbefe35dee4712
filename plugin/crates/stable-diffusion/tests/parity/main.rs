//! The model against PyTorch: everything that `tests/reference/record_*.py` recorded.
//!
//! | file | what is compared |
//! |---|---|
//! | `checkpoint.rs` | two whole checkpoints: prompt, text encoder, U-Net, attention, VAE, samplers, one training step |
//! | `true_width.rs` | one level of SD 1.5's true widths, with weights that both sides make up |
//! | `tokenizer.rs` | ids of awkward prompts |
//! | `prompts.rs` | contexts of long and weighted prompts, as ComfyUI makes them |

#![expect(
    clippy::unwrap_used,
    reason = "a test's helpers fail the test by panicking"
)]
#![expect(clippy::print_stdout, reason = "the table of errors is the result")]

mod checkpoint;
mod hash_noise;
mod losses;
mod prompts;
mod recording;
mod tokenizer;
mod true_width;
