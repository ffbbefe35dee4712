//! Parameters that several nodes share, and what they mean to the method. Defaults are the recommended configuration.

use personalization::m_step::{INVERSION, TOKENS};
use personalization::{
    CrfStage, EmConfig, ExtractionConfig, Guard, JointConfig, JointScope, Labeling, MStepConfig,
    Pooling, PosteriorConfig, TokenConfig, TokenInit, joint,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// How tokens start and learn.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct TokenParameters {
    /// Learning rate of the tokens.
    #[serde(default = "learning_rate")]
    #[schemars(
        range(min = MStepConfig::LEARNING_RATE.least, max = MStepConfig::LEARNING_RATE.most),
        extend("x-step" = 0.0001)
    )]
    learning_rate: f64,
    /// Weight of the cross-attention loss.
    #[serde(default = "lambda")]
    #[schemars(
        range(min = MStepConfig::LAMBDA.least, max = MStepConfig::LAMBDA.most),
        extend("x-step" = 0.01)
    )]
    attention_weight: f64,
    /// How a new token starts.
    #[serde(default = "class")]
    start: Start,
    /// Steps of textual inversion, if it starts with that.
    #[serde(default = "steps")]
    #[schemars(range(
        min = TokenConfig::INVERSION_STEPS.least,
        max = TokenConfig::INVERSION_STEPS.most
    ))]
    inversion_steps: usize,
    /// Rows of the token table per concept.
    #[serde(default = "vectors")]
    #[schemars(range(min = TokenConfig::VECTORS.least, max = TokenConfig::VECTORS.most))]
    vectors_per_concept: usize,
}

impl TokenParameters {
    /// How tokens start.
    pub(crate) fn start(&self) -> TokenConfig {
        let init = match self.start {
            Start::Class => TokenInit::Class,
            Start::Random => TokenInit::Random,
            Start::Inversion => TokenInit::Inversion {
                steps: self.inversion_steps,
            },
        };
        TokenConfig {
            init,
            vectors_per_concept: self.vectors_per_concept,
        }
    }

    /// The stages of learning with so many steps under masks and, maybe, of the joint stage.
    pub(crate) fn stages(&self, steps: usize, joint_steps: usize) -> Vec<(&'static str, usize)> {
        let inversion_steps = match self.start {
            Start::Inversion => self.inversion_steps,
            Start::Class | Start::Random => 0,
        };
        vec![
            (INVERSION, inversion_steps),
            (TOKENS, steps),
            (joint::STAGE, joint_steps),
        ]
    }

    /// How they learn.
    pub(crate) fn m_step(&self) -> MStepConfig {
        MStepConfig {
            learning_rate: self.learning_rate,
            lambda_attention: self.attention_weight,
            ..RECOMMENDED.m_step
        }
    }
}

/// How a token starts.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Start {
    /// As its class word.
    Class,
    /// At random, like a row of the vocabulary.
    Random,
    /// As its class word, then textual inversion without masks.
    Inversion,
}

/// How observations become masks.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ExtractionParameters {
    /// How observations become masks.
    #[serde(default = "likelihood")]
    extraction: Extraction,
    /// Threshold on the normalized attention of `attention` and `paper`; 0 stands for that of the choice above.
    #[serde(default)]
    #[schemars(
        range(min = 0.0, max = ExtractionConfig::TAU.most),
        extend("x-step" = 0.05)
    )]
    threshold: f64,
    /// Over what the evidence of `likelihood` is summed.
    #[serde(default = "parts")]
    regions: Regions,
}

/// How observations become masks.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Extraction {
    /// Attention says where things are, the error of the predicted noise says which is which (recommended).
    Likelihood,
    /// Tokens compete for pixels by attention alone.
    Attention,
    /// Every token for itself; all layers, divided by the maximum (the paper, read literally).
    Paper,
}

/// Over what evidence is summed.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Regions {
    /// Parts of the foreground by its shape or by the words' attention, whichever is more probable; every object owns
    /// one at least.
    Parts,
    /// Parts of the foreground by its shape.
    ForegroundParts,
    /// Every pixel for itself.
    Pixels,
}

impl ExtractionParameters {
    /// The configuration, with as many timesteps in the first estimate as in every later one.
    pub(crate) fn config(&self, n_timesteps: usize) -> ExtractionConfig {
        let base = match self.extraction {
            Extraction::Likelihood => RECOMMENDED.extraction,
            Extraction::Attention => EmConfig::attention().extraction,
            Extraction::Paper => EmConfig::paper().extraction,
        };
        let tau = |own: f32| match self.threshold {
            threshold if threshold > 0.0 => threshold as f32,
            _ => own,
        };
        let labeling = match base.labeling {
            Labeling::Threshold { tau: own } => Labeling::Threshold { tau: tau(own) },
            Labeling::Compete { tau: own } => Labeling::Compete { tau: tau(own) },
            Labeling::Posterior(posterior) => Labeling::Posterior(PosteriorConfig {
                pooling: match self.regions {
                    Regions::Parts => Pooling::BetterParts,
                    Regions::ForegroundParts => Pooling::Parts,
                    Regions::Pixels => Pooling::Pixels,
                },
                ..posterior
            }),
        };
        ExtractionConfig {
            n_timesteps_initial: n_timesteps,
            n_timesteps,
            labeling,
            ..base
        }
    }
}

/// What the joint stage trains.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Scope {
    /// Low-rank factors on the attention projections: a small file that other programs load.
    Lora,
    /// Keys and values of cross-attention.
    KeyValue,
    /// The whole U-Net (Break-A-Scene).
    Full,
}

impl Scope {
    pub(crate) fn config(
        self,
        steps: usize,
        learning_rate: f64,
        rank: usize,
    ) -> Option<JointConfig> {
        let scope = match self {
            Self::Lora => JointScope::Lora { rank },
            Self::KeyValue => JointScope::KeyValue,
            Self::Full => JointScope::Full,
        };
        (steps > 0).then_some(JointConfig {
            steps,
            learning_rate,
            token_learning_rate: learning_rate,
            scope,
        })
    }
}

/// The CRF with what a user may change; a guard of 0 refuses nothing.
pub(crate) fn crf(guard_iou: f64, iterations: usize) -> CrfStage {
    let base = RECOMMENDED.crf;
    let guard = if guard_iou > 0.0 {
        Guard::MinIou(guard_iou as f32)
    } else {
        Guard::None
    };
    let crf = densecrf::CrfConfig {
        iterations,
        ..base.crf
    };
    CrfStage { crf, guard, ..base }
}

/// The configuration that widgets start with.
pub(crate) const RECOMMENDED: EmConfig = EmConfig::likelihood();

/// Steps between two sample pictures: a picture takes about as long as ten steps.
const SAMPLE_EVERY: usize = 100;

pub(crate) fn concepts() -> String {
    "<rex> dog\n<vw> car\n<table> table (background)".to_owned()
}
fn learning_rate() -> f64 {
    RECOMMENDED.m_step.learning_rate
}
fn lambda() -> f64 {
    RECOMMENDED.m_step.lambda_attention
}
fn likelihood() -> Extraction {
    Extraction::Likelihood
}
fn parts() -> Regions {
    Regions::Parts
}
fn class() -> Start {
    Start::Class
}
fn vectors() -> usize {
    RECOMMENDED.tokens.vectors_per_concept
}
pub(crate) fn sample_every() -> usize {
    SAMPLE_EVERY
}
pub(crate) fn first_timesteps() -> usize {
    RECOMMENDED.extraction.n_timesteps_initial
}
pub(crate) fn timesteps() -> usize {
    RECOMMENDED.extraction.n_timesteps
}
pub(crate) fn steps_per_round() -> usize {
    RECOMMENDED.e_step_every
}
pub(crate) fn steps() -> usize {
    RECOMMENDED.steps
}
pub(crate) fn crf_iterations() -> usize {
    RECOMMENDED.crf.crf.iterations
}
