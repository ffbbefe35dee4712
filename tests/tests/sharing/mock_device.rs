//! A device without a device: its memory lies at addresses that the CPU cannot read, and its streams are queues that only
//! exist as vector clocks. What would be a race on a card is a sentence here.
#![expect(unsafe_code, reason = "shares memory under an owner of its own")]

use std::sync::{Arc, Mutex, PoisonError};

use plugin_api::tensor::{TensorDescription, contiguous_strides};
use plugin_api::{DataType, DeviceId, ErrorCode, NodeError, SharedTensor, TensorOwner};

use crate::protected::Pages;

/// DLPack's number of devices that it does not know.
pub(crate) const DEVICE: DeviceId = DeviceId { kind: 12, index: 3 };

/// A stream's knowledge: how far it and each other stream were when it last heard of them.
type Clock = Vec<u64>;

fn hears(clock: &mut Clock, other: &Clock) {
    for (own, other) in clock.iter_mut().zip(other) {
        *own = (*own).max(*other);
    }
}

fn knows(clock: &Clock, other: &Clock) -> bool {
    clock.iter().zip(other).all(|(own, other)| own >= other)
}

#[derive(Default)]
struct State {
    streams: Vec<Clock>,
    /// How many buffers were not freed yet.
    alive: usize,
    wrong: Vec<String>,
}

impl State {
    /// Puts work into a stream; when it is done, as a clock.
    fn enqueue(&mut self, stream: u64) -> Clock {
        let stream = stream as usize;
        self.streams[stream][stream] += 1;
        self.streams[stream].clone()
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct MockDevice(Arc<Mutex<State>>);

/// The stream that the device's own tensors are made, copied and freed on.
const OWN: u64 = 0;

/// Bytes of the device.
pub(crate) struct Buffer {
    device: MockDevice,
    /// What lies at the address; the device alone can see it.
    values: Vec<f32>,
    shape: Vec<usize>,
    /// When they are there.
    ready: Clock,
    /// When those who used it are done.
    uses: Mutex<Vec<Clock>>,
    pages: Pages,
}

impl MockDevice {
    /// A device with as many streams.
    pub(crate) fn new(n_streams: usize) -> Self {
        let state = State {
            streams: vec![vec![0; n_streams]; n_streams],
            ..State::default()
        };
        Self(Arc::new(Mutex::new(state)))
    }

    fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What went wrong up to now.
    pub(crate) fn wrong(&self) -> Vec<String> {
        self.with(|state| std::mem::take(&mut state.wrong))
    }

    pub(crate) fn alive(&self) -> usize {
        self.with(|state| state.alive)
    }

    /// A tensor that work on the own stream fills.
    pub(crate) fn make(&self, values: Vec<f32>, shape: &[usize]) -> SharedTensor {
        let ready = self.with(|state| {
            state.alive += 1;
            state.enqueue(OWN)
        });
        let pages = Pages::forbidden(size_of_val(values.as_slice()));
        let description = TensorDescription {
            address: pages.address(),
            byte_offset: 0,
            allocation_bytes: size_of_val(values.as_slice()) as u64,
            device: DEVICE,
            data_type: DataType::F32,
            shape,
            strides: &contiguous_strides(shape),
            is_read_only: false,
        };
        let buffer = Buffer {
            device: self.clone(),
            values,
            shape: shape.to_vec(),
            ready,
            uses: Mutex::default(),
            pages,
        };
        let buffer = Owner(buffer);
        // SAFETY: the pages live as long as their owner; nobody else has them.
        unsafe { SharedTensor::from_raw(&description, buffer) }.unwrap()
    }

    /// Work on `stream` that uses a tensor of this device.
    pub(crate) fn kernel(&self, stream: u64, tensor: &SharedTensor) {
        let Owner(buffer) = tensor.owner_as::<Owner>().unwrap();
        buffer.used_on(stream);
    }
}

impl Buffer {
    fn used_on(&self, stream: u64) {
        let done = self.device.with(|state| {
            let done = state.enqueue(stream);
            if !knows(&done, &self.ready) {
                let text = format!("stream {stream} uses a tensor that may not be there yet");
                state.wrong.push(text);
            }
            done
        });
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        uses.push(done);
    }
}

/// What keeps a buffer on wires.
struct Owner(Buffer);

impl TensorOwner for Owner {
    fn wait_on(&self, stream: u64) -> Result<(), NodeError> {
        self.0.device.with(|state| {
            hears(&mut state.streams[stream as usize], &self.0.ready);
        });
        Ok(())
    }

    fn host_sync(&self) -> Result<(), NodeError> {
        Ok(())
    }

    fn release_after(&self, stream: u64) -> Result<(), NodeError> {
        self.0.device.with(|state| {
            let other = state.streams[stream as usize].clone();
            hears(&mut state.streams[OWN as usize], &other);
        });
        Ok(())
    }

    fn copy_to(&self, device: DeviceId) -> Result<SharedTensor, NodeError> {
        self.0.used_on(OWN);
        let Buffer { values, shape, .. } = &self.0;
        match device {
            DEVICE => Ok(self.0.device.make(values.clone(), shape)),
            DeviceId::CPU => Ok(SharedTensor::from_vec(values.clone(), shape)?),
            _ => Err(NodeError::new(
                ErrorCode::Internal,
                "there is no such device",
            )),
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let uses = self
            .0
            .uses
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        self.0.device.with(|state| {
            state.alive -= 1;
            let freed = state.enqueue(OWN);
            if !uses.iter().all(|done| knows(&freed, done)) {
                let text = "a tensor is freed that may still be in use".to_owned();
                state.wrong.push(text);
            }
        });
        assert_ne!(self.0.pages.address(), 0);
    }
}
