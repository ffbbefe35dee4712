//! Stable Diffusion 1.x and 2.x with observable, differentiable cross-attention.
//!
//! The model and nothing else: no training method, no plug-in interface, no picture files. Tensors are f32
//! on one [`candle_core::Device`] unless said otherwise; modules are listed in reading order.
//!
//! | step | module |
//! |---|---|
//! | what can go wrong, how much memory work takes | [`error`], [`memory`] |
//! | where to compute | [`device`] |
//! | read a checkpoint | [`config`], [`weights`], [`single_file`] |
//! | prompt to ids, seed to noise | [`tokenizer`], [`rng`] |
//! | operations with a backward, on a host and on a device | [`ops`] |
//! | ids and weights to context, latents and context to prediction | [`text_encoder`], [`prompt`], [`unet`] |
//! | small trainable deltas, and those of other tools | [`lora`], `lora_file` |
//! | pictures to latents and back | [`vae`] |
//! | noise levels, sampling | [`noise_schedule`], [`sampling`], [`generate`] |
//! | all of it in one value | [`model`] |

pub mod error;

pub mod device;
pub mod memory;

pub mod config;
pub mod weights;

pub mod single_file;

pub mod tokenizer;

pub mod rng;

pub mod ops;

mod layers;

pub mod text_encoder;

pub mod prompt;

pub mod unet;

pub mod lora;
mod lora_file;

pub mod vae;

pub mod noise_schedule;

pub mod sampling;

pub mod model;

pub mod generate;

pub use error::{Error, Result};
pub use generate::{GenerateConfig, Start};
pub use lora_file::PEFT_CONFIGURATION;
pub use model::{CheckpointSource, DiffusionModel};
pub use sampling::{Sampler, Schedule};
pub use unet::UNet;
