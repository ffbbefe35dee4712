//! Parameters that several nodes share, and what they mean to the method. Defaults are the recommended configuration.

use personalization::{
    Binarization, CrfStage, EmConfig, ExtractionConfig, Guard, JointConfig, JointScope,
    LayerChoice, MStepConfig, Normalization, TokenConfig, TokenInit,
};
use schemars::JsonSchema;
use serde::Deserialize;

/// How attention becomes masks.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Extraction {
    /// Tokens compete for pixels; layers of 16×16, min-max (recommended).
    Compete,
    /// Every token for itself; all layers, divided by the maximum (the paper, read literally).
    Paper,
    /// Every token for itself with Otsu's threshold.
    Otsu,
}

impl Extraction {
    /// The configuration with this threshold.
    pub(crate) fn config(self, tau: f64, n_timesteps: usize) -> ExtractionConfig {
        let tau = tau as f32;
        let base = match self {
            Self::Compete => EmConfig::recommended().extraction,
            Self::Paper | Self::Otsu => EmConfig::paper().extraction,
        };
        let binarization = match (self, base.binarization) {
            (Self::Compete, Binarization::Compete { parts, .. }) => {
                Binarization::Compete { tau, parts }
            }
            (Self::Compete, other) => other,
            (Self::Paper, _) => Binarization::Threshold { tau },
            (Self::Otsu, _) => Binarization::Otsu,
        };
        let (layers, normalization) = match self {
            Self::Compete => (LayerChoice::NearestTo16, Normalization::MinMax),
            Self::Paper => (LayerChoice::All, Normalization::Max),
            Self::Otsu => (LayerChoice::All, Normalization::MinMax),
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

/// How a token starts.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Start {
    /// As its class word.
    Class,
    /// At random, like a row of the vocabulary.
    Random,
    /// As its class word, then textual inversion without masks.
    Inversion,
}

impl Start {
    pub(crate) fn config(self, inversion_steps: usize, vectors_per_concept: usize) -> TokenConfig {
        let init = match self {
            Self::Class => TokenInit::Class,
            Self::Random => TokenInit::Random,
            Self::Inversion => TokenInit::Inversion {
                steps: inversion_steps,
            },
        };
        TokenConfig {
            init,
            vectors_per_concept,
            init_noise: 0.0,
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

/// The M-step with what a user may change.
pub(crate) fn m_step(learning_rate: f64, lambda_attention: f64) -> MStepConfig {
    MStepConfig {
        learning_rate,
        lambda_attention,
        ..MStepConfig::break_a_scene()
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
pub(crate) fn learning_rate() -> f64 {
    5e-4
}
pub(crate) fn lambda() -> f64 {
    0.01
}
pub(crate) fn compete() -> Extraction {
    Extraction::Compete
}
pub(crate) fn tau() -> f64 {
    0.4
}
pub(crate) fn class() -> Start {
    Start::Class
}
pub(crate) fn one() -> usize {
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
