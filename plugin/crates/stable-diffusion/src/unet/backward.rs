//! The way back through a pass: on record as a whole, or part by part, every part computed once more.
//!
//! What leaves the network is a leaf of the graph of whoever computes a loss of it; what enters it is a leaf of the record
//! ([`crate::ops::Tape`]). A record holds what the operations of a whole network read on the way back. Computed again
//! (gradient checkpointing, Chen et al. 2016), only the planes between the parts are kept, and the record of one part at a
//! time:
//!
//! ```text
//! forward     y_i = f_i(x_i; context, time, weights), on record or not
//! loss        its gradients at what left the network
//! backward    through the record; or for i from the last to the first:  f_i again, on record,
//!             from dL/dy_i and dL/d(what was seen in it) to dL/dx_i and the parts of dL/dcontext, dL/dtime, dL/dweights
//! at last     from dL/dlatents, dL/dcontext and dL/dtime through what they were computed from
//! ```
//! A tensor that several parts read has a gradient of several summands. Each part continues the sum of the parts behind it,
//! in the order of one record of all parts, so that both ways give the same bits; a test compares them.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, MetalStorage, Result as TensorResult, Shape,
    Tensor, TensorId, Var,
    backend::{BackendDevice, BackendStorage},
    backprop::GradStore,
};

use super::{
    UNet,
    observation::{LayerAttention, Observed, OwnedWatch, Pass, Watch},
    parts::{Part, Planes, Trail, size, through, walked},
};
use crate::{
    Result,
    ops::{Gradients, Tape, on_workers},
};

/// How the gradients of a pass will be computed; see [`UNet::forward_for_gradients`].
#[derive(Debug)]
pub struct Backward<'a> {
    unet: &'a UNet,
    inputs: Inputs,
    outputs: Outputs,
    way: Way<'a>,
}

#[derive(Debug)]
enum Way<'a> {
    OnRecord { tape: Tape, results: Seen },
    Again(Again<'a>),
}

/// What the network is given.
#[derive(Debug)]
struct Inputs {
    latents: Input,
    context: Input,
    time: Input,
}

impl Inputs {
    /// Those that a gradient can pass.
    fn leaves(&self) -> impl Iterator<Item = TensorId> {
        [&self.latents, &self.context, &self.time]
            .into_iter()
            .filter(|input| input.source.track_op())
            .map(|input| input.leaf.id())
    }
}

#[derive(Debug)]
struct Input {
    /// With its graph.
    source: Tensor,
    /// The same numbers without it.
    leaf: Tensor,
}

impl Input {
    fn new(source: Tensor) -> Self {
        let leaf = source.detach();
        Self { source, leaf }
    }
}

/// What the network gives: variables, so that a loss has gradients with respect to it.
#[derive(Debug)]
struct Outputs {
    prediction: Tensor,
    attention: Vec<LayerAttention>,
}

/// The prediction and what was seen, or gradients of it.
#[derive(Debug)]
struct Seen {
    prediction: Option<Tensor>,
    /// Of every watched layer probabilities and self-attention.
    attention: Vec<[Option<Tensor>; 2]>,
}

impl Seen {
    /// For each tensor that was seen its gradient.
    fn give(self, of: Self, gradients: &mut Gradients) -> Result<()> {
        let prediction = [(self.prediction, of.prediction)];
        let attention = self.attention.into_iter().flatten();
        let attention = attention.zip(of.attention.into_iter().flatten());
        for pair in prediction.into_iter().chain(attention) {
            if let (Some(result), Some(gradient)) = pair {
                gradients.add(&result, gradient)?;
            }
        }
        Ok(())
    }
}

fn seen(attention: &[LayerAttention]) -> Vec<[Option<Tensor>; 2]> {
    let both = |seen: &LayerAttention| {
        [
            Some(seen.probabilities.clone()),
            seen.self_attention.clone(),
        ]
    };
    attention.iter().map(both).collect()
}

/// A pass whose parts are computed again.
#[derive(Debug)]
struct Again<'a> {
    watch: OwnedWatch,
    parts: Vec<Part<'a>>,
    /// What each part read and gave.
    uses: Vec<Use>,
    /// The latents, and the plane of every part but the last.
    planes: Vec<Plane>,
}

#[derive(Debug)]
struct Use {
    x: usize,
    skip: Option<usize>,
    target: Option<[usize; 2]>,
    /// How much was seen in it.
    n_seen: usize,
}

/// A plane between two parts, without a graph.
#[derive(Debug, Clone)]
struct Plane {
    value: Tensor,
    /// Whether a gradient can pass it on its way to something that is trained.
    is_tracked: bool,
}

/// A variable of the same numbers.
fn variable(value: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(&value.detach())?.into_inner())
}

impl Outputs {
    fn new(prediction: &Tensor, attention: Vec<LayerAttention>) -> Result<Self> {
        let attention = attention.into_iter().map(|seen| {
            Ok(LayerAttention {
                probabilities: variable(&seen.probabilities)?,
                self_attention: seen.self_attention.as_ref().map(variable).transpose()?,
                ..seen
            })
        });
        Ok(Self {
            prediction: variable(prediction)?,
            attention: attention.collect::<Result<_>>()?,
        })
    }
}

/// The pass as [`UNet::forward_observed`] gives it, with variables in the place of what leaves the network.
pub(super) fn forward<'a>(
    unet: &'a UNet,
    latents: &Tensor,
    time: Tensor,
    context: &Tensor,
    watch: Watch<'_>,
    is_again: bool,
) -> Result<(Observed, Backward<'a>)> {
    let inputs = Inputs {
        latents: Input::new(latents.clone()),
        context: Input::new(context.clone()),
        time: Input::new(time),
    };
    let (outputs, way) = if is_again {
        part_by_part(unet, &inputs, watch)?
    } else {
        on_record(unet, &inputs, watch)?
    };
    let observed = Observed {
        prediction: outputs.prediction.clone(),
        attention: outputs.attention.clone(),
    };
    let backward = Backward {
        unet,
        inputs,
        outputs,
        way,
    };
    Ok((observed, backward))
}

fn on_record<'a>(unet: &'a UNet, inputs: &Inputs, watch: Watch<'_>) -> Result<(Outputs, Way<'a>)> {
    let mut pass = Pass {
        context: &inputs.context.leaf,
        watch,
        attention: Vec::new(),
    };
    let (tape, prediction) = Tape::record(inputs.leaves(), || {
        let parts = unet.network.parts();
        let first = Trail::new(inputs.latents.leaf.clone());
        walked(&parts, first, &inputs.time.leaf, &mut pass)
    });
    let prediction = prediction?.x;
    let results = Seen {
        attention: seen(&pass.attention),
        prediction: Some(prediction.clone()),
    };
    let outputs = Outputs::new(&prediction, pass.attention)?;
    Ok((outputs, Way::OnRecord { tape, results }))
}

fn part_by_part<'a>(
    unet: &'a UNet,
    inputs: &Inputs,
    watch: Watch<'_>,
) -> Result<(Outputs, Way<'a>)> {
    let parts = unet.network.parts();
    let mut pass = Pass {
        context: &inputs.context.leaf,
        watch,
        attention: Vec::new(),
    };
    let is_tracked = |input: &Input| input.source.track_op();
    let mut planes = vec![Plane {
        value: inputs.latents.leaf.clone(),
        is_tracked: is_tracked(&inputs.latents),
    }];
    let mut uses = Vec::with_capacity(parts.len());
    through(
        &parts,
        Trail::new(0),
        |part, &x, skip: Option<&usize>, next| {
            let skip = skip.copied();
            let target = next.map(|&next| size(&planes[next].value)).transpose()?;
            let n_seen = pass.attention.len();
            let read = Planes {
                x: &planes[x].value,
                skip: skip.map(|skip| &planes[skip].value),
                target,
            };
            let y = part.forward(read, &inputs.time.leaf, &mut pass)?;
            let mut read = [Some(x), skip].into_iter().flatten();
            planes.push(Plane {
                value: y.detach(),
                // That y itself is tracked comes from the part's own weights: everything that it read is plain.
                is_tracked: y.track_op()
                    || read.any(|plane| planes[plane].is_tracked)
                    || (part.reads_context() && is_tracked(&inputs.context))
                    || (part.reads_time() && is_tracked(&inputs.time)),
            });
            for seen in &mut pass.attention[n_seen..] {
                seen.probabilities = seen.probabilities.detach();
                seen.self_attention = seen.self_attention.as_ref().map(Tensor::detach);
            }
            uses.push(Use {
                x,
                skip,
                target,
                n_seen: pass.attention.len() - n_seen,
            });
            Ok(planes.len() - 1)
        },
    )?;
    let last = planes.pop().map(|plane| plane.value);
    let prediction = last.unwrap_or_else(|| inputs.latents.leaf.clone());
    let outputs = Outputs::new(&prediction, pass.attention)?;
    let again = Again {
        watch: OwnedWatch::of(watch),
        parts,
        uses,
        planes,
    };
    Ok((outputs, Way::Again(again)))
}

impl Backward<'_> {
    /// Gradients of a loss that was computed from what the pass gave, with respect to `variables`; none for those that it
    /// does not depend on. The record ends here.
    ///
    /// # Errors
    /// [`crate::Error::Tensor`] when the tensor library fails.
    pub fn gradients(self, loss: &Tensor, variables: &[&Tensor]) -> Result<Vec<Option<Tensor>>> {
        let mut of_loss = on_workers(loss.device(), || loss.backward())?;
        let of_outputs = self.outputs.gradients(&mut of_loss);
        let mut wanted = Wanted::new(variables);
        wanted.take(of_loss)?;
        let (unet, inputs) = (self.unet, self.inputs);
        let device = inputs.latents.leaf.device().clone();
        let mut gradients = Gradients::default();
        match self.way {
            Way::OnRecord { tape, results } => unet.compute(&device, || {
                results.give(of_outputs, &mut gradients)?;
                Ok::<_, crate::Error>(tape.into_gradients(&mut gradients)?)
            })?,
            Way::Again(again) => again.gradients(unet, &inputs, of_outputs, &mut gradients)?,
        }
        wanted.take_recorded(&mut gradients)?;
        let mut pulls = Pulls::default();
        for input in [inputs.context, inputs.time, inputs.latents] {
            pulls.pull(&input.source, gradients.take(&input.leaf))?;
        }
        if let Some(found) = pulls.gradients()? {
            wanted.take(found)?;
        }
        Ok(wanted.gradients)
    }
}

impl Outputs {
    fn gradients(self, of_loss: &mut GradStore) -> Seen {
        let mut of = |tensor: &Tensor| of_loss.remove(tensor);
        Seen {
            prediction: of(&self.prediction),
            attention: self
                .attention
                .iter()
                .map(|seen| {
                    let of_probabilities = of(&seen.probabilities);
                    [
                        of_probabilities,
                        seen.self_attention.as_ref().and_then(&mut of),
                    ]
                })
                .collect(),
        }
    }
}

impl Again<'_> {
    fn gradients(
        mut self,
        unet: &UNet,
        inputs: &Inputs,
        mut of_outputs: Seen,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let device = inputs.latents.leaf.device();
        let mut of_plane = of_outputs.prediction.take();
        while let (Some(part), Some(used)) = (self.parts.pop(), self.uses.pop()) {
            let first = of_outputs.attention.len() - used.n_seen;
            let of_part = Seen {
                prediction: of_plane.take(),
                attention: of_outputs.attention.split_off(first),
            };
            unet.compute(device, || {
                self.gradients_of_part(part, &used, inputs, of_part, gradients)
            })?;
            // What the part read is what the one before it gave; the latents are nobody's.
            if let Some(plane) = self.planes.pop().filter(|_| !self.parts.is_empty()) {
                of_plane = gradients.take(&plane.value);
            }
        }
        Ok(())
    }

    /// Computes a part again, and adds to the gradients of what it read.
    fn gradients_of_part(
        &self,
        part: Part<'_>,
        used: &Use,
        inputs: &Inputs,
        of_part: Seen,
        gradients: &mut Gradients,
    ) -> Result<()> {
        let mut of_seen = of_part.attention.iter().flatten();
        if of_part.prediction.is_none() && of_seen.all(Option::is_none) {
            return Ok(());
        }
        let x = &self.planes[used.x];
        let skip = used.skip.map(|skip| &self.planes[skip]);
        let planes = [Some(x), skip].into_iter().flatten();
        let tracked = planes.filter(|plane| plane.is_tracked);
        let leaves = tracked.map(|plane| plane.value.id()).chain(inputs.leaves());
        let mut pass = Pass {
            context: &inputs.context.leaf,
            watch: self.watch.get(),
            attention: Vec::new(),
        };
        let (tape, y) = Tape::record(leaves, || {
            let read = Planes {
                x: &x.value,
                skip: skip.map(|skip| &skip.value),
                target: used.target,
            };
            part.forward(read, &inputs.time.leaf, &mut pass)
        });
        let results = Seen {
            prediction: Some(y?),
            attention: seen(&pass.attention),
        };
        drop(pass);
        results.give(of_part, gradients)?;
        Ok(tape.into_gradients(gradients)?)
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
        self.add(|variable| found.remove(variable))
    }

    fn take_recorded(&mut self, found: &mut Gradients) -> Result<()> {
        self.add(|variable| found.take(variable))
    }

    fn add(&mut self, mut found: impl FnMut(&Tensor) -> Option<Tensor>) -> Result<()> {
        for (variable, sum) in self.variables.iter().zip(&mut self.gradients) {
            let Some(gradient) = found(variable) else {
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

/// Tensors, each with the gradient that reaches it from elsewhere.
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
