//! The way back through a pass, with the planes of all parts kept, or with every part computed once more.
//!
//! A graph that is kept holds every intermediate tensor of the network until its gradients are computed. Computed again
//! (gradient checkpointing, Chen et al. 2016), only the planes between the parts are kept, and the graph of one part at a
//! time:
//!
//! ```text
//! forward     y_i = f_i(x_i; context, time, weights), without a graph; what leaves the network is a leaf
//! loss        its gradients at those leaves
//! backward    for i from the last to the first:  f_i again, with a graph, of leaves x_i, context, time;
//!             from dL/dy_i and dL/d(what was seen in it) to dL/dx_i and the parts of dL/dcontext, dL/dtime, dL/dweights
//! at last     from dL/dcontext and dL/dtime through what they were computed from
//! ```
//! A tensor that several parts read has a gradient of several summands. Each part continues the sum of the parts behind it,
//! in the order in which a graph that is kept adds them up, so that both ways give the same bits; a test compares them.

use std::ops::Range;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result as TensorResult, Shape,
    Tensor, Var,
    backend::{BackendDevice, BackendStorage},
    backprop::GradStore,
};

use super::{
    UNet,
    observation::{LayerAttention, Observed, OwnedWatch, Pass, Watch},
    parts::{Part, Planes, size, through},
};
use crate::{Result, ops::on_workers};

/// How the gradients of a pass will be computed; see [`UNet::forward_for_gradients`].
#[derive(Debug)]
pub struct Backward<'a>(Way<'a>);

#[derive(Debug)]
enum Way<'a> {
    Kept,
    Again(Box<Again<'a>>),
}

impl Backward<'_> {
    pub(super) fn kept() -> Self {
        Self(Way::Kept)
    }

    /// Gradients of a loss that was computed from what the pass gave, with respect to `variables`; none for those that it
    /// does not depend on. The graph ends here.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] when the tensor library fails.
    pub fn gradients(self, loss: &Tensor, variables: &[&Tensor]) -> Result<Vec<Option<Tensor>>> {
        let mut wanted = Wanted::new(variables);
        let of_loss = on_workers(loss.device(), || loss.backward())?;
        match self.0 {
            Way::Kept => wanted.take(of_loss)?,
            Way::Again(again) => again.gradients(of_loss, &mut wanted)?,
        }
        Ok(wanted.gradients)
    }
}

/// Gradients that somebody wants, found so far.
struct Wanted<'a> {
    variables: &'a [&'a Tensor],
    gradients: Vec<Option<Tensor>>,
}

impl<'a> Wanted<'a> {
    fn new(variables: &'a [&'a Tensor]) -> Self {
        let gradients = vec![None; variables.len()];
        Self {
            variables,
            gradients,
        }
    }

    fn take(&mut self, mut found: GradStore) -> Result<()> {
        for (variable, sum) in self.variables.iter().zip(&mut self.gradients) {
            let Some(gradient) = found.remove(variable) else {
                continue;
            };
            *sum = Some(match sum.take() {
                Some(sum) => (sum + gradient)?.detach(),
                None => gradient.detach(),
            });
        }
        Ok(())
    }
}

/// A pass whose parts are computed again.
#[derive(Debug)]
struct Again<'a> {
    unet: &'a UNet,
    watch: OwnedWatch,
    parts: Vec<Part<'a>>,
    /// What each part read and gave.
    uses: Vec<Use>,
    /// The latents, and the plane of every part but the last.
    planes: Vec<Plane>,
    latents: Tensor,
    context: Shared,
    time: Shared,
    /// What a loss is computed from: leaves.
    prediction: Tensor,
    attention: Vec<LayerAttention>,
}

#[derive(Debug)]
struct Use {
    x: usize,
    skip: Option<usize>,
    target: Option<[usize; 2]>,
    /// Of what was seen, in order.
    attention: Range<usize>,
}

/// A plane between two parts, without its graph.
#[derive(Debug)]
struct Plane {
    value: Tensor,
    /// Whether a gradient can pass it on its way to something that is trained.
    is_tracked: bool,
    /// The sum so far.
    gradient: Option<Tensor>,
}

impl Plane {
    fn new(value: &Tensor, is_tracked: bool) -> Self {
        Self {
            value: value.detach(),
            is_tracked,
            gradient: None,
        }
    }

    fn operand(&self) -> Result<Tensor> {
        if self.is_tracked {
            leaf(&self.value)
        } else {
            Ok(self.value.clone())
        }
    }
}

/// What all parts read.
#[derive(Debug)]
struct Shared {
    /// With its graph.
    source: Tensor,
    /// A leaf, if the source has a graph.
    operand: Tensor,
    /// The sum so far.
    gradient: Option<Tensor>,
}

impl Shared {
    fn new(source: Tensor) -> Result<Self> {
        let operand = if source.track_op() {
            leaf(&source)?
        } else {
            source.clone()
        };
        Ok(Self {
            source,
            operand,
            gradient: None,
        })
    }
}

/// A copy whose gradient is computed, and nothing behind it.
fn leaf(value: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(&value.detach())?.into_inner())
}

/// The pass as [`UNet::forward_observed`] gives it, with leaves in the place of what leaves the network.
pub(super) fn forward<'a>(
    unet: &'a UNet,
    latents: &Tensor,
    time: Tensor,
    context: &Tensor,
    watch: Watch<'_>,
) -> Result<(Observed, Backward<'a>)> {
    let parts = unet.network.parts();
    let (context, time) = (Shared::new(context.clone())?, Shared::new(time)?);
    let [plain_context, plain_time] = [&context, &time].map(|shared| shared.source.detach());
    let mut pass = Pass {
        context: &plain_context,
        watch,
        attention: Vec::new(),
    };
    let mut planes = vec![Plane::new(latents, latents.track_op())];
    let mut uses = Vec::with_capacity(parts.len());
    through(&parts, 0, |part, &x, skip: Option<&usize>, next| {
        let skip = skip.copied();
        let target = next.map(|&next| size(&planes[next].value)).transpose()?;
        let n_seen = pass.attention.len();
        let inputs = Planes {
            x: &planes[x].value,
            skip: skip.map(|skip| &planes[skip].value),
            target,
        };
        let y = part.forward(inputs, &plain_time, &mut pass)?;
        let mut read = [Some(x), skip].into_iter().flatten();
        // That y is tracked comes from the part's own weights: everything that it read is plain.
        let is_tracked = y.track_op()
            || read.any(|plane| planes[plane].is_tracked)
            || (part.reads_context() && context.source.track_op())
            || (part.reads_time() && time.source.track_op());
        for seen in &mut pass.attention[n_seen..] {
            seen.probabilities = leaf(&seen.probabilities)?;
            seen.self_attention = seen.self_attention.as_ref().map(leaf).transpose()?;
        }
        planes.push(Plane::new(&y, is_tracked));
        uses.push(Use {
            x,
            skip,
            target,
            attention: n_seen..pass.attention.len(),
        });
        Ok(planes.len() - 1)
    })?;
    let attention = pass.attention;
    let prediction = match planes.pop() {
        Some(last) => leaf(&last.value)?,
        None => latents.clone(),
    };
    let observed = Observed {
        prediction: prediction.clone(),
        attention: attention.clone(),
    };
    let again = Again {
        unet,
        watch: OwnedWatch::of(watch),
        parts,
        uses,
        planes,
        latents: latents.clone(),
        context,
        time,
        prediction,
        attention,
    };
    Ok((observed, Backward(Way::Again(Box::new(again)))))
}

impl Again<'_> {
    fn gradients(mut self, mut of_loss: GradStore, wanted: &mut Wanted<'_>) -> Result<()> {
        let mut of_plane = of_loss.remove(&self.prediction);
        let of_attention: Vec<[Option<Tensor>; 2]> = self
            .attention
            .drain(..)
            .map(|seen| {
                let of_self = seen.self_attention.as_ref();
                [
                    of_loss.remove(&seen.probabilities),
                    of_self.and_then(|seen| of_loss.remove(seen)),
                ]
            })
            .collect();
        wanted.take(of_loss)?;
        let (unet, device) = (self.unet, self.latents.device().clone());
        while let (Some(part), Some(used)) = (self.parts.pop(), self.uses.pop()) {
            let of_attention = &of_attention[used.attention.clone()];
            let work =
                || self.gradients_of_part(part, &used, of_plane.take(), of_attention, wanted);
            unet.compute(&device, work)?;
            // What the part read is what the one before it gave.
            of_plane = self.planes.pop().and_then(|plane| plane.gradient);
        }
        let mut pulls = Pulls::default();
        for shared in [&mut self.context, &mut self.time] {
            pulls.pull(&shared.source, shared.gradient.take())?;
        }
        pulls.pull(&self.latents, of_plane)?;
        match pulls.gradients()? {
            Some(found) => wanted.take(found),
            None => Ok(()),
        }
    }

    /// Computes a part again, and adds to the gradients of what it read.
    fn gradients_of_part(
        &mut self,
        part: Part<'_>,
        used: &Use,
        of_plane: Option<Tensor>,
        of_attention: &[[Option<Tensor>; 2]],
        wanted: &mut Wanted<'_>,
    ) -> Result<()> {
        if of_plane.is_none() && of_attention.iter().flatten().all(Option::is_none) {
            return Ok(());
        }
        let x = self.planes[used.x].operand()?;
        let skip = used.skip.map(|skip| self.planes[skip].operand());
        let skip = skip.transpose()?;
        let mut pulls = Pulls::default();
        {
            let mut pass = Pass {
                context: &self.context.operand,
                watch: self.watch.get(),
                attention: Vec::new(),
            };
            let inputs = Planes {
                x: &x,
                skip: skip.as_ref(),
                target: used.target,
            };
            let y = part.forward(inputs, &self.time.operand, &mut pass)?;
            pulls.pull(&y, of_plane)?;
            for (seen, [of_probabilities, of_self]) in pass.attention.iter().zip(of_attention) {
                pulls.pull(&seen.probabilities, of_probabilities.clone())?;
                if let Some(seen) = &seen.self_attention {
                    pulls.pull(seen, of_self.clone())?;
                }
            }
        }
        if pulls.is_empty() {
            return Ok(());
        }
        // The sums so far of what it reads: see [`Pulls`].
        let planes = [Some((used.x, &x)), used.skip.zip(skip.as_ref())];
        let planes = planes.into_iter().flatten();
        for (plane, operand) in planes.clone() {
            pulls.pull(operand, self.planes[plane].gradient.take())?;
        }
        let [context, time] = [&mut self.context, &mut self.time];
        for shared in [&mut *context, &mut *time] {
            pulls.pull(&shared.operand, shared.gradient.take())?;
        }
        let Some(mut found) = pulls.gradients()? else {
            return Ok(());
        };
        for (plane, operand) in planes {
            self.planes[plane].gradient = found.remove(operand);
        }
        for shared in [context, time] {
            shared.gradient = found.remove(&shared.operand);
        }
        wanted.take(found)
    }
}

/// Tensors, each with the gradient that reaches it from elsewhere.
///
/// Those that were added last are the first whose gradients are counted: candle goes through a sum from its right to its
/// left, and through the graph behind it afterwards. So a sum that was begun is gone on with when it is added after what
/// the part gave, exactly as in one graph of all parts.
#[derive(Default)]
struct Pulls(Option<Tensor>);

impl Pulls {
    fn pull(&mut self, tensor: &Tensor, gradient: Option<Tensor>) -> Result<()> {
        let Some(gradient) = gradient.filter(|_| tensor.track_op()) else {
            return Ok(());
        };
        let pull = tensor.apply_op1(Pull(gradient))?;
        self.0 = Some(match self.0.take() {
            Some(sum) => (sum + pull)?,
            None => pull,
        });
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    fn gradients(self) -> Result<Option<GradStore>> {
        let through = |sum: Tensor| on_workers(sum.device(), || sum.backward());
        Ok(self.0.map(through).transpose()?)
    }
}

/// The number 0, whose gradient with respect to its operand is this one.
struct Pull(Tensor);

impl CustomOp1 for Pull {
    fn name(&self) -> &'static str {
        "pull"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, _: &Layout) -> TensorResult<(CpuStorage, Shape)> {
        zero(storage)
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> TensorResult<(CudaStorage, Shape)> {
        zero(storage)
    }

    fn metal_fwd(&self, storage: &MetalStorage, _: &Layout) -> TensorResult<(MetalStorage, Shape)> {
        zero(storage)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> TensorResult<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

fn zero<S>(storage: &S) -> TensorResult<(S, Shape)>
where
    S: BackendStorage,
    S::Device: BackendDevice<Storage = S>,
{
    let shape = Shape::from(());
    let zero = storage.device().zeros_impl(&shape, DType::F32)?;
    Ok((zero, shape))
}
