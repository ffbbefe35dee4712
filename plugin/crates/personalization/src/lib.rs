//! Joint learning of concept tokens and latent masks: Rahman et al., *Visual Concept-driven Image Generation with
//! Text-to-Image Diffusion Model*, arXiv 2402.11487 (**P**), on top of Break-A-Scene, arXiv 2305.16311 (**BaS**).
//!
//! A picture shows several concepts, each with a class word. Learned are, for each concept c, a row v_c of the text
//! encoder's token table and a mask M_c of the picture, neither of which is given:
//!
//! | step | equation | function | node |
//! | --- | --- | --- | --- |
//! | 1a start the tokens | v_c := row of the class word | [`token::first_rows`], [`token_learning::learn_tokens`] | ConceptTokenLearner |
//! | 1b, E attention of every concept | A_c = mean of softmax(QKᵀ/√d) (P Eq. 2) | [`observation::observe`] | AttentionMaskExtractor |
//! | E likelihood of the noise | ℓ_c = Σ -e_c / 2σ_t² (P Eq. 3) | [`evidence::Evidence`] | AttentionMaskExtractor |
//! | E posterior | q_c ∝ attention · likelihood, part by part | [`posterior::posterior`] | AttentionMaskExtractor |
//! | 1b without words | parts of the self-attention | [`discover`] | AttentionMaskExtractor |
//! | E dense CRF | M_c = \[argmax Q = c\] | [`refine::refine`] | DenseCrfRefine |
//! | 2, M one optimizer step on v | L = L_mask (P Eq. 3) + λ L_attn (P Eq. 4) | [`m_step::m_step`] | ConceptTokenLearner |
//! | 2 alternate E and M | | [`em::em`] | EmLoop |
//! | 3 tokens and weights, masks fixed | the same losses | [`joint::joint_stage`] | EmLoop |
//! | sample | | [`sampler::sample`] | PersonalizedSampler |
//!
//! P says that masks are updated with Eq. 3, the diffusion loss. Taken at its word that makes the alternation an EM: a
//! pixel belongs to the concept under which the model predicts its noise best, with attention as the prior of where to
//! look and the CRF as the prior of smoothness. E-step and CRF lower one energy, per round reported:
//!
//! ```text
//! F(Q) = Σ_x Σ_c Q_x(c) (ln Q_x(c) - ln q_c(x)) - ln Z + pairwise disagreement of Q [`refine::Refined::energy`]
//! ```
//! Z is what q is normalized by: the likelihood of what was observed, relative to the mean over the concepts.
//!
//! Three named configurations: [`EmConfig::likelihood`], this one, the default; [`EmConfig::attention`], in which
//! tokens compete for pixels by attention alone; [`EmConfig::paper`], thresholds on attention.
//!
//! No ABI, no image files, no host: pixels and prompts in, tokens, masks and pixels out. The U-Net and the text
//! encoder are `stable_diffusion`'s, the CRF is `densecrf`'s.
//!
//! # Notation
//! | symbol | shape | meaning |
//! | --- | --- | --- |
//! | C, V, D | | concepts, vectors per concept, width of the text encoder |
//! | H, W | | size of a picture in pixels, [`Size`]: its own proportions, about the area that the model knows |
//! | h, w | | size of its latent |
//! | n | | cells of the attention layers that are read, [`LayerChoice`]: h / 4 · w / 4 in SD |
//! | v | `[C·V, D]` | learned rows |
//! | A_c | `[H, W]` ≥ 0 | attention map |
//! | B_c, M_c | `[H, W]` {0, 1} | thresholded and refined mask |

pub mod error;

pub mod bounds;
pub mod config;
pub mod layers;

pub mod maps;
pub mod mask;
pub mod prepared;
pub mod scene;
pub mod size;

pub mod learned;
pub mod optimizer;

pub mod joint_state;
pub mod state;

pub mod checkpoint;
pub mod observer;

pub mod evidence;

mod owners;
pub mod regions;

pub mod posterior;

pub mod discover;

pub mod binarize;
pub mod labels;
pub mod refine;

pub mod attention;
pub mod loss;
pub mod observation;

mod within;

pub mod e_step;
pub mod m_step;
pub mod token;
pub mod token_learning;

pub mod em;
pub mod joint;

pub mod concept_file;
pub mod sampler;

mod assignment;
pub mod metrics;
pub mod overlay;
pub mod picture_metrics;

pub use checkpoint::{Checkpoint, Keeper};
pub use config::{
    CrfStage, Cue, EmConfig, ExtractionConfig, Foreground, Guard, JointConfig, JointScope,
    Labeling, MStepConfig, MaskMode, Normalization, Pooling, PosteriorConfig, TokenConfig,
    TokenInit,
};
pub use e_step::{Earlier, Estimate, e_step};
pub use em::{EmOutcome, EmStart, RoundRecord, em};
pub use error::{Error, Result};
pub use evidence::{Affinity, Evidence, Observation};
pub use joint::joint_stage;
pub use joint_state::JointState;
pub use labels::{Labels, label};
pub use layers::LayerChoice;
pub use learned::LearnedConcepts;
pub use m_step::m_step;
pub use maps::AttentionMaps;
pub use mask::{ImageMasks, SceneMasks};
pub use observation::{Looked, Looking, observe};
pub use observer::{Event, Observer, Silent};
pub use posterior::{Posterior, posterior};
pub use prepared::{Encodings, PreparedScene};
pub use refine::{Refined, refine};
pub use regions::RegionConfig;
pub use sampler::{SamplePrompts, Sampled, Sampling, sample, sample_from};
pub use scene::{Concept, Picture, Role, Scene, ScenePicture};
pub use size::Size;
pub use state::{EmMoment, EmState};
pub use token::first_rows;
pub use token_learning::{TokenPlan, learn_tokens};
