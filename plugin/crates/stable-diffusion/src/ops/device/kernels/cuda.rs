//! Launches on a card.
#![expect(unsafe_code, reason = "kernels take bare pointers")]

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda::cudarc::{
    driver::{
        CudaFunction, CudaModule, CudaStream, DevicePtr, DriverError, LaunchConfig, PushKernelArg,
        sys::CUfunction_attribute_enum as Attribute,
    },
    nvrtc::Ptx,
};
use candle_core::cuda::{CudaDevice, CudaStorageSlice, DeviceId};
use candle_core::{Device, Error, Result, Storage, Tensor, bail};

use super::{Argument, Launch, Launcher, VARIABLE};

// `IMAGES`, by source: what nvcc made of it, empty where it made nothing.
include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Shared memory that every block may have without asking.
const PLAIN_SHARED_BYTES: usize = 48 << 10;

/// What is loaded, of every device.
#[derive(Debug, Default)]
struct Driver {
    loaded: Mutex<Loaded>,
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<(DeviceId, &'static str), Arc<CudaModule>>,
    functions: HashMap<(DeviceId, String), CudaFunction>,
}

/// The driver of cards, if this build has kernels.
pub(super) fn launcher() -> Option<&'static dyn Launcher> {
    static DRIVER: LazyLock<Driver> = LazyLock::new(Driver::default);
    let has_kernels = IMAGES.iter().all(|(_, image)| !image.is_empty());
    has_kernels.then(|| &*DRIVER as &dyn Launcher)
}

impl Driver {
    fn function(&self, device: &CudaDevice, launch: &Launch<'_>) -> Result<CudaFunction> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (device.id(), launch.kernel.clone());
        if let Some(function) = loaded.functions.get(&key) {
            return Ok(function.clone());
        }
        let module = match loaded.modules.get(&(device.id(), launch.source)) {
            Some(module) => module.clone(),
            None => {
                let image = IMAGES.iter().find(|(source, _)| *source == launch.source);
                let Some((source, image)) = image else {
                    bail!("this build has no kernels of {}", launch.source)
                };
                let stream = device.cuda_stream();
                let module = stream
                    .context()
                    .load_module(Ptx::from_binary(image.to_vec()))
                    .map_err(|error| failure("loaded", launch, &error))?;
                loaded.modules.insert((device.id(), source), module.clone());
                module
            }
        };
        let function = module
            .load_function(&launch.kernel)
            .map_err(|error| failure("found", launch, &error))?;
        // The same for every launch of a kernel.
        if launch.shared_bytes > PLAIN_SHARED_BYTES {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function
                .set_attribute(attribute, launch.shared_bytes as i32)
                .map_err(|error| failure("given its shared memory", launch, &error))?;
        }
        loaded.functions.insert(key, function.clone());
        Ok(function)
    }
}

impl Launcher for Driver {
    fn launch(&self, launch: &Launch<'_>) -> Result<()> {
        let tensors = launch
            .arguments
            .iter()
            .filter_map(|argument| match argument {
                Argument::Read(tensor) | Argument::Write(tensor) => Some(*tensor),
                _ => None,
            });
        let tensors: Vec<&Tensor> = tensors.collect();
        let Some(Device::Cuda(device)) = tensors.first().map(|tensor| tensor.device()) else {
            bail!("{} is launched with tensors of a card", launch.kernel)
        };
        if let Some(other) = tensors
            .iter()
            .find(|tensor| !tensor.device().same_device(tensors[0].device()))
        {
            bail!(
                "{}: tensors on {:?} and {:?}",
                launch.kernel,
                device,
                other.device()
            );
        }
        let function = self.function(device, launch)?;
        let stream = device.cuda_stream();

        // Every argument in 8 bytes; the kernel reads as many of them as its parameter has.
        let mut words: Vec<u64> = Vec::with_capacity(launch.arguments.len());
        for argument in &launch.arguments {
            words.push(match argument {
                Argument::Null => 0,
                Argument::Read(tensor) | Argument::Write(tensor) => address(tensor, &stream)?,
                Argument::Int(n) => u64::from(n.cast_unsigned()),
                Argument::Float(x) => u64::from(x.to_bits()),
            });
        }
        let blocks = launch.grid.map(|n| u32::try_from(n).map_err(Error::wrap));
        let [x, y, z] = blocks;
        let config = LaunchConfig {
            grid_dim: (x?, y?, z?),
            block_dim: (launch.n_threads as u32, 1, 1),
            shared_mem_bytes: launch.shared_bytes as u32,
        };
        let mut builder = stream.launch_builder(&function);
        for word in &words {
            builder.arg(word);
        }
        // SAFETY: arguments are in the order and of the kinds of the kernel's parameters, and buffers as large as it reads and
        // writes, which the tests see to with an emulation that checks every access, for launches that the same code
        // describes. All tensors are of this device, whose one stream orders this behind what made them and before what uses
        // their memory next. What is written are new tensors that nobody else has.
        unsafe { builder.launch(config) }
            .map(drop)
            .map_err(|error| failure("launched", launch, &error))
    }
}

/// Where the numbers of a contiguous tensor are.
fn address(tensor: &Tensor, stream: &CudaStream) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("a kernel takes tensors of a card")
    };
    let start = match &storage.slice {
        CudaStorageSlice::F32(values) => values.device_ptr(stream).0,
        CudaStorageSlice::F16(values) => values.device_ptr(stream).0,
        CudaStorageSlice::BF16(values) => values.device_ptr(stream).0,
        CudaStorageSlice::U32(values) => values.device_ptr(stream).0,
        _ => bail!("no kernel takes {:?}", tensor.dtype()),
    };
    Ok(start + (layout.start_offset() * tensor.dtype().size_in_bytes()) as u64)
}

fn failure(what: &str, launch: &Launch<'_>, error: &DriverError) -> Error {
    Error::Msg(format!(
        "the kernel {} could not be {what}: {error}; it was compiled for compute capability {COMPUTE_CAPABILITY}. Set \
         {VARIABLE}=candle to do without kernels of our own",
        launch.kernel
    ))
}
