//! Every number, under the name of who chose it.
//!
//! Sources: **P** arXiv 2402.11487; **BaS** google/break-a-scene; **CutLER** facebookresearch/CutLER; **DM**
//! weijiawu/DiffuMask; **measured** by `examples/evaluate.rs` on the scenes of the bundled model.

use densecrf::CrfConfig;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::layers::LayerChoice;

/// How v_c starts (P Fig. 2).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenInit {
    /// The row of the class word; the mean of its pieces if it has several (piece k for vector k if V > 1).
    Class,
    /// Gaussian with the mean and deviation of the token table, per dimension.
    Random,
    /// From the class word, plain textual inversion without masks.
    Inversion {
        /// Optimizer steps; P gives no number.
        steps: usize,
    },
}

/// Tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TokenConfig {
    /// How they start.
    pub init: TokenInit,
    /// V, at least 1.
    pub vectors_per_concept: usize,
    /// Gaussian noise on the start, in units of the table's deviation; breaks the tie of equal class words.
    pub init_noise: f64,
}

/// The layers that the loss reads (BaS: 16×16 of the down and up blocks) and that the recommended E-step reads too
/// (measured).
const LAYERS: LayerChoice = LayerChoice::AboveBottleneck;

/// How maps of several layers become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Combination {
    /// Every layer up to picture size, then the plain mean (P, DAAM).
    Flat,
    /// The mean per resolution, each divided by its maximum, then the mean over resolutions (DM).
    PerResolution,
}

/// How a map is scaled before it is compared with a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// A / max A (BaS, DM).
    Max,
    /// (A - min A) / (max A - min A) (DAAM).
    MinMax,
}

/// How maps become masks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Binarization {
    /// B_c = \[A_c > τ\], every concept for itself (P; DM's thresholds are 0.35 to 0.55).
    Threshold {
        /// τ in (0, 1).
        tau: f32,
    },
    /// Otsu's threshold of every map.
    Otsu,
    /// Concepts compete for pixels: foreground is where any object's map exceeds τ; a foreground pixel belongs to
    /// the object whose map, scaled to unit sum, is largest there; the background concept is the rest.
    Compete {
        /// τ in (0, 1).
        tau: f32,
        /// Whether and when objects get connected parts of the foreground as a whole.
        parts: Option<PartMatching>,
    },
}

/// If the foreground falls into just as many connected parts as there are objects, pixels need not compete: every
/// object gets one part whole, by the matching with the largest mean share A_c / Σ A_c (ours: it separates words that
/// attend to the same places). Anything else, objects that touch or parts that are broken, leaves it to the pixels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PartMatching {
    /// Parts below this share of the picture's area are specks and do not count; in (0, 1).
    pub speck: f32,
    /// The smallest part has at least this share of the largest one's area, in \[0, 1\]: a fragment beside two objects
    /// that touch is no object.
    pub least_ratio: f32,
}

/// The E-step up to the binary masks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ExtractionConfig {
    /// Random timesteps for the first masks: 50 (P).
    pub n_timesteps_initial: usize,
    /// Random timesteps for every later E-step.
    pub n_timesteps: usize,
    /// Timesteps are drawn from this part of the schedule; P gives none, so all of it is \[0, 1).
    pub timestep_range: [f64; 2],
    /// Layers.
    pub layers: LayerChoice,
    /// Their combination.
    pub combination: Combination,
    /// Scaling.
    pub normalization: Normalization,
    /// Threshold.
    pub binarization: Binarization,
}

/// When a refined mask is refused.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Guard {
    /// Never.
    None,
    /// When its IoU with the unrefined mask is smaller (CutLER's `maskcut.py`: 0.5).
    MinIou(f32),
}

/// The dense CRF and what happens when it destroys a mask.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CrfStage {
    /// The constants.
    #[serde(serialize_with = "crf_constants")]
    pub crf: CrfConfig,
    /// Refusal of a collapsed mask.
    pub guard: Guard,
    /// A mask with a smaller share of the pixels is empty: 0.002.
    pub min_area: f64,
}

fn crf_constants<S: serde::Serializer>(
    crf: &CrfConfig,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{crf:?}"))
}

/// The M-step and its optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MStepConfig {
    /// 5e-4 (BaS `--initial_learning_rate`).
    pub learning_rate: f64,
    /// 1e-2 (BaS).
    pub weight_decay: f64,
    /// β₁, β₂: 0.9, 0.999 (BaS).
    pub betas: [f64; 2],
    /// 1e-8 (BaS).
    pub epsilon: f64,
    /// Largest norm of the whole gradient: 1 (BaS).
    pub max_gradient_norm: f64,
    /// λ: 0.01 (BaS `--lambda_attention`).
    pub lambda_attention: f64,
    /// Layers that the attention loss reads.
    pub layers: LayerChoice,
    /// Chance that picture and masks are mirrored: 0.5 (BaS `flip_p`).
    pub flip_probability: f64,
    /// Noise draws per step: 1 (BaS).
    pub batch: usize,
}

impl MStepConfig {
    /// Break-A-Scene's constants, which P names as its base.
    #[must_use]
    pub const fn break_a_scene() -> Self {
        Self {
            learning_rate: 5e-4,
            weight_decay: 1e-2,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            max_gradient_norm: 1.0,
            lambda_attention: 0.01,
            layers: LAYERS,
            flip_probability: 0.5,
            batch: 1,
        }
    }
}

/// What the joint stage trains beside the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JointScope {
    /// The whole U-Net (BaS).
    Full,
    /// Keys and values of cross-attention (Custom Diffusion).
    KeyValue,
    /// Low-rank factors on the attention projections.
    Lora {
        /// Rank, at least 1.
        rank: usize,
    },
}

/// The joint stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct JointConfig {
    /// 400 (BaS).
    pub steps: usize,
    /// Of the weights: 2e-6 (BaS).
    pub learning_rate: f64,
    /// Of the tokens: 2e-6 (BaS).
    pub token_learning_rate: f64,
    /// What is trained.
    pub scope: JointScope,
}

impl JointConfig {
    /// Break-A-Scene's second phase, with the text encoder frozen.
    #[must_use]
    pub const fn break_a_scene() -> Self {
        Self {
            steps: 400,
            learning_rate: 2e-6,
            token_learning_rate: 2e-6,
            scope: JointScope::Full,
        }
    }
}

/// Where masks come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskMode {
    /// First from the attention of the starting tokens, then re-estimated in every round (P).
    Em,
    /// From the attention of the starting tokens, never updated (P's baseline).
    Baseline,
    /// Brought by the user, never updated (Break-A-Scene).
    Given,
}

/// The whole method.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EmConfig {
    /// Stage 1a.
    pub tokens: TokenConfig,
    /// E-step.
    pub extraction: ExtractionConfig,
    /// E-step.
    pub crf: CrfStage,
    /// M-step.
    pub m_step: MStepConfig,
    /// M-steps in all: "usually 400" (P).
    pub steps: usize,
    /// M-steps between two E-steps.
    pub e_step_every: usize,
    /// Where masks come from.
    pub masks: MaskMode,
    /// Stage 3, if wanted.
    pub joint: Option<JointConfig>,
}

impl EmConfig {
    /// The paper, read literally; where it gives no number, the number of its base or of its sources.
    #[must_use]
    pub const fn paper() -> Self {
        Self {
            tokens: TokenConfig {
                init: TokenInit::Class,
                vectors_per_concept: 1,
                init_noise: 0.0,
            },
            extraction: ExtractionConfig {
                n_timesteps_initial: 50,
                n_timesteps: 50,
                timestep_range: [0.0, 1.0],
                layers: LayerChoice::All,
                combination: Combination::Flat,
                normalization: Normalization::Max,
                binarization: Binarization::Threshold { tau: 0.5 },
            },
            crf: CrfStage {
                crf: CrfConfig::cutler(),
                guard: Guard::None,
                min_area: 0.002,
            },
            m_step: MStepConfig::break_a_scene(),
            steps: 400,
            e_step_every: 50,
            masks: MaskMode::Em,
            joint: Some(JointConfig::break_a_scene()),
        }
    }

    /// The reading in which tokens compete for pixels, which is what makes the alternation improve masks (measured).
    #[must_use]
    pub const fn recommended() -> Self {
        let paper = Self::paper();
        Self {
            extraction: ExtractionConfig {
                n_timesteps: 20,
                layers: LAYERS,
                normalization: Normalization::MinMax,
                binarization: Binarization::Compete {
                    tau: 0.4,
                    parts: Some(PartMatching {
                        speck: 0.002,
                        least_ratio: 0.25,
                    }),
                },
                ..paper.extraction
            },
            e_step_every: 20,
            ..paper
        }
    }

    /// Checks every number.
    ///
    /// # Errors
    /// The first one out of range.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, what: &'static str, value: String, range: &'static str| {
            if ok {
                Ok(())
            } else {
                Err(Error::Config { what, value, range })
            }
        };
        let positive = |value: f64| value.is_finite() && value > 0.0;
        let tau = match self.extraction.binarization {
            Binarization::Threshold { tau } | Binarization::Compete { tau, .. } => tau,
            Binarization::Otsu => 0.5,
        };
        let [lo, hi] = self.extraction.timestep_range;
        let m = &self.m_step;
        self.crf.crf.validate()?;
        check(
            tau > 0.0 && tau < 1.0,
            "the threshold",
            tau.to_string(),
            "it lies between 0 and 1",
        )?;
        check(
            (0.0..1.0).contains(&lo) && hi > lo && hi <= 1.0,
            "the timestep range",
            format!("{lo}..{hi}"),
            "it is a part of 0..1",
        )?;
        for n in [
            self.extraction.n_timesteps,
            self.extraction.n_timesteps_initial,
        ] {
            check(
                n >= 1,
                "the number of timesteps",
                n.to_string(),
                "at least 1 is needed",
            )?;
        }
        let vectors = self.tokens.vectors_per_concept;
        check(
            (1..=16).contains(&vectors),
            "vectors per concept",
            vectors.to_string(),
            "1 to 16 are possible",
        )?;
        check(
            self.e_step_every >= 1,
            "the steps per round",
            self.e_step_every.to_string(),
            "at least 1 is needed",
        )?;
        check(
            positive(m.learning_rate),
            "the learning rate",
            m.learning_rate.to_string(),
            "it is above 0",
        )?;
        check(
            m.lambda_attention >= 0.0,
            "lambda",
            m.lambda_attention.to_string(),
            "it is at least 0",
        )?;
        check(
            m.batch >= 1,
            "the batch size",
            m.batch.to_string(),
            "at least 1 is needed",
        )?;
        let Some(joint) = self.joint else {
            return Ok(());
        };
        let rate = joint.learning_rate;
        check(
            positive(rate),
            "the joint learning rate",
            rate.to_string(),
            "it is above 0",
        )?;
        let rank = if let JointScope::Lora { rank } = joint.scope {
            rank
        } else {
            1
        };
        check(
            rank >= 1,
            "the LoRA rank",
            rank.to_string(),
            "at least 1 is needed",
        )
    }
}
