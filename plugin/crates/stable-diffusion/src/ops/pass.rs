//! A whole pass as one operation of the graph that it is a part of.

use candle_core::{Result as TensorResult, Tensor};

use super::{
    function::{self, Function, Reads},
    tape::{Gradients, Tape},
};
use crate::Result;

/// What `work` makes of x, which alone has a gradient: it is recorded ([`Tape`]).
///
/// # Errors
/// What `work` returns, or [`crate::Error::Tensor`] when the tensor library fails.
pub(crate) fn as_one(x: &Tensor, work: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if !x.track_op() {
        return work(x);
    }
    let leaf = x.detach();
    let (tape, y) = Tape::record([leaf.id()], || work(&leaf));
    let recorded = Recorded {
        tape,
        leaf,
        result: y?,
    };
    Ok(function::apply(Pass(recorded), &[x])?)
}

struct Recorded {
    tape: Tape,
    leaf: Tensor,
    result: Tensor,
}

struct Pass(Recorded);

impl Function for Pass {
    const NAME: &'static str = "pass";

    fn forward(&self, _: &[Tensor]) -> TensorResult<Tensor> {
        self.0.result.detach().copy()
    }

    fn backward(
        &self,
        _: &[Tensor],
        _: &Tensor,
        dy: &Tensor,
        _: &[bool],
    ) -> TensorResult<Vec<Option<Tensor>>> {
        let Recorded { tape, leaf, result } = &self.0;
        let mut gradients = Gradients::default();
        gradients.add(result, dy.clone())?;
        tape.gradients(&mut gradients)?;
        Ok(vec![gradients.take(leaf)])
    }

    fn reads(&self, _: usize, _: &[bool]) -> Reads {
        Reads::Shape
    }

    fn passes_on(&self) -> bool {
        true
    }
}
