//! Checkpoints on disk and models in use, without any reference implementation.
//!
//! | file | hazard |
//! |---|---|
//! | `single_file.rs` | the original layout's names, at SD 1.5's and 2.1's true sizes and in a round trip |
//! | `adapters.rs` | LoRA under the names of other tools |
//! | `folder.rs` | diffusers' layout: damaged, incomplete, mismatched |
//! | `generate.rs` | determinism, cancellation, ranges |
//! | `prompts.rs` | long and weighted prompts |
//! | `models.rs` | small configurations that the others share |
//! | `original_layout.rs` | the original layout, written down a second time |

#![expect(
    clippy::unwrap_used,
    reason = "a test's helpers fail the test by panicking"
)]

mod adapters;
mod folder;
mod generate;
mod models;
mod original_layout;
mod prompts;
mod single_file;
