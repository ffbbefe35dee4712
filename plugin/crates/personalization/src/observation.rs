//! What the E-step sees of a picture: attention and, where the labeling asks for it, evidence.
//!
//! One prompt names all concepts of the picture: its attention says where they are. A prompt for each object, about the
//! same noisy latent, says under which of them the noise is predicted best. Every timestep gets its own latent of the
//! VAE's posterior and its own noise; conditional passes through the U-Net, no guidance, no gradient.

use candle_core::Tensor;
use stable_diffusion::DiffusionModel;
use stable_diffusion::rng::Rng;
use stable_diffusion::unet::Watch;

use crate::attention::AttentionSums;
use crate::checkpoint::Checkpoint;
use crate::config::{Cue, ExtractionConfig, Labeling, PosteriorConfig, Weighting};
use crate::discover::discovered;
use crate::error::Result;
use crate::evidence::{Evidence, Observation};
use crate::layers::LayerChoice;
use crate::learned::LearnedConcepts;
use crate::observer::{Event, Observer, offer, tell};
use crate::prepared::PreparedScene;
use crate::scene::competitors;
use crate::size::Size;
use crate::state::{EmMoment, EmState, check_evidence};
use crate::within::Within;

/// Noisy latents in one pass, at a latent size of 32; fewer at larger ones, so that memory stays about the same. It does
/// not hang on what memory is free: the kernel of a linear layer is chosen by its rows, so that other batches are other bits.
const BATCH_AT_32: usize = 10;

/// Observes every picture of the scene at `n_timesteps` random timesteps.
///
/// `earlier` is the evidence of the rounds before, to which this one's is added. The stream is named by the seed and the
/// learned step, apart from the training stream: runs with and without E-steps see the same training noise. The observer gets
/// an [`Event::Checkpoint`] after every pass; a call with the same arguments that is `resumed` from it gives the same bits.
///
/// # Errors
/// Tokens of another width, evidence of other pictures, a state of other work, those of the model, or a stop.
#[expect(clippy::too_many_arguments, reason = "what an extraction hangs on")]
pub fn observe(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    config: &ExtractionConfig,
    n_timesteps: usize,
    earlier: &[Evidence],
    resumed: Option<EmState>,
    observer: &mut dyn Observer,
) -> Result<Vec<Observation>> {
    learned.check_width(model)?;
    check_evidence(model, scene, config, earlier)?;
    let state = match resumed {
        Some(state) => {
            state.check_looking(model, scene, learned, config, n_timesteps)?;
            state
        }
        None => EmState::beginning(learned.clone(), false),
    };
    let looked = state.looked.clone();
    let mut within = Within {
        inner: observer,
        moment: EmMoment {
            looking: None,
            ..state.moment()
        },
        steps: None,
    };
    observe_from(
        model,
        scene,
        learned,
        config,
        n_timesteps,
        earlier,
        looked,
        &mut within,
    )
}

/// How far an E-step has come.
#[derive(Debug, Clone, Default)]
pub struct Looked {
    pub(crate) done: Vec<Observation>,
    /// Of the picture after them.
    pub(crate) begun: Option<Begun>,
}

/// [`Looked`], borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Looking<'a> {
    pub(crate) done: &'a [Observation],
    pub(crate) begun: &'a Begun,
}

/// A picture some of whose timesteps were looked at.
#[derive(Debug, Clone)]
pub(crate) struct Begun {
    pub(crate) n_draws: usize,
    pub(crate) sums: AttentionSums,
    /// Evidence of the rounds before is in it.
    pub(crate) evidence: Option<Evidence>,
}

/// [`observe`] as a part of other work, which has what it was resumed from in its own state.
///
/// # Errors
/// As [`observe`].
#[expect(clippy::too_many_arguments, reason = "those of observe")]
pub(crate) fn observe_from(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    learned: &LearnedConcepts,
    config: &ExtractionConfig,
    n_timesteps: usize,
    earlier: &[Evidence],
    looked: Looked,
    observer: &mut dyn Observer,
) -> Result<Vec<Observation>> {
    let n_pictures = scene.scene.pictures().len();
    let Looked {
        done: mut all,
        mut begun,
    } = looked;
    for picture in all.len()..n_pictures {
        let mut rng = Rng::new(
            learned.seed,
            &format!("e-step, picture {picture}"),
            learned.step as u64,
        );
        let mut last_offered = begun.as_ref().map_or(0, |begun: &Begun| begun.n_draws);
        let mut on_pass = |begun: &Begun| {
            let progress = Event::Progress {
                stage: "attention",
                done: picture * n_timesteps + begun.n_draws,
                total: n_pictures * n_timesteps,
            };
            let told = tell(observer, &progress);
            if told.is_err() || begun.n_draws != last_offered {
                last_offered = begun.n_draws;
                let looking = Looking { done: &all, begun };
                offer(observer, Checkpoint::Looking(looking));
            }
            told
        };
        let timesteps = draw_timesteps(model, config, n_timesteps, &mut rng);
        let eye = Eye {
            model,
            scene,
            learned,
            config,
            picture,
        };
        let earlier = earlier.get(picture);
        let seen = eye.observe(&timesteps, earlier, begun.take(), &mut rng, &mut on_pass);
        let doing = || format!("the extraction of the attention to picture {}", picture + 1);
        all.push(seen.map_err(|error| error.during(doing))?);
    }
    Ok(all)
}

fn draw_timesteps(
    model: &DiffusionModel,
    config: &ExtractionConfig,
    n: usize,
    rng: &mut Rng,
) -> Vec<usize> {
    let total = model.noise_schedule.n_timesteps();
    let [lo, hi] = config
        .timestep_range
        .map(|part| (part * total as f64).round() as usize);
    let hi = hi.clamp(lo + 1, total);
    // One of each of n equal parts of the range: uniform each, and together less a matter of luck.
    let in_part = |i: usize| {
        let at = |i: usize| lo + (hi - lo) * i / n;
        at(i) + rng.below((at(i + 1) - at(i)).max(1))
    };
    (0..n).map(in_part).collect()
}

/// Cells whose looking at each other is evidence: those of the level above the bottleneck.
pub(crate) fn affinity_grid(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    picture: usize,
) -> Size {
    let layers = model.unet.cross_attention_layers();
    let level = LayerChoice::AboveBottleneck.of(layers);
    let latent = scene.latent_size(model, picture);
    level.first().map_or(Size::square(1), |&i| {
        let [height, width] = layers[i].size_of([latent.height, latent.width]);
        Size::new(width, height)
    })
}

/// Who looks at which picture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Eye<'a> {
    pub(crate) model: &'a DiffusionModel,
    pub(crate) scene: &'a PreparedScene<'a>,
    pub(crate) learned: &'a LearnedConcepts,
    pub(crate) config: &'a ExtractionConfig,
    pub(crate) picture: usize,
}

impl Eye<'_> {
    /// Observes at given timesteps; latents and noise come from `rng`. Those that were `begun` with are not looked at again.
    pub(crate) fn observe(
        &self,
        timesteps: &[usize],
        earlier: Option<&Evidence>,
        begun: Option<Begun>,
        rng: &mut Rng,
        on_pass: &mut dyn FnMut(&Begun) -> Result<()>,
    ) -> Result<Observation> {
        let (model, learned) = (self.model, self.learned);
        let concepts = &self.scene.scene.pictures()[self.picture].concepts;
        let tokenizer = learned.tokenizer(model)?;
        let prompt = tokenizer.encode(&learned.training_prompt(concepts))?;
        let positions = learned.positions(&tokenizer, &prompt, concepts)?;
        let encode = |ids: &[u32]| -> Result<Tensor> {
            let context = model.text_encoder.encode(ids, Some(&learned.rows))?;
            Ok(context.detach())
        };
        let context = encode(&prompt.ids)?;
        let (config, misfit) = match &self.config.labeling {
            Labeling::Posterior(config) => (Some(config), config.misfit),
            Labeling::Threshold { .. } | Labeling::Compete { .. } => (None, 0.0),
        };
        let mut begun = match begun {
            Some(begun) => begun,
            None => Begun {
                n_draws: 0,
                sums: AttentionSums::new(concepts.len(), learned.vectors_per_concept()?),
                evidence: config.map(|config| self.evidence(config, earlier)),
            },
        };
        let asked = self.asked_for_noise();
        let own_contexts = asked
            .iter()
            .map(|&i| encode(&tokenizer.encode(&learned.own_prompt(concepts[i]))?.ids))
            .collect::<Result<Vec<_>>>()?;
        let layers = self.config.layers.of(model.unet.cross_attention_layers());
        let watch = if config.is_some() {
            Watch::WithSelfAttention(&layers, &positions)
        } else {
            Watch::Layers(&layers, &positions)
        };
        let size = self.scene.latent_size(model, self.picture);
        let batch = (BATCH_AT_32 * 32 * 32 / size.area()).clamp(1, BATCH_AT_32);
        let n_begun = begun.n_draws;
        let mut n_drawn = 0;
        for timesteps in timesteps.chunks(batch) {
            let n_draws = timesteps.len();
            let channels = model.config.unet.in_channels;
            let shape = [n_draws, channels, size.height, size.width];
            let of_latents = rng.normal(&shape, &model.device)?;
            let noise = rng.normal(&shape, &model.device)?;
            n_drawn += n_draws;
            if n_drawn <= n_begun {
                continue;
            }
            // Also before the first pass and between forwards: each may take as long as a user waits for a stop.
            on_pass(&begun)?;
            let latents = self
                .scene
                .latents(model, self.picture, false, &of_latents)?;
            let schedule = &model.noise_schedule;
            let noisy = schedule.add_noise(&latents, &noise, timesteps)?;
            let t: Vec<f32> = timesteps.iter().map(|&t| t as f32).collect();
            // Once for all prompts.
            let stem = model.unet.stem(&noisy, &t, watch)?;
            let observed = model.unet.forward_from(&stem, &context, watch)?;
            let target = schedule.target(&latents, &noise, timesteps)?;
            let squares = own_contexts
                .iter()
                .map(|context| {
                    on_pass(&begun)?;
                    let seen = model.unet.forward_from(&stem, context, Watch::NOTHING)?;
                    Ok((seen.prediction - &target)?.sqr()?)
                })
                .collect::<Result<Vec<_>>>()?;
            // Only now is anything read: a device has the whole pass to do before it is waited for.
            begun
                .sums
                .add(&observed.attention, &self.weights(timesteps))?;
            if let Some(evidence) = &mut begun.evidence {
                let seen = observed.attention.iter().filter(|layer| {
                    evidence.affinity.size() == Size::new(layer.width, layer.height)
                });
                let seen: Vec<&Tensor> = seen
                    .filter_map(|layer| layer.self_attention.as_ref())
                    .collect();
                evidence.affinity.add(&seen)?;
                evidence.add(&asked, &squares, misfit)?;
            }
            begun.n_draws += n_draws;
            on_pass(&begun)?;
        }
        let Begun {
            sums, mut evidence, ..
        } = begun;
        let weight = sums.weight();
        let maps = sums.maps(self.scene.scene.pictures()[self.picture].picture.size());
        if let (Some(evidence), Labeling::Posterior(config)) =
            (&mut evidence, &self.config.labeling)
        {
            let roles = self.scene.scene.roles(self.picture);
            let without_words = if learned.is_blank() {
                discovered(&evidence.affinity, &maps, &roles, &config.regions)
            } else {
                None
            };
            let attention = without_words.as_ref().unwrap_or(&maps);
            evidence.attention.add(attention, weight);
        }
        Ok(Observation { maps, evidence })
    }

    fn weights(&self, timesteps: &[usize]) -> Vec<f32> {
        // The last timestep of some schedules has no signal at all.
        const LEAST: f64 = 1e-3;
        let alphas_cumprod = self.model.noise_schedule.alphas_cumprod();
        let weight = |&t: &usize| match self.config.weighting {
            Weighting::Uniform => 1.0,
            Weighting::Signal => alphas_cumprod[t].sqrt().max(LEAST) as f32,
        };
        timesteps.iter().map(weight).collect()
    }

    /// The evidence so far.
    fn evidence(&self, config: &PosteriorConfig, earlier: Option<&Evidence>) -> Evidence {
        if let Some(earlier) = earlier {
            return earlier.clone().faded(config.keep);
        }
        let latent = self.scene.latent_size(self.model, self.picture);
        let grid = affinity_grid(self.model, self.scene, self.picture);
        let n_concepts = self.scene.scene.pictures()[self.picture].concepts.len();
        Evidence::empty(latent, n_concepts, grid)
    }

    /// The picture's concepts among which the noise decides, if it does.
    fn asked_for_noise(&self) -> Vec<usize> {
        let Labeling::Posterior(PosteriorConfig { cue, .. }) = self.config.labeling else {
            return Vec::new();
        };
        let objects = competitors(&self.scene.scene.roles(self.picture));
        if cue == Cue::Attention || objects.len() < 2 || self.learned.is_blank() {
            Vec::new()
        } else {
            objects
        }
    }
}
