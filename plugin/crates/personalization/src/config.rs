//! Every number, under the name of who chose it.
//!
//! Sources: **P** arXiv 2402.11487; **BaS** google/break-a-scene; **CutLER** facebookresearch/CutLER; **DM**
//! weijiawu/DiffuMask; **measured** by the example `evaluate` on the scenes of the bundled model.

use densecrf::CrfConfig;
use serde::Serialize;

use crate::bounds::Bounds;
use crate::layers::LayerChoice;
use crate::regions::RegionConfig;

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
}

/// The layers that the loss reads (BaS: 16×16 of the down and up blocks) and that the recommended E-step reads too
/// (measured).
const LAYERS: LayerChoice = LayerChoice::AboveBottleneck;

impl TokenConfig {
    /// Steps of textual inversion.
    #[must_use]
    pub fn inversion_steps(&self) -> usize {
        match self.init {
            TokenInit::Inversion { steps } => steps,
            TokenInit::Class | TokenInit::Random => 0,
        }
    }

    /// Of V; 16 leaves room for four concepts in a prompt of 77 tokens.
    pub const VECTORS: Bounds<usize> = Bounds::new(1, 16);
    /// Of the steps of textual inversion.
    pub const INVERSION_STEPS: Bounds<usize> = Bounds::new(1, 100_000);
}

/// What the map of one timestep counts in the mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Weighting {
    /// The same (P).
    Uniform,
    /// √ᾱ_t, the picture's own part in the noisy latent: maps of late timesteps are diffuse.
    Signal,
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

/// How maps become labels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Labeling {
    /// B_c = \[A_c > τ\], every concept for itself (P; DM's thresholds are 0.35 to 0.55).
    Threshold {
        /// τ in (0, 1).
        tau: f32,
    },
    /// Concepts compete for pixels: foreground is where any object's map exceeds τ; a foreground pixel belongs to
    /// the object whose map, scaled to unit sum, is largest there; the background concept is the rest.
    Compete {
        /// τ in (0, 1).
        tau: f32,
    },
    /// The posterior of attention and noise (ours): see [`mod@crate::posterior`].
    Posterior(PosteriorConfig),
}

/// What says that there is something in front of the background.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Foreground {
    /// The background's map is low; objects' maps, where the picture has no background concept.
    BackgroundMap,
    /// An object's map is high.
    ObjectMaps,
    /// Cells do not look at the background: see [`crate::discover`]. Of tokens without words, whatever is configured.
    SelfAttention,
}

/// What says which object something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cue {
    /// Whose map is highest.
    Attention,
    /// Under whose prompt the noise is predicted best.
    Noise,
    /// Both: prior and likelihood.
    AttentionAndNoise,
}

/// Over what evidence is summed before it is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// Every pixel for itself, with blurred likelihoods.
    Pixels,
    /// Parts of the foreground, by its own shape and by the self-attention: see [`crate::regions`].
    Parts,
    /// Those, or the parts that the words' attention makes of the foreground: what is more probable.
    BetterParts,
}

/// The posterior of attention and noise.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PosteriorConfig {
    /// What is foreground.
    pub foreground: Foreground,
    /// What decides among the objects.
    pub cue: Cue,
    /// Over what.
    pub pooling: Pooling,
    /// Constants of the parts, and of the rim of the foreground.
    pub regions: RegionConfig,
    /// Standard deviation in latent cells of the blur of per-pixel likelihoods, at least 0.
    pub blur: f32,
    /// What is left of the sums of earlier rounds when one begins: 1 forgets nothing; in \[0, 1\].
    pub keep: f64,
    /// ρ: correlation of what two draws of one picture say, in \[0, 1\]; 0 takes them as independent.
    pub correlation: f64,
    /// σ_m²: variance that the model's own mistakes add to that of a draw's errors, of noise of variance 1, at least 0.
    /// Late timesteps, whose errors are tiny, would decide alone without it.
    pub misfit: f64,
    /// How much better one more part has to explain a picture, in nats per cell of its latent, at least 0.
    pub part_price: f64,
}

impl PosteriorConfig {
    /// Of the blur, in latent cells.
    pub const BLUR: Bounds<f64> = Bounds::new(0.0, 16.0);
    /// Of the part of the sums that is kept.
    pub const KEEP: Bounds<f64> = Bounds::new(0.0, 1.0);
    /// Of ρ.
    pub const CORRELATION: Bounds<f64> = Bounds::new(0.0, 1.0);
    /// Of σ_m².
    pub const MISFIT: Bounds<f64> = Bounds::new(0.0, 1e3);
    /// Of the price of a part, in nats per latent cell.
    pub const PART_PRICE: Bounds<f64> = Bounds::new(0.0, 1e3);

    /// Measured on the evaluation scenes and on hard ones that no table shows (`hard_scenes.py --per-kind 32`, from number
    /// 20 on).
    #[must_use]
    pub const fn likelihood() -> Self {
        Self {
            foreground: Foreground::BackgroundMap,
            cue: Cue::AttentionAndNoise,
            pooling: Pooling::BetterParts,
            regions: RegionConfig::measured(),
            blur: 1.0,
            keep: 1.0,
            correlation: 0.03,
            misfit: 0.05,
            part_price: 0.08,
        }
    }
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
    /// Weights of the timesteps.
    pub weighting: Weighting,
    /// Scaling.
    pub normalization: Normalization,
    /// From maps to labels.
    pub labeling: Labeling,
}

impl ExtractionConfig {
    /// Of the random timesteps of one E-step.
    pub const TIMESTEPS: Bounds<usize> = Bounds::new(1, 1000);
    /// Of τ.
    pub const TAU: Bounds<f64> = Bounds::new(0.01, 0.99);
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

impl CrfStage {
    /// Of the iterations of the mean field.
    pub const ITERATIONS: Bounds<usize> = Bounds::new(1, 100);
    /// Of the weight of either kernel.
    pub const WEIGHT: Bounds<f64> = Bounds::new(0.01, 100.0);
    /// Of the reach of either kernel, in pixels.
    pub const XY_STD: Bounds<f64> = Bounds::new(0.1, 1000.0);
    /// Of the difference of colors, in steps of 0 to 255.
    pub const RGB_STD: Bounds<f64> = Bounds::new(0.1, 255.0);
    /// Of the IoU that [`Guard::MinIou`] asks for.
    pub const GUARD_IOU: Bounds<f64> = Bounds::new(0.0, 1.0);
    /// Of the least area.
    pub const MIN_AREA: Bounds<f64> = Bounds::new(0.0, 1.0);
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
    /// Of the tokens' learning rate.
    pub const LEARNING_RATE: Bounds<f64> = Bounds::new(1e-7, 1.0);
    /// Of ω.
    pub const WEIGHT_DECAY: Bounds<f64> = Bounds::new(0.0, 1.0);
    /// Of β₁ and β₂: at 1 moments never leave 0.
    pub const BETA: Bounds<f64> = Bounds::new(0.0, 0.999_999);
    /// Of ε.
    pub const EPSILON: Bounds<f64> = Bounds::new(1e-12, 1.0);
    /// Of the largest norm of the gradient.
    pub const GRADIENT_NORM: Bounds<f64> = Bounds::new(1e-6, 1e6);
    /// Of λ.
    pub const LAMBDA: Bounds<f64> = Bounds::new(0.0, 10.0);
    /// Of the chance of a mirror image.
    pub const FLIP: Bounds<f64> = Bounds::new(0.0, 1.0);
    /// Of the noise draws per step.
    pub const BATCH: Bounds<usize> = Bounds::new(1, 64);

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
    /// Of the steps.
    pub const STEPS: Bounds<usize> = Bounds::new(0, 100_000);
    /// Of both learning rates.
    pub const LEARNING_RATE: Bounds<f64> = Bounds::new(1e-8, 1.0);
    /// Of the rank of LoRA factors.
    pub const RANK: Bounds<usize> = Bounds::new(1, 256);

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

    /// Low-rank factors instead of the whole U-Net: a small file that other programs load. Rate and rank are ours.
    #[must_use]
    pub const fn lora() -> Self {
        Self {
            learning_rate: 1e-4,
            token_learning_rate: 1e-4,
            scope: JointScope::Lora { rank: 8 },
            ..Self::break_a_scene()
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

/// Stages 1 and 2. Stage 3 has a configuration of its own, [`JointConfig`], as it is a function of its own.
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
    /// M-steps between two E-steps; P gives no number, so both configurations' are ours.
    pub e_step_every: usize,
    /// Where masks come from.
    pub masks: MaskMode,
}

impl EmConfig {
    /// Of the M-steps.
    pub const STEPS: Bounds<usize> = Bounds::new(0, 100_000);
    /// Of the M-steps between two E-steps.
    pub const STEPS_PER_ROUND: Bounds<usize> = Bounds::new(1, 100_000);

    /// The paper, read literally; where it gives no number, the number of its base or of its sources.
    #[must_use]
    pub const fn paper() -> Self {
        Self {
            tokens: TokenConfig {
                init: TokenInit::Class,
                vectors_per_concept: 1,
            },
            extraction: ExtractionConfig {
                n_timesteps_initial: 50,
                n_timesteps: 50,
                timestep_range: [0.0, 1.0],
                layers: LayerChoice::All,
                weighting: Weighting::Uniform,
                normalization: Normalization::Max,
                labeling: Labeling::Threshold { tau: 0.5 },
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
        }
    }

    /// Attention alone, in the reading in which tokens compete for pixels; without that the alternation does not
    /// improve masks (measured).
    #[must_use]
    pub const fn attention() -> Self {
        let paper = Self::paper();
        Self {
            extraction: ExtractionConfig {
                n_timesteps: 20,
                layers: LAYERS,
                normalization: Normalization::MinMax,
                labeling: Labeling::Compete { tau: 0.4 },
                ..paper.extraction
            },
            e_step_every: 20,
            ..paper
        }
    }

    /// The E-step by likelihood (ours, the default): attention says where things are, the noise says which is which.
    #[must_use]
    pub const fn likelihood() -> Self {
        let attention = Self::attention();
        Self {
            extraction: ExtractionConfig {
                n_timesteps_initial: 100,
                timestep_range: [0.02, 0.98],
                weighting: Weighting::Signal,
                labeling: Labeling::Posterior(PosteriorConfig::likelihood()),
                ..attention.extraction
            },
            ..attention
        }
    }
}
