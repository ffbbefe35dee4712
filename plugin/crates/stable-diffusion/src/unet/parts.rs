//! The network as a list of parts, each of which makes one plane of one or two: what a pass goes through, and what can be
//! computed again by itself.

use candle_core::Tensor;

use super::{
    blocks::{Middle, Step},
    observation::Pass,
};
use crate::{
    Result,
    layers::{Conv3x3, GroupNorm},
    ops,
};

/// A part, and what it does with the planes that wait for the way up.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) work: Work<'a>,
    /// It sees the last plane that waits beside its own.
    pub(super) takes_skip: bool,
    /// Its plane waits for the way up.
    pub(super) leaves_skip: bool,
}

/// What a part does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Work<'a> {
    /// The first plane, or one of half the size.
    Conv(&'a Conv3x3),
    /// A residual block, and a transformer if its level has them.
    Step(&'a Step),
    /// The coarsest level once more.
    Middle(&'a Middle),
    /// A plane of the size of the one that waits.
    Enlarge(&'a Conv3x3),
    /// The prediction.
    Out(&'a GroupNorm, &'a Conv3x3),
}

/// The planes that a part works on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes<'a> {
    /// `[B, C, h, w]`
    pub(super) x: &'a Tensor,
    /// What it sees beside it.
    pub(super) skip: Option<&'a Tensor>,
    /// Height and width to which [`Work::Enlarge`] enlarges; twice those of x where nothing waits.
    pub(super) target: Option<[usize; 2]>,
}

impl<'a> Part<'a> {
    pub(super) fn new(work: Work<'a>) -> Self {
        Self {
            work,
            takes_skip: false,
            leaves_skip: false,
        }
    }

    pub(super) fn taking_skip(self) -> Self {
        Self {
            takes_skip: true,
            ..self
        }
    }

    pub(super) fn leaving_skip(self) -> Self {
        Self {
            leaves_skip: true,
            ..self
        }
    }

    /// Whether it attends to the context.
    pub(super) fn reads_context(&self) -> bool {
        match self.work {
            Work::Step(step) => step.has_transformer(),
            Work::Middle(_) => true,
            Work::Conv(_) | Work::Enlarge(_) | Work::Out(..) => false,
        }
    }

    /// Whether it is told the time.
    pub(super) fn reads_time(&self) -> bool {
        matches!(self.work, Work::Step(_) | Work::Middle(_))
    }

    /// Its plane; what is watched in it is added to `pass`.
    pub(super) fn forward(
        &self,
        planes: Planes<'_>,
        time: &Tensor,
        pass: &mut Pass<'_>,
    ) -> Result<Tensor> {
        let joined = planes
            .skip
            .map(|skip| ops::join_channels(planes.x, skip))
            .transpose()?;
        let x = joined.as_ref().unwrap_or(planes.x);
        match self.work {
            Work::Conv(conv) => conv.forward(x),
            Work::Step(step) => step.forward(x, time, pass),
            Work::Middle(middle) => middle.forward(x, time, pass),
            Work::Enlarge(conv) => {
                let [height, width] = match planes.target {
                    Some(target) => target,
                    None => [2 * x.dim(2)?, 2 * x.dim(3)?],
                };
                conv.forward(&ops::upsample_nearest(x, height, width)?)
            }
            Work::Out(norm, conv) => conv.forward(&norm.forward_silu(x)?),
        }
    }
}

/// Goes through `parts` from the plane `first`. `run` makes a part's plane of its own, the one that it takes, and the one
/// that waits for whoever is next.
pub(super) fn through<P: Clone>(
    parts: &[Part<'_>],
    first: P,
    mut run: impl FnMut(&Part<'_>, &P, Option<&P>, Option<&P>) -> Result<P>,
) -> Result<P> {
    let mut x = first;
    let mut waiting: Vec<P> = Vec::new();
    for part in parts {
        let skip = if part.takes_skip { waiting.pop() } else { None };
        x = run(part, &x, skip.as_ref(), waiting.last())?;
        if part.leaves_skip {
            waiting.push(x.clone());
        }
    }
    Ok(x)
}

/// Height and width of a plane `[B, C, h, w]`.
pub(super) fn size(plane: &Tensor) -> Result<[usize; 2]> {
    let (_, _, height, width) = plane.dims4()?;
    Ok([height, width])
}
