//! Where a pass runs.

use candle_core::Device;

use super::{Backend, Precision, tape};

/// Does some work, a pass of a network, where its operations are spread over threads from.
///
/// On a CPU this is a thread of rayon's pool. Elsewhere every operation of the pass would be handed over to the pool and
/// waited for: two changes of threads, which for a small network take as long as the operation. On a device it is the
/// calling thread. What was chosen there for operations holds for the work.
pub(crate) fn on_workers<R: Send>(device: &Device, work: impl FnOnce() -> R + Send) -> R {
    if !device.is_cpu() {
        return work();
    }
    let (backend, precision) = (Backend::chosen(), Precision::current());
    let work = || Backend::choose(backend, || precision.within(work));
    // A worker takes on a pass while it waits for parts of another one, which may be on record.
    rayon::scope(|_| tape::off(work))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_runs_on_one_of_the_workers_with_what_was_chosen() {
        let here = || {
            let on_worker = rayon::current_thread_index().is_some();
            (on_worker, Backend::chosen(), Precision::current())
        };
        let there = || on_workers(&Device::Cpu, here);
        assert_eq!(here(), (false, None, Precision::F32));
        assert_eq!(there(), (true, None, Precision::F32));
        let chosen = Backend::Device.within(|| Precision::Bf16.within(there));
        assert_eq!(chosen, (true, Some(Backend::Device), Precision::Bf16));
        // What is recorded here is not recorded there.
        let (_, is_recording) =
            tape::Tape::record([], || on_workers(&Device::Cpu, tape::is_recording));
        assert!(!is_recording);
        // A pass within a pass stays where it is, and leaves nothing behind.
        assert_eq!(on_workers(&Device::Cpu, there), there());
    }
}
