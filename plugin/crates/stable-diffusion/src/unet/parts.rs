//! The network as a list of parts, each of which makes one plane of one or two: what a pass goes through, and what can be
//! computed again by itself.

use candle_core::Tensor;

use super::{
    blocks::{Looking, Residual},
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
    /// It does not look at the context.
    Blind(Blind<'a>),
    /// It does.
    Looking(Looking<'a>),
}

/// What needs no context.
#[derive(Debug, Clone, Copy)]
pub(super) enum Blind<'a> {
    /// The first plane, or one of half the size.
    Conv(&'a Conv3x3),
    /// A residual block of a level without transformers.
    Residual(&'a Residual),
    /// A plane of the size of the one that waits.
    Enlarge(&'a Conv3x3),
    /// The prediction.
    Out(&'a GroupNorm, &'a Conv3x3),
}

impl Blind<'_> {
    /// Height and width to which [`Blind::Enlarge`] enlarges are `target`, or twice those of x.
    pub(super) fn forward(
        self,
        x: &Tensor,
        target: Option<[usize; 2]>,
        time: &Tensor,
    ) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward(x),
            Self::Residual(residual) => residual.forward(x, time),
            Self::Enlarge(conv) => {
                let [height, width] = match target {
                    Some(target) => target,
                    None => [2 * x.dim(2)?, 2 * x.dim(3)?],
                };
                conv.forward(&ops::upsample_nearest(x, height, width)?)
            }
            Self::Out(norm, conv) => conv.forward(&norm.forward_silu(x)?),
        }
    }
}

/// The planes that a part works on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planes<'a> {
    /// `[B, C, h, w]`
    pub(super) x: &'a Tensor,
    /// What it sees beside it.
    pub(super) skip: Option<&'a Tensor>,
    /// Height and width to which [`Blind::Enlarge`] enlarges; twice those of x where nothing waits.
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
        matches!(self.work, Work::Looking(_))
    }

    /// Whether it is told the time.
    pub(super) fn reads_time(&self) -> bool {
        matches!(
            self.work,
            Work::Looking(_) | Work::Blind(Blind::Residual(_))
        )
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
            Work::Blind(work) => work.forward(x, planes.target, time),
            Work::Looking(work) => work.finish(work.begin(x, time, pass.watch)?, time, pass),
        }
    }
}

/// Where a pass is.
#[derive(Debug, Clone)]
pub(super) struct Trail<P> {
    /// The plane of the part before.
    pub(super) x: P,
    /// Planes that wait for the way up; the last is wanted next.
    pub(super) waiting: Vec<P>,
}

impl<P: Clone> Trail<P> {
    pub(super) fn new(first: P) -> Self {
        Self {
            x: first,
            waiting: Vec::new(),
        }
    }

    /// Behind the part that made x.
    pub(super) fn after(mut self, part: &Part<'_>) -> Self {
        if part.leaves_skip {
            self.waiting.push(self.x.clone());
        }
        self
    }
}

/// Goes through `parts`. `run` makes a part's plane of its own, the one that it takes, and the one that waits for whoever is
/// next.
pub(super) fn through<P: Clone>(
    parts: &[Part<'_>],
    from: Trail<P>,
    mut run: impl FnMut(&Part<'_>, &P, Option<&P>, Option<&P>) -> Result<P>,
) -> Result<Trail<P>> {
    let mut trail = from;
    for part in parts {
        let skip = part.takes_skip.then(|| trail.waiting.pop()).flatten();
        trail.x = run(part, &trail.x, skip.as_ref(), trail.waiting.last())?;
        trail = trail.after(part);
    }
    Ok(trail)
}

/// [`through`] with planes at hand.
pub(super) fn walked(
    parts: &[Part<'_>],
    from: Trail<Tensor>,
    time: &Tensor,
    pass: &mut Pass<'_>,
) -> Result<Trail<Tensor>> {
    through(parts, from, |part, x, skip, next| {
        let target = next.map(size).transpose()?;
        part.forward(Planes { x, skip, target }, time, pass)
    })
}

/// Height and width of a plane `[B, C, h, w]`.
pub(super) fn size(plane: &Tensor) -> Result<[usize; 2]> {
    let (_, _, height, width) = plane.dims4()?;
    Ok([height, width])
}
