//! Kernels of our own for CUDA, where candle's operations are many launches that each read and write everything.
//!
//! | kernel | what it spares | used for |
//! |---|---|---|
//! | attention, the columns of it that are observed, its backward | scores in memory | heads of a multiple of 8 up to 160 wide |
//! | group normalization with or without SiLU, the gradient of its input | passes | all |
//! | GEGLU and its gradient | passes | all |
//!
//! They are used for tensors on a CUDA device, all of them f32, f16 or bf16, by a build whose `nvcc` compiled them (for compute
//! capability 8.0 or more); everything else, and any other device, computes in candle's operations, which they are tested
//! against. Which of both a call takes hangs on its shapes and types alone: a kernel that cannot be launched is an error. Sums
//! are f32 whatever the numbers are, nothing is added atomically, and factors of 16 bits are multiplied by tensor cores.
//!
//! What is launched is described first ([`Launch`]) and then done by a [`Launcher`]: by the driver of a card, or, in the tests,
//! by an emulation of one that runs the very same source. The kernels are in `kernels/` of this crate.
//!
//! [`VARIABLE`] turns them off for a process, [`Kernels::within`] for some work.

mod attention;
#[cfg(feature = "cuda")]
mod cuda;
mod geglu;
mod memory;
mod norm;

use std::cell::Cell;
use std::sync::OnceLock;

use candle_core::{DType, Device, Result, Tensor};

pub(super) use attention::Fused;
pub(super) use geglu::FusedGeglu;
pub(super) use norm::FusedGroups;

use crate::ops::backend::within;

/// The environment variable that says whose kernels a process uses on a CUDA device: `own` (the default, where the build has
/// them) or `candle`. Anything else is an error when the device is opened.
pub const VARIABLE: &str = "CONCEPTLOOM_KERNELS";

/// Whose kernels compute where there are some of our own.
#[derive(Debug, Clone, Copy)]
pub enum Kernels {
    /// Our own on a CUDA device.
    Own,
    /// candle's.
    Candle,
    /// Our own for tensors in the processor's memory, run by somebody: for tests.
    By(&'static dyn Launcher),
}

thread_local! {
    static CHOSEN: Cell<Option<Kernels>> = const { Cell::new(None) };
}

impl Kernels {
    /// Does some work on this thread, and the backward passes of what comes out of it on any, with these kernels.
    pub fn within<R>(self, work: impl FnOnce() -> R) -> R {
        within(&CHOSEN, Some(self), work)
    }

    /// Whether there are some of our own for tensors of a device, and nobody asked for candle's.
    #[must_use]
    pub fn are_own(device: &Device) -> bool {
        matches!(Self::of_environment(), Ok(Self::Own)) && of_device(device).is_some()
    }

    /// Whose [`VARIABLE`] asks for.
    ///
    /// # Errors
    /// A sentence, if it has another value.
    pub fn of_environment() -> std::result::Result<Self, String> {
        static ASKED: OnceLock<std::result::Result<Kernels, String>> = OnceLock::new();
        let asked = ASKED.get_or_init(|| match std::env::var(VARIABLE).as_deref() {
            Err(_) | Ok("" | "own") => Ok(Self::Own),
            Ok("candle") => Ok(Self::Candle),
            Ok(other) => Err(format!("{VARIABLE} is {other:?}; it can be own or candle")),
        });
        asked.clone()
    }
}

/// Who runs kernels.
pub trait Launcher: Sync + std::fmt::Debug {
    /// Runs a kernel, or puts it in line behind what was launched before.
    ///
    /// # Errors
    /// It cannot be run.
    fn launch(&self, launch: &Launch<'_>) -> Result<()>;
}

/// A kernel and what it is run with.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The source that has it, a file of `kernels/` without its ending.
    pub source: &'static str,
    /// Its name.
    pub kernel: String,
    /// Blocks along x, y and z.
    pub grid: [usize; 3],
    /// Threads of a block, along x.
    pub n_threads: usize,
    /// Bytes of shared memory of a block, in addition to what the source asks for.
    pub shared_bytes: usize,
    /// In the order of its parameters.
    pub arguments: Vec<Argument<'a>>,
}

/// A parameter of a kernel. Tensors are contiguous.
#[derive(Debug, Clone, Copy)]
pub enum Argument<'a> {
    /// No pointer.
    Null,
    /// A pointer to numbers that are read.
    Read(&'a Tensor),
    /// A pointer to numbers that are all written.
    Write(&'a Tensor),
    /// An `int`.
    Int(i32),
    /// A `float`.
    Float(f32),
}

impl<'a> Argument<'a> {
    fn read_if(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::Null, Self::Read)
    }

    fn write_if(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::Null, Self::Write)
    }
}

/// Who runs kernels for these tensors, all of them of the first one's type; `None` if candle's are to be used.
fn launcher(tensors: &[&Tensor]) -> Option<&'static dyn Launcher> {
    let [first, ..] = tensors else {
        return None;
    };
    let is_fit = |tensor: &&Tensor| {
        tensor.dtype() == first.dtype()
            && tensor.device().same_device(first.device())
            && tensor.elem_count() > 0
    };
    if type_name(first.dtype()).is_none() || !tensors.iter().all(is_fit) {
        return None;
    }
    match CHOSEN.get().or_else(|| Kernels::of_environment().ok())? {
        Kernels::Candle => None,
        Kernels::Own => of_device(first.device()),
        Kernels::By(launcher) => Some(launcher),
    }
}

/// Who runs kernels on a device, if this build has some for it.
fn of_device(device: &Device) -> Option<&'static dyn Launcher> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => cuda::launcher(),
        _ => None,
    }
}

/// What kernels of a type are called by.
fn type_name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("f32"),
        DType::F16 => Some("f16"),
        DType::BF16 => Some("bf16"),
        _ => None,
    }
}

/// Numbers that a kernel reads 16 bytes at a time: contiguous, and beginning where such a piece does.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let x = x.contiguous()?;
    let is_aligned = {
        let (_, layout) = x.storage_and_layout();
        (layout.start_offset() * x.dtype().size_in_bytes()).is_multiple_of(PACK_BYTES)
    };
    if is_aligned {
        Ok(x)
    } else {
        x.force_contiguous()
    }
}

/// What a thread reads and writes at once where it can.
const PACK_BYTES: usize = 16;

/// A size as kernels take it; sizes were compared with the most before.
fn int(n: usize) -> Argument<'static> {
    Argument::Int(n as i32)
}

/// The most that a kernel can be told of a size.
const MOST: usize = i32::MAX as usize;

/// The most blocks along y or z.
const MOST_BLOCKS: usize = 65_535;
