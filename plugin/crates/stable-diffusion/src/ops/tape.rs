//! A pass on record: what its operations need for their gradients, in the order in which they were computed.
//!
//! candle's graph holds every operand of every operation until the last gradient is there, fills a tensor with zeros for
//! every gradient, and adds to it on one thread. Here an operation names the operands that its backward reads
//! ([`super::function::Function::reads`]), all others are freed as soon as nobody else holds them, and what it did hold is
//! freed when its gradients are computed. Most of a network whose weights are frozen is read by nothing but the operation
//! behind it: a linear layer and a convolution need neither their input nor their output.
//!
//! While a pass is recorded, its tensors are tracked for candle too, as the result of an operation of nothing ([`mark`]).
//! What candle computes of them is therefore tracked without being recorded, and an operation that is given such a tensor
//! refuses it: a gradient is never lost in silence.

use std::{
    cell::RefCell,
    collections::{HashMap, HashSet},
    sync::Arc,
};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result, Shape, Tensor,
    TensorId, Var, bail,
};

use super::{
    function::{Again, Value},
    host,
};

/// See the module.
#[derive(Default)]
pub(crate) struct Tape {
    operations: Vec<Recorded>,
    /// Leaves and results.
    tracked: HashSet<TensorId>,
    /// Results that are computed again instead of being kept.
    cheap: HashMap<TensorId, Arc<Again>>,
    /// What results are marked with.
    root: Option<Tensor>,
    /// A zero of every type that there was, for tensors of which the shape alone is read.
    zeros: Vec<Tensor>,
}

/// From the gradients of an operation's results, each with the number of its elements, to those of its operands.
type Backward = dyn Fn(Vec<(Option<Tensor>, usize)>) -> Result<Vec<Option<Tensor>>> + Send + Sync;

/// An operation.
pub(super) struct Recorded {
    /// What it gave, and of how many elements.
    pub(super) results: Vec<(TensorId, usize)>,
    /// Those that are tracked.
    pub(super) operands: Vec<Option<TensorId>>,
    /// Whether a gradient may be the one that came in.
    pub(super) passes_on: bool,
    pub(super) backward: Box<Backward>,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tape")
            .field("n_operations", &self.operations.len())
            .finish_non_exhaustive()
    }
}

impl Recorded {
    /// Takes the gradients of the results, and adds to those of the operands.
    fn go_back(&self, gradients: &mut Gradients) -> Result<()> {
        let of_results = self.results.iter();
        let of_results: Vec<_> = of_results
            .map(|&(id, len)| (gradients.0.remove(&id).map(|sum| sum.value), len))
            .collect();
        if of_results.iter().all(|(gradient, _)| gradient.is_none()) {
            return Ok(());
        }
        let found = (self.backward)(of_results)?;
        for (operand, gradient) in self.operands.iter().zip(found) {
            if let (&Some(operand), Some(value)) = (operand, gradient) {
                let is_own = !self.passes_on;
                gradients.sum(operand, Gradient { value, is_own })?;
            }
        }
        Ok(())
    }
}

thread_local! {
    static RECORDING: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// What was recorded before is gone on with at the end, after a panic too.
struct Restore(Option<Tape>);

impl Drop for Restore {
    fn drop(&mut self) {
        RECORDING.replace(self.0.take());
    }
}

impl Tape {
    /// Does some work on this thread, and records what is computed of the leaves and of variables by operations of this crate.
    pub(crate) fn record<R>(
        leaves: impl IntoIterator<Item = TensorId>,
        work: impl FnOnce() -> R,
    ) -> (Self, R) {
        let tape = Self {
            tracked: leaves.into_iter().collect(),
            ..Self::default()
        };
        let _restore = Restore(RECORDING.replace(Some(tape)));
        let result = work();
        let mut tape = RECORDING.take().unwrap_or_default();
        // Whoever needs them has them.
        tape.cheap.clear();
        (tape, result)
    }

    /// Goes back from the gradients of results to those of leaves and variables, which are added to what is there of them.
    ///
    /// # Errors
    /// The tensor library fails.
    pub(crate) fn into_gradients(self, gradients: &mut Gradients) -> Result<()> {
        // An operation holds what it read until it was gone back through.
        let mut operations = self.operations.into_iter().rev();
        operations.try_for_each(|operation| operation.go_back(gradients))
    }

    /// [`Self::into_gradients`], and the record stays.
    ///
    /// # Errors
    /// The tensor library fails.
    pub(crate) fn gradients(&self, gradients: &mut Gradients) -> Result<()> {
        let mut operations = self.operations.iter().rev();
        operations.try_for_each(|operation| operation.go_back(gradients))
    }
}

/// Does some work on this thread of which nothing is recorded.
pub(super) fn off<R>(work: impl FnOnce() -> R) -> R {
    let _restore = Restore(RECORDING.take());
    work()
}

/// Whether what this thread computes is recorded.
pub(super) fn is_recording() -> bool {
    RECORDING.with_borrow(Option::is_some)
}

/// Which of these a gradient goes to; `None` if nothing is recorded.
pub(super) fn tracked(tensors: &[&Tensor]) -> Result<Option<Vec<bool>>> {
    RECORDING.with_borrow(|tape| {
        let Some(tape) = tape else { return Ok(None) };
        let tracked = tensors.iter().map(|tensor| {
            let is_known = tensor.is_variable() || tape.tracked.contains(&tensor.id());
            if tensor.track_op() && !is_known {
                bail!(
                    "a gradient would be lost: an operand of this pass was computed off the record"
                );
            }
            Ok(is_known)
        });
        tracked.collect::<Result<Vec<_>>>().map(Some)
    })
}

/// Says how a result is computed again.
pub(super) fn computes_again(result: &Tensor, again: Arc<Again>) {
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.cheap.insert(result.id(), again);
        }
    });
}

/// How a tensor is computed again, if that takes little.
pub(super) fn again(tensor: &Tensor) -> Option<Arc<Again>> {
    RECORDING.with_borrow(|tape| tape.as_ref()?.cheap.get(&tensor.id()).map(Arc::clone))
}

/// Puts an operation on record.
pub(super) fn push(operation: Recorded) {
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.tracked
                .extend(operation.results.iter().map(|&(id, _)| id));
            tape.operations.push(operation);
        }
    });
}

/// The same tensor, tracked. Its storage is moved.
pub(super) fn mark(tensor: Tensor) -> Result<Tensor> {
    let root = RECORDING.with_borrow(|tape| tape.as_ref().and_then(|tape| tape.root.clone()));
    let root = match root {
        Some(root) if root.device().same_device(tensor.device()) => root,
        _ => Var::zeros((), DType::F32, tensor.device())?.into_inner(),
    };
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.root = Some(root.clone());
        }
    });
    root.apply_op1(Marked(Value::take(tensor)?))
}

/// A scalar of this tensor's type.
pub(super) fn zero_like(tensor: &Tensor) -> Result<Tensor> {
    let (dtype, device) = (tensor.dtype(), tensor.device());
    let known = RECORDING.with_borrow(|tape| {
        let mut zeros = tape.iter().flat_map(|tape| &tape.zeros);
        let zero = zeros.find(|zero| zero.dtype() == dtype && zero.device().same_device(device));
        zero.cloned()
    });
    if let Some(zero) = known {
        return Ok(zero);
    }
    let zero = Tensor::zeros((), dtype, device)?;
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.zeros.push(zero.clone());
        }
    });
    Ok(zero)
}

/// An operation of nothing.
struct Marked(Value);

impl CustomOp1 for Marked {
    fn name(&self) -> &'static str {
        "on record"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.0.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.0.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.0.metal()
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        bail!("gradients of a recorded pass are the tape's")
    }
}

/// Gradients so far, of tensors by their identity.
#[derive(Debug, Default)]
pub(crate) struct Gradients(HashMap<TensorId, Gradient>);

#[derive(Debug)]
struct Gradient {
    value: Tensor,
    /// Nobody else holds its storage.
    is_own: bool,
}

impl Gradients {
    /// Adds a gradient that somebody else may hold.
    ///
    /// # Errors
    /// The tensor library fails.
    pub(crate) fn add(&mut self, of: &Tensor, gradient: Tensor) -> Result<()> {
        let (value, is_own) = (gradient.detach(), false);
        self.sum(of.id(), Gradient { value, is_own })
    }

    /// Takes the gradient of a tensor out.
    pub(crate) fn take(&mut self, of: &Tensor) -> Option<Tensor> {
        self.0.remove(&of.id()).map(|sum| sum.value)
    }

    /// Sums are those of two numbers, so that it makes no difference to which of both the other one is added.
    fn sum(&mut self, of: TensorId, more: Gradient) -> Result<()> {
        let sum = match self.0.remove(&of) {
            None => more,
            Some(sum) => {
                let (into, other) = if sum.is_own { (sum, more) } else { (more, sum) };
                if !(into.is_own && host::add_to(&into.value, &other.value)?) {
                    let value = (&into.value + &other.value)?;
                    let is_own = true;
                    self.0.insert(of, Gradient { value, is_own });
                    return Ok(());
                }
                into
            }
        };
        self.0.insert(of, sum);
        Ok(())
    }
}
