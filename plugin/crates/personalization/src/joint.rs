//! Stage 3: tokens and weights together, masks fixed (P: "this avoids drift"; BaS phase 2).
//!
//! The base model is never written: the result is a model with weights of its own.

use std::sync::Arc;

use candle_core::{Tensor, Var};
use stable_diffusion::lora::{LoraAdapter, LoraFactors};
use stable_diffusion::weights::WeightMap;
use stable_diffusion::{DiffusionModel, UNet};

use crate::config::JointScope;
use crate::m_step::{Draw, LossContext, check_masks, gradients_of, step_event};
use crate::observer::tell;
use crate::optimizer::{AdamWState, clip_gradient_norm};
use crate::{
    ImageMasks, JointConfig, LearnedConcepts, MStepConfig, Observer, PreparedScene, Result,
};

/// Alpha of new LoRA factors is their rank: the product counts once.
fn alpha_of(rank: usize) -> f64 {
    rank as f64
}

/// Trains weights and tokens for `config.steps` steps with a new optimizer.
///
/// # Errors
/// Masks that do not fit, a loss that is no longer finite, or a stop.
pub fn joint_stage(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    masks: &[ImageMasks],
    learned: &LearnedConcepts,
    config: &JointConfig,
    m_step: &MStepConfig,
    observer: &mut dyn Observer,
) -> Result<(DiffusionModel, LearnedConcepts)> {
    check_masks(scene, masks)?;
    let tokenizer = learned.tokenizer(model)?;
    let trained = Trained::start(model, config, learned.seed)?;
    let rows = Var::from_tensor(&learned.rows)?;
    let variables: Vec<&Var> = trained
        .variables
        .iter()
        .map(|(_, var)| var)
        .chain([&rows])
        .collect();
    let mut rates = vec![config.learning_rate; variables.len()];
    rates[variables.len() - 1] = config.token_learning_rate;
    let values = || {
        variables
            .iter()
            .map(|var| var.as_detached_tensor())
            .collect::<Vec<Tensor>>()
    };
    let mut optimizer = AdamWState::zeros(&values())?;
    let unet = trained.unet.as_ref();
    for done in 1..=config.steps {
        let draw = Draw::new(model, scene, m_step, (learned.seed, "joint", done))?;
        let masks = Some(masks);
        let context = LossContext {
            model,
            unet,
            scene,
            masks,
            learned,
            tokenizer: &tokenizer,
            config: m_step,
        };
        let losses = context.losses(rows.as_tensor(), &draw)?;
        let gradients = gradients_of(&losses.total, &variables)?;
        let (gradients, _) = clip_gradient_norm(&gradients, m_step.max_gradient_norm)?;
        let moved;
        (moved, optimizer) = optimizer.step(&values(), &gradients, &rates, m_step)?;
        for (var, value) in variables.iter().zip(&moved) {
            var.set(value)?;
        }
        tell(observer, &step_event("joint", done, config.steps, &losses))?;
    }
    let rows = rows.as_detached_tensor().copy()?;
    Ok((
        trained.finish(model)?,
        LearnedConcepts {
            rows,
            ..learned.clone()
        },
    ))
}

/// A U-Net some of whose weights are variables.
struct Trained {
    unet: Arc<UNet>,
    lora: Option<LoraAdapter>,
    variables: Vec<(String, Var)>,
}

impl Trained {
    fn start(model: &DiffusionModel, config: &JointConfig, seed: u64) -> Result<Self> {
        let base = &model.unet;
        if let JointScope::Lora { rank } = config.scope {
            let lora = LoraAdapter::new(base, rank, alpha_of(rank), seed)?;
            let variables = lora.variables();
            let unet = UNet::new(base.config(), base.weights(), Some(&lora))?;
            return Ok(Self {
                unet: Arc::new(unet),
                lora: Some(lora),
                variables,
            });
        }
        let mut weights = base.weights().clone();
        let mut variables = Vec::new();
        for (name, weight) in &mut weights.0 {
            if config.scope == JointScope::Full || is_key_or_value(name) {
                let var = Var::from_tensor(&weight.copy()?)?;
                *weight = var.as_tensor().clone();
                variables.push((name.to_string(), var));
            }
        }
        let unet = UNet::new(base.config(), &weights, None)?;
        Ok(Self {
            unet: Arc::new(unet),
            lora: None,
            variables,
        })
    }

    /// A model with the trained weights, none of them a variable any more.
    fn finish(self, model: &DiffusionModel) -> Result<DiffusionModel> {
        let frozen = |weight: &Tensor| weight.detach();
        let lora = self.lora.map(|lora| {
            let factors = lora.factors.iter().map(|(path, factors)| {
                (
                    path.clone(),
                    LoraFactors {
                        down: frozen(&factors.down),
                        up: frozen(&factors.up),
                    },
                )
            });
            LoraAdapter {
                rank: lora.rank,
                alpha: lora.alpha,
                factors: factors.collect(),
            }
        });
        let weights = WeightMap(
            self.unet
                .weights()
                .0
                .iter()
                .map(|(name, w)| (name.clone(), frozen(w)))
                .collect(),
        );
        let unet = UNet::new(self.unet.config(), &weights, lora.as_ref())?;
        Ok(DiffusionModel {
            unet: Arc::new(unet),
            lora,
            ..model.clone()
        })
    }
}

fn is_key_or_value(name: &str) -> bool {
    name.contains(".attn2.to_k.") || name.contains(".attn2.to_v.")
}
