//! A function of tensors as one operation that gradients go through: on the tape of a pass that is recorded
//! ([`super::tape`]), or as a node of candle's graph.
//!
//! candle lets an operation of ours make its result from bare storages only. So the result is computed first, of tensors
//! that have no graph, and its storage is moved, not copied, into the node.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, InplaceOp1, Layout,
    MetalStorage, Result, Shape, Tensor,
    backend::{BackendDevice, BackendStorage},
    bail,
};

use super::{
    host,
    tape::{self, Recorded},
};

/// What the operation does. Operands are detached: nothing that is computed from them has a graph. Gradients are brought into
/// the types of their operands.
pub(super) trait Function: Send + Sync + 'static {
    const NAME: &'static str;

    /// The value: a tensor of its own, no view of an operand.
    fn forward(&self, operands: &[Tensor]) -> Result<Tensor>;

    /// Gradients of the operands that are `wanted`, from the value and its gradient.
    fn backward(
        &self,
        operands: &[Tensor],
        y: &Tensor,
        dy: &Tensor,
        wanted: &[bool],
    ) -> Result<Vec<Option<Tensor>>>;

    /// What [`Self::backward`] reads of an operand.
    fn reads(&self, _operand: usize, _wanted: &[bool]) -> Reads {
        Reads::Numbers
    }

    /// What it reads of the value.
    fn reads_value(&self) -> Reads {
        Reads::Shape
    }

    /// Whether the value is computed again rather than kept for whoever reads it on the way back. All operands are.
    fn is_cheap(&self) -> bool {
        false
    }

    /// Whether a gradient that it returns may be the one that it was given, or a part of it.
    fn passes_on(&self) -> bool {
        false
    }
}

/// What the way back of an operation reads of a tensor, and the tape therefore holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// No number of it.
    Shape,
    /// Numbers that may be rounded to bf16, if they are f32.
    Rounded,
    Numbers,
}

impl Reads {
    pub(super) fn if_so(reads: bool) -> Self {
        if reads { Self::Numbers } else { Self::Shape }
    }

    /// [`Self::Rounded`], or the numbers as they are.
    pub(super) fn rounded_if(rounds: bool) -> Self {
        if rounds { Self::Rounded } else { Self::Numbers }
    }
}

/// A tensor for the way back.
enum Kept {
    Whole(Tensor),
    Rounded(Tensor),
    Again(Arc<Again>),
}

/// How a value is computed again.
pub(super) type Again = dyn Fn() -> Result<Tensor> + Send + Sync;

impl Kept {
    fn new(tensor: &Tensor, reads: Reads) -> Result<Self> {
        Ok(match reads {
            Reads::Shape => Self::Whole(shape_of(tensor)?),
            Reads::Rounded if tensor.device().is_cpu() && tensor.dtype() == DType::F32 => {
                Self::Rounded(host::rounded(tensor)?)
            }
            Reads::Rounded | Reads::Numbers => Self::Whole(tensor.clone()),
        })
    }

    fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Whole(tensor) => Ok(tensor.clone()),
            Self::Rounded(tensor) => host::widened(tensor),
            Self::Again(again) => again(),
        }
    }
}

/// The value, differentiable in every operand that is tracked. In candle's graph at most three can be.
pub(super) fn apply<F: Function>(function: F, operands: &[&Tensor]) -> Result<Tensor> {
    let mut parts = apply_in_parts(function, operands, |y| Ok(vec![y.clone()]))?;
    match parts.pop() {
        Some(y) => Ok(y),
        None => bail!("{} has no value", F::NAME),
    }
}

/// [`apply`], and `parts` of the value: views of pieces of it one after the other, perhaps in another type.
pub(super) fn apply_in_parts<F: Function>(
    function: F,
    operands: &[&Tensor],
    parts: impl FnOnce(&Tensor) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let detached: Vec<Tensor> = operands.iter().map(|operand| operand.detach()).collect();
    let y = function.forward(&detached)?;
    let Some(tracked) = tape::tracked(operands)? else {
        return parts(&in_graph(function, operands, detached, y)?);
    };
    if !tracked.contains(&true) {
        return parts(&y);
    }
    let y = tape::mark(y)?;
    let parts = parts(&y)?;
    let function = Arc::new(function);
    let keep = |reads: &dyn Fn(usize) -> Reads| {
        let keep = |index: usize| match (tape::again(operands[index]), reads(index)) {
            (Some(again), Reads::Rounded | Reads::Numbers) => Ok(Kept::Again(again)),
            (_, reads) => Kept::new(&detached[index], reads),
        };
        (0..operands.len()).map(keep).collect::<Result<Vec<Kept>>>()
    };
    let kept = keep(&|index| function.reads(index, &tracked))?;
    if function.is_cheap() {
        let (function, kept) = (Arc::clone(&function), keep(&|_| Reads::Numbers)?);
        let again = move || function.forward(&tensors(&kept)?);
        tape::computes_again(&y, Arc::new(again));
    }
    let value = Kept::new(&y.detach(), function.reads_value())?;
    let dtypes: Vec<DType> = detached.iter().map(Tensor::dtype).collect();
    tape::push(Recorded {
        results: parts
            .iter()
            .map(|part| (part.id(), part.elem_count()))
            .collect(),
        operands: operands
            .iter()
            .zip(&tracked)
            .map(|(operand, tracked)| tracked.then(|| operand.id()))
            .collect(),
        passes_on: function.passes_on(),
        backward: Box::new(move |of_parts| {
            let kept = tensors(&kept)?;
            let value = value.tensor()?;
            let dy = joined(of_parts, &value)?;
            let gradients = function.backward(&kept, &value, &dy, &tracked)?;
            // A parameter may have another type than what it is multiplied with.
            let gradients = gradients.into_iter().zip(&dtypes);
            gradients
                .map(|(gradient, &dtype)| gradient.map(|g| g.to_dtype(dtype)).transpose())
                .collect()
        }),
    });
    Ok(parts)
}

fn tensors(kept: &[Kept]) -> Result<Vec<Tensor>> {
    kept.iter().map(Kept::tensor).collect()
}

/// A tensor of this shape and type that holds nothing to speak of.
fn shape_of(tensor: &Tensor) -> Result<Tensor> {
    tape::zero_like(tensor)?.broadcast_as(tensor.shape())
}

/// The gradient of a value from those of its parts.
fn joined(mut of_parts: Vec<(Option<Tensor>, usize)>, value: &Tensor) -> Result<Tensor> {
    let is_whole = matches!(&of_parts[..], [(Some(only), _)] if only.shape() == value.shape());
    if is_whole && let Some((Some(only), _)) = of_parts.pop() {
        return Ok(only);
    }
    let flat = of_parts.into_iter().map(|(gradient, len)| match gradient {
        Some(gradient) => gradient.flatten_all()?.to_dtype(value.dtype()),
        None => Tensor::zeros(len, value.dtype(), value.device()),
    });
    Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?.reshape(value.shape())
}

/// The value as a node of candle's graph, if an operand is tracked.
fn in_graph<F: Function>(
    function: F,
    operands: &[&Tensor],
    detached: Vec<Tensor>,
    y: Tensor,
) -> Result<Tensor> {
    let wanted: Vec<bool> = operands.iter().map(|operand| operand.track_op()).collect();
    let tracked: Vec<&Tensor> = operands.iter().copied().filter(|t| t.track_op()).collect();
    if tracked.is_empty() {
        return Ok(y);
    }
    let node = Node {
        value: Value::take(y)?,
        function,
        operands: detached,
        wanted,
    };
    match tracked[..] {
        [a] => a.apply_op1(node),
        [a, b] => a.apply_op2(b, node),
        [a, b, c] => a.apply_op3(b, c, node),
        _ => bail!("{}: more than three operands are tracked", F::NAME),
    }
}

/// What [`Function::backward`] returns, of a gradient for each operand.
pub(super) fn only(
    wanted: &[bool],
    gradient: impl Fn(usize) -> Result<Tensor>,
) -> Result<Vec<Option<Tensor>>> {
    let operands = wanted.iter().enumerate();
    operands
        .map(|(operand, &wanted)| wanted.then(|| gradient(operand)).transpose())
        .collect()
}

/// A parameter in the type of what it is multiplied with.
pub(super) fn in_type_of(x: &Tensor, parameter: &Tensor) -> Result<Tensor> {
    parameter.to_dtype(x.dtype())
}

/// Σ over all dimensions but one.
pub(super) fn sum_to(x: &Tensor, dim: usize) -> Result<Tensor> {
    let n = x.dim(dim)?;
    x.transpose(0, dim)?
        .contiguous()?
        .reshape((n, ()))?
        .sum(D::Minus1)
}

struct Node<F> {
    function: F,
    operands: Vec<Tensor>,
    wanted: Vec<bool>,
    value: Value,
}

impl<F: Function> Node<F> {
    /// Gradients of the tracked operands, in their order.
    fn gradients<const N: usize>(&self, y: &Tensor, dy: &Tensor) -> Result<[Option<Tensor>; N]> {
        let (y, dy) = (y.detach(), dy.detach());
        let all = self
            .function
            .backward(&self.operands, &y, &dy, &self.wanted)?;
        let mut gradients = Vec::with_capacity(N);
        let operands = all.into_iter().zip(&self.wanted).zip(&self.operands);
        for ((gradient, _), operand) in operands.filter(|((_, wanted), _)| **wanted) {
            // A parameter may have another type than what it is multiplied with.
            let gradient = gradient.map(|g| g.to_dtype(operand.dtype())).transpose()?;
            gradients.push(gradient);
        }
        let mut gradients = gradients.into_iter();
        Ok(std::array::from_fn(|_| gradients.next().flatten()))
    }
}

/// The storage of a value that was computed already.
pub(super) struct Value {
    shape: Shape,
    storage: Mutex<Option<AnyStorage>>,
}

enum AnyStorage {
    Cpu(CpuStorage),
    Cuda(CudaStorage),
    Metal(MetalStorage),
}

impl Value {
    /// Moves the storage out of `y`, which nobody else may hold.
    pub(super) fn take(y: Tensor) -> Result<Self> {
        let is_whole = {
            let (storage, layout) = y.storage_and_layout();
            let n_elements = match &*storage {
                candle_core::Storage::Cpu(storage) => cpu_len(storage),
                // What was computed last is whole, unless it is a view.
                _ => layout.shape().elem_count(),
            };
            layout.is_contiguous()
                && layout.start_offset() == 0
                && n_elements == layout.shape().elem_count()
        };
        let y = if is_whole { y } else { y.copy()? };
        let taken = Taken(Mutex::new(None));
        y.inplace_op1(&taken)?;
        Ok(Self {
            shape: y.shape().clone(),
            storage: taken.0,
        })
    }

    fn storage(&self) -> Result<AnyStorage> {
        let mut storage = self.storage.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(storage) = storage.take() else {
            bail!("the value of a node is taken once")
        };
        Ok(storage)
    }

    pub(super) fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.storage()? {
            AnyStorage::Cpu(storage) => Ok((storage, self.shape.clone())),
            _ => bail!("a value is on another device than its operands"),
        }
    }

    pub(super) fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.storage()? {
            AnyStorage::Cuda(storage) => Ok((storage, self.shape.clone())),
            _ => bail!("a value is on another device than its operands"),
        }
    }

    pub(super) fn metal(&self) -> Result<(MetalStorage, Shape)> {
        match self.storage()? {
            AnyStorage::Metal(storage) => Ok((storage, self.shape.clone())),
            _ => bail!("a value is on another device than its operands"),
        }
    }
}

fn cpu_len(storage: &CpuStorage) -> usize {
    match storage {
        CpuStorage::F32(values) => values.len(),
        CpuStorage::F16(values) => values.len(),
        CpuStorage::BF16(values) => values.len(),
        CpuStorage::F64(values) => values.len(),
        // No value of these operations has another type; 0 has it copied.
        _ => 0,
    }
}

/// Leaves a storage of one element in the place of another one.
struct Taken(Mutex<Option<AnyStorage>>);

impl Taken {
    fn swap<S>(&self, storage: &mut S, wrap: impl FnOnce(S) -> AnyStorage) -> Result<()>
    where
        S: BackendStorage,
        S::Device: BackendDevice<Storage = S>,
    {
        let least = storage
            .device()
            .zeros_impl(&Shape::from(1), storage.dtype())?;
        let whole = std::mem::replace(storage, least);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(wrap(whole));
        Ok(())
    }
}

impl InplaceOp1 for Taken {
    fn name(&self) -> &'static str {
        "take"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        self.swap(storage, AnyStorage::Cpu)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        self.swap(storage, AnyStorage::Cuda)
    }

    fn metal_fwd(&self, storage: &mut MetalStorage, _: &Layout) -> Result<()> {
        self.swap(storage, AnyStorage::Metal)
    }
}

impl<F: Function> CustomOp1 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.value.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.value.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.value.metal()
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let [gradient] = self.gradients(y, dy)?;
        Ok(gradient)
    }
}

impl<F: Function> CustomOp2 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.value.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.value.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.value.metal()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [first, second] = self.gradients(y, dy)?;
        Ok((first, second))
    }
}

impl<F: Function> CustomOp3 for Node<F> {
    fn name(&self) -> &'static str {
        F::NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.value.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.value.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.value.metal()
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [first, second, third] = self.gradients(y, dy)?;
        Ok((first, second, third))
    }
}
