//! Parts of the alternation, in it or by themselves.

use std::ops::ControlFlow;

use crate::checkpoint::Checkpoint;
use crate::observer::{Event, Observer};
use crate::state::EmMoment;

/// Hears the parts of the alternation: their steps are steps of the whole stage, their states parts of its state.
pub(crate) struct Within<'a> {
    pub(crate) inner: &'a mut dyn Observer,
    /// Before the part.
    pub(crate) moment: EmMoment<'a>,
    /// Steps before the part, and steps of the stage, where they are counted together.
    pub(crate) steps: Option<(usize, usize)>,
}

impl Observer for Within<'_> {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        let moment = self.moment;
        let now = |moment| Event::Checkpoint(Checkpoint::Alternation(moment));
        match (*event, self.steps) {
            (
                Event::Step {
                    stage,
                    step,
                    masked_diffusion,
                    cross_attention,
                    ..
                },
                Some((before, total)),
            ) => self.inner.on_event(&Event::Step {
                stage,
                step: before + step,
                total,
                masked_diffusion,
                cross_attention,
            }),
            (Event::Checkpoint(Checkpoint::Tokens(learned)), _) => {
                self.inner.on_event(&now(EmMoment { learned, ..moment }))
            }
            (Event::Checkpoint(Checkpoint::Looking(looking)), _) => {
                let looking = Some(looking);
                self.inner.on_event(&now(EmMoment { looking, ..moment }))
            }
            _ => self.inner.on_event(event),
        }
    }
}
