//! Parameters that several nodes share, and what they mean to the method. Defaults are the recommended configuration.

use personalization::{
    Binarization, CrfStage, EmConfig, ExtractionConfig, Guard, JointConfig, JointScope,
    LayerChoice, MStepConfig, Normalization, TokenConfig, TokenInit,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// How tokens start and learn.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct TokenParameters {
    /// Learning rate of the tokens.
    #[serde(default = "learning_rate")]
    #[schemars(range(min = 1e-7, max = 1.0), extend("x-step" = 0.0001))]
    learning_rate: f64,
    /// Weight of the cross-attention loss.
    #[serde(default = "lambda")]
    #[schemars(range(min = 0.0, max = 10.0), extend("x-step" = 0.01))]
    attention_weight: f64,
    /// How a new token starts.
    #[serde(default = "class")]
    start: Start,
    /// Steps of textual inversion, if it starts with that.
    #[serde(default = "four_hundred")]
    #[schemars(range(min = 1, max = 100_000))]
    inversion_steps: usize,
    /// Rows of the token table per concept.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 16))]
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
            init_noise: 0.0,
        }
    }

    /// How they learn.
    pub(crate) fn m_step(&self) -> MStepConfig {
        MStepConfig {
            learning_rate: self.learning_rate,
            lambda_attention: self.attention_weight,
            ..MStepConfig::break_a_scene()
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

/// How attention becomes masks.
#[derive(Debug, Deserialize, JsonSchema)]
pub(crate) struct ExtractionParameters {
    /// How attention becomes masks.
    #[serde(default = "compete")]
    extraction: Extraction,
    /// Threshold on the normalized attention.
    #[serde(default = "tau")]
    #[schemars(range(min = 0.01, max = 0.99), extend("x-step" = 0.05))]
    threshold: f64,
}

/// How attention becomes masks.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Extraction {
    /// Tokens compete for pixels; layers of 16×16, min-max (recommended).
    Compete,
    /// Every token for itself; all layers, divided by the maximum (the paper, read literally).
    Paper,
    /// Every token for itself with Otsu's threshold.
    Otsu,
}

impl ExtractionParameters {
    /// The configuration, with as many timesteps in the first estimate as in every later one.
    pub(crate) fn config(&self, n_timesteps: usize) -> ExtractionConfig {
        let tau = self.threshold as f32;
        let base = match self.extraction {
            Extraction::Compete => EmConfig::recommended().extraction,
            Extraction::Paper | Extraction::Otsu => EmConfig::paper().extraction,
        };
        let binarization = match (self.extraction, base.binarization) {
            (Extraction::Compete, Binarization::Compete { parts, .. }) => {
                Binarization::Compete { tau, parts }
            }
            (Extraction::Compete, other) => other,
            (Extraction::Paper, _) => Binarization::Threshold { tau },
            (Extraction::Otsu, _) => Binarization::Otsu,
        };
        let (layers, normalization) = match self.extraction {
            Extraction::Compete => (LayerChoice::AboveBottleneck, Normalization::MinMax),
            Extraction::Paper => (LayerChoice::All, Normalization::Max),
            Extraction::Otsu => (LayerChoice::All, Normalization::MinMax),
        };
        ExtractionConfig {
            n_timesteps_initial: n_timesteps,
            n_timesteps,
            layers,
            normalization,
            binarization,
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
    let base = EmConfig::recommended().crf;
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

pub(crate) fn concepts() -> String {
    "<rex> dog\n<vw> car\n<table> table (background)".to_owned()
}
fn learning_rate() -> f64 {
    5e-4
}
fn lambda() -> f64 {
    0.01
}
fn compete() -> Extraction {
    Extraction::Compete
}
fn tau() -> f64 {
    0.4
}
fn class() -> Start {
    Start::Class
}
fn one() -> usize {
    1
}
pub(crate) fn hundred() -> usize {
    100
}
pub(crate) fn fifty() -> usize {
    50
}
pub(crate) fn twenty() -> usize {
    20
}
pub(crate) fn four_hundred() -> usize {
    400
}
pub(crate) fn crf_iterations() -> usize {
    10
}
