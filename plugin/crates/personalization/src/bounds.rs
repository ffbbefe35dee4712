//! What every number of a configuration can be: written beside its field, read by the check before a run and by
//! whoever offers the number to a user.

use std::fmt::Display;

use crate::config::{
    CrfStage, EmConfig, ExtractionConfig, Guard, JointConfig, JointScope, Labeling, MStepConfig,
    PosteriorConfig, TokenConfig, TokenInit,
};
use crate::error::{Error, Result};
use crate::regions::RegionConfig;

/// The least and the largest value of a number, both possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds<T> {
    /// The least.
    pub least: T,
    /// The largest.
    pub most: T,
}

impl<T> Bounds<T> {
    /// From the least to the largest.
    pub const fn new(least: T, most: T) -> Self {
        Self { least, most }
    }
}

impl<T: PartialOrd + Display> Bounds<T> {
    /// A value in between; NaN is not.
    ///
    /// # Errors
    /// [`Error::Config`] with the name.
    pub fn check(&self, what: &'static str, value: T) -> Result<()> {
        if value >= self.least && value <= self.most {
            return Ok(());
        }
        Err(Error::Config {
            what,
            value: value.to_string(),
            least: self.least.to_string(),
            most: self.most.to_string(),
        })
    }
}

impl Bounds<f64> {
    /// [`Bounds::check`] of a number that is kept as `f32`: the bounds are rounded as it was.
    ///
    /// # Errors
    /// As [`Bounds::check`].
    pub fn check_f32(&self, what: &'static str, value: f32) -> Result<()> {
        Bounds::new(self.least as f32, self.most as f32).check(what, value)
    }
}

/// Shares of the picture's area.
const SHARE: Bounds<f64> = Bounds::new(0.0, 1.0);

impl TokenConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        Self::VECTORS.check(
            "the number of vectors per concept",
            self.vectors_per_concept,
        )?;
        match self.init {
            TokenInit::Class | TokenInit::Random => Ok(()),
            TokenInit::Inversion { steps } => {
                Self::INVERSION_STEPS.check("the number of inversion steps", steps)
            }
        }
    }
}

impl ExtractionConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        let timesteps = "the number of timesteps";
        Self::TIMESTEPS.check(timesteps, self.n_timesteps_initial)?;
        Self::TIMESTEPS.check(timesteps, self.n_timesteps)?;
        let [start, end] = self.timestep_range;
        SHARE.check("the start of the timestep range", start)?;
        Bounds::new(start, 1.0).check("the end of the timestep range", end)?;
        match self.labeling {
            Labeling::Threshold { tau } | Labeling::Compete { tau } => {
                Self::TAU.check_f32("the threshold", tau)
            }
            Labeling::Posterior(posterior) => posterior.validate(),
        }
    }
}

impl PosteriorConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        Self::BLUR.check_f32("the blur of the likelihoods", self.blur)?;
        Self::KEEP.check("what is kept of earlier rounds", self.keep)?;
        Self::CORRELATION.check("the correlation of draws", self.correlation)?;
        Self::MISFIT.check("the misfit of the model", self.misfit)?;
        Self::PART_PRICE.check("the price of a part", self.part_price)?;
        self.regions.validate()
    }
}

impl RegionConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        Self::SHARE.check_f32("the floor of the foreground", self.floor)?;
        Self::SHARE.check_f32("the peak of a part", self.peak)?;
        for prominence in self.prominence {
            Self::SHARE.check_f32("the prominence of a part", prominence)?;
        }
        Self::SHARE.check_f32("the rim of a part", self.rim)?;
        Self::SOFTNESS.check_f32("the softness of a part's rim", self.softness)?;
        Self::SHARE.check("the least area of a part", self.speck)
    }
}

impl CrfStage {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        // A weight of 0 switches a kernel off, which the widgets do not offer.
        self.crf.validate()?;
        Self::ITERATIONS.check("the number of CRF iterations", self.crf.iterations)?;
        Self::MIN_AREA.check("the least area of a mask", self.min_area)?;
        match self.guard {
            Guard::None => Ok(()),
            Guard::MinIou(iou) => Self::GUARD_IOU.check_f32("the guard's IoU", iou),
        }
    }
}

impl MStepConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        Self::LEARNING_RATE.check("the learning rate", self.learning_rate)?;
        Self::WEIGHT_DECAY.check("the weight decay", self.weight_decay)?;
        for beta in self.betas {
            Self::BETA.check("a beta of the optimizer", beta)?;
        }
        Self::EPSILON.check("epsilon of the optimizer", self.epsilon)?;
        Self::GRADIENT_NORM.check("the largest gradient norm", self.max_gradient_norm)?;
        Self::LAMBDA.check("lambda", self.lambda_attention)?;
        Self::FLIP.check("the chance of a mirror image", self.flip_probability)?;
        Self::BATCH.check("the batch size", self.batch)
    }
}

impl JointConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        Self::STEPS.check("the number of joint steps", self.steps)?;
        Self::LEARNING_RATE.check("the joint learning rate", self.learning_rate)?;
        let of_tokens = "the tokens' joint learning rate";
        Self::LEARNING_RATE.check(of_tokens, self.token_learning_rate)?;
        match self.scope {
            JointScope::Full | JointScope::KeyValue => Ok(()),
            JointScope::Lora { rank } => Self::RANK.check("the LoRA rank", rank),
        }
    }
}

impl EmConfig {
    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        self.tokens.validate()?;
        self.extraction.validate()?;
        self.crf.validate()?;
        self.m_step.validate()?;
        Self::STEPS.check("the number of steps", self.steps)?;
        Self::STEPS_PER_ROUND.check("the number of steps per round", self.e_step_every)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_named_configurations_are_in_range() {
        EmConfig::paper().validate().unwrap();
        EmConfig::likelihood().validate().unwrap();
        JointConfig::break_a_scene().validate().unwrap();
        JointConfig::lora().validate().unwrap();
    }

    #[test]
    fn a_number_out_of_range_is_named() {
        let change = |f: &dyn Fn(&mut EmConfig)| {
            let mut config = EmConfig::likelihood();
            f(&mut config);
            config.validate().unwrap_err().to_string()
        };
        let errors = [
            change(&|c| c.tokens.vectors_per_concept = 0),
            change(&|c| c.tokens.init = TokenInit::Inversion { steps: 0 }),
            change(&|c| c.extraction.n_timesteps = 0),
            change(&|c| c.extraction.timestep_range = [0.5, 0.2]),
            change(&|c| c.extraction.labeling = Labeling::Threshold { tau: f32::NAN }),
            change(&|c| c.crf.guard = Guard::MinIou(1.5)),
            change(&|c| c.crf.min_area = -0.1),
            change(&|c| c.crf.crf.iterations = 0),
            change(&|c| c.m_step.learning_rate = f64::INFINITY),
            change(&|c| c.m_step.betas = [0.9, 1.0]),
            change(&|c| c.m_step.weight_decay = -1.0),
            change(&|c| c.m_step.epsilon = 0.0),
            change(&|c| c.m_step.max_gradient_norm = 0.0),
            change(&|c| c.m_step.flip_probability = 2.0),
            change(&|c| c.m_step.batch = 0),
            change(&|c| c.e_step_every = 0),
        ];
        assert_eq!(
            errors[9],
            "a beta of the optimizer is 1; 0 to 0.999999 is possible"
        );
        assert!(errors.iter().all(|error| error.contains("is possible")));
    }
}
