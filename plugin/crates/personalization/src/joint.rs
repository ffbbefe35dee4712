//! Stage 3: tokens and weights together, masks fixed (P: "this avoids drift"; BaS phase 2).
//!
//! The base model is never written: the result is a model with weights of its own.

use std::sync::Arc;

use candle_core::{Tensor, Var};
use stable_diffusion::lora::LoraAdapter;
use stable_diffusion::{DiffusionModel, UNet};

use crate::checkpoint::Checkpoint;
use crate::config::{JointConfig, JointScope, MStepConfig};
use crate::error::{Error, Result};
use crate::joint_state::JointState;
use crate::learned::LearnedConcepts;
use crate::m_step::{Draw, LossContext, check_masks, step_event, step_name};
use crate::mask::ImageMasks;
use crate::observer::{Event, Observer, offer, tell};
use crate::optimizer::{AdamWState, clipping};
use crate::prepared::PreparedScene;

/// Alpha of new LoRA factors is their rank: the product counts once.
fn alpha_of(rank: usize) -> f64 {
    rank as f64
}

/// Name of this stage in events and errors.
pub const STAGE: &str = "joint";

/// Name of the tokens among the trained values.
const ROWS: &str = "rows";

/// Trains weights and tokens for `config.steps` steps with a new optimizer, or goes on from a saved state.
///
/// # Errors
/// A configuration out of range, masks that do not fit, a state of other work, a loss that is no longer finite, or a stop.
#[expect(clippy::too_many_arguments, reason = "one value per noun of the stage")]
pub fn joint_stage(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    masks: &[ImageMasks],
    learned: &LearnedConcepts,
    config: &JointConfig,
    m_step: &MStepConfig,
    resume: Option<JointState>,
    observer: &mut dyn Observer,
) -> Result<(DiffusionModel, LearnedConcepts)> {
    config.validate()?;
    check_masks(scene, masks)?;
    let tokenizer = learned.tokenizer(model)?;
    let trained = Trained::start(model, config, learned.seed)?;
    let rows = Var::from_tensor(&learned.rows)?;
    let mut variables: Vec<(&str, &Var)> = trained
        .variables
        .iter()
        .map(|(name, var)| (name.as_str(), var))
        .collect();
    variables.push((ROWS, &rows));
    variables.sort_by_key(|(name, _)| *name);
    let rate = |name: &str| {
        if name == ROWS {
            config.token_learning_rate
        } else {
            config.learning_rate
        }
    };
    let rates: Vec<f64> = variables.iter().map(|(name, _)| rate(name)).collect();
    let vars: Vec<&Var> = variables.iter().map(|(_, var)| *var).collect();
    let values = || {
        vars.iter()
            .map(|var| var.as_detached_tensor())
            .collect::<Vec<Tensor>>()
    };
    let (mut done, mut optimizer) = match resume {
        Some(state) => restore(&variables, state)?,
        None => (0, AdamWState::zeros(&values())?),
    };
    let unet = trained.unet.as_ref();
    while done < config.steps {
        done += 1;
        let draw = Draw::new(model, scene, m_step, (learned.seed, STAGE, done))?;
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
        let mut step = || {
            let at = (STAGE, done);
            let (gradients, losses) = context.gradients(rows.as_tensor(), &draw, &vars, at)?;
            let scale = clipping(&gradients, m_step.max_gradient_norm)?;
            optimizer.step(&vars, gradients, &scale, &rates, m_step)?;
            Ok(losses)
        };
        let losses = step().map_err(|error: Error| error.during(|| step_name(STAGE, done)))?;
        let now = LearnedConcepts {
            rows: rows.as_detached_tensor(),
            ..learned.clone()
        };
        let event = Event::Learned {
            step: done,
            learned: &now,
            unet: &trained.unet,
        };
        let told = tell(observer, &step_event(STAGE, done, config.steps, losses))
            .and_then(|()| tell(observer, &event));
        let values = variables
            .iter()
            .zip(values())
            .map(|((name, _), value)| ((*name).to_owned(), value));
        // Shares the memory of the variables.
        let state = JointState {
            step: done,
            values: values.collect(),
            optimizer: optimizer.clone(),
        };
        offer(observer, Checkpoint::Joint(&state));
        told?;
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

/// Puts saved values into the variables; returns the steps done and the optimizer.
fn restore(variables: &[(&str, &Var)], state: JointState) -> Result<(usize, AdamWState)> {
    let AdamWState { m, v, t } = &state.optimizer;
    let n = variables.len();
    let fits = |i: usize| {
        let ((name, var), (saved, value)) = (variables[i], &state.values[i]);
        let own = var.as_tensor();
        let is_like = |saved: &Tensor| own.dims() == saved.dims() && own.dtype() == saved.dtype();
        name == saved && [value, &m[i], &v[i]].into_iter().all(is_like)
    };
    let is_one = [state.values.len(), m.len(), v.len()] == [n; 3]
        && (0..n).all(fits)
        && state.step.max(*t) <= JointConfig::STEPS.most;
    if !is_one {
        let other = "other weights, or more steps than there are";
        return Err(Error::StateOfOtherWork { other });
    }
    for ((_, var), (_, value)) in variables.iter().zip(&state.values) {
        var.set(value)?;
    }
    Ok((state.step, state.optimizer))
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
        // An adapter that the model has already becomes part of what is tuned.
        let weights = model.unet_weights()?;
        if let JointScope::Lora { rank } = config.scope {
            let lora = LoraAdapter::new(&weights, rank, alpha_of(rank), seed)?;
            let variables = lora.variables();
            let unet = UNet::new(base.config(), &weights, Some(&lora))?.like(base);
            return Ok(Self {
                unet: Arc::new(unet),
                lora: Some(lora),
                variables,
            });
        }
        let is_trained = |name: &str| config.scope == JointScope::Full || is_key_or_value(name);
        let (weights, variables) = weights.trainable(is_trained)?;
        let unet = UNet::new(base.config(), &weights, None)?.like(base);
        Ok(Self {
            unet: Arc::new(unet),
            lora: None,
            variables,
        })
    }

    /// A model with the trained weights, none of them a variable any more.
    fn finish(self, model: &DiffusionModel) -> Result<DiffusionModel> {
        let lora = self.lora.map(|lora| lora.detach()).transpose()?;
        let weights = self.unet.weights().detach();
        let unet = UNet::new(self.unet.config(), &weights, lora.as_ref())?.like(&self.unet);
        Ok(DiffusionModel {
            unet: Arc::new(unet),
            is_tuned: model.is_tuned || model.lora.is_some() || lora.is_none(),
            lora,
            ..model.clone()
        })
    }
}

fn is_key_or_value(name: &str) -> bool {
    name.contains(".attn2.to_k.") || name.contains(".attn2.to_v.")
}
