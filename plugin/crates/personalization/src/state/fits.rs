//! Whether a state is one of the work that is to go on from it. Its file is whole, but anybody can write one, and what goes on relies
//! on its sizes.

use candle_core::{DType, Tensor};
use stable_diffusion::DiffusionModel;

use super::EmState;
use crate::attention::LayerSum;
use crate::config::{EmConfig, ExtractionConfig, Labeling, TokenConfig};
use crate::error::{Error, Result};
use crate::evidence::{Evidence, Observation};
use crate::learned::LearnedConcepts;
use crate::m_step::check_masks;
use crate::maps::AttentionMaps;
use crate::observation::{Begun, Looked, affinity_grid};
use crate::prepared::PreparedScene;
use crate::size::Size;

impl EmState {
    /// Whether the work with these arguments can go on from it.
    ///
    /// # Errors
    /// [`Error::StateOfOtherWork`], or those of masks that do not fit the scene.
    pub fn check(
        &self,
        model: &DiffusionModel,
        scene: &PreparedScene<'_>,
        config: &EmConfig,
    ) -> Result<()> {
        let learned = &self.learned;
        let n_pictures = scene.scene.pictures().len();
        let vectors = vec![config.tokens.vectors_per_concept; learned.concepts.len()];
        tokens(learned, model, scene, &vectors)?;
        let most = EmConfig::STEPS.most.max(TokenConfig::INVERSION_STEPS.most);
        let steps = [learned.step, learned.optimizer.t, self.round];
        same(steps.iter().all(|&n| n <= most), TOO_MANY_STEPS)?;
        if !self.masks.is_empty() {
            check_masks(scene, &self.masks)?;
        }
        let of = Fits {
            model,
            scene,
            extraction: &config.extraction,
            n_timesteps: config
                .extraction
                .n_timesteps_initial
                .max(config.extraction.n_timesteps),
            vectors: config.tokens.vectors_per_concept,
        };
        let n_seen = self.observations.len();
        same(
            (n_seen == 0 || n_seen == n_pictures) && self.energies.len() == n_seen,
            "other pictures",
        )?;
        for (picture, seen) in self.observations.iter().enumerate() {
            of.observation(picture, seen)?;
        }
        of.looked(&self.looked)
    }

    /// Whether learning by itself can go on from it, which began with the tokens `first`, takes `n_inversion` steps of textual
    /// inversion and then `n_steps` under masks.
    ///
    /// # Errors
    /// [`Error::StateOfOtherWork`].
    pub fn check_learning(
        &self,
        model: &DiffusionModel,
        scene: &PreparedScene<'_>,
        first: &LearnedConcepts,
        (n_inversion, n_steps): (usize, usize),
    ) -> Result<()> {
        self.of_one_part(model, scene, first)?;
        same(!self.is_inverting || n_inversion > 0, OTHER_PART)?;
        let learned = &self.learned;
        let (begun, n_most) = match (self.is_inverting, n_inversion) {
            (true, _) => (first.step, n_inversion.saturating_sub(first.step)),
            (false, 0) => (first.step, n_steps),
            // Stage 2 counts its own steps.
            (false, _) => (0, n_steps),
        };
        let n_done = learned.step.checked_sub(begun);
        let n_moments = first.optimizer.t.saturating_add(n_most);
        same(
            n_done.is_some_and(|n| n <= n_most) && learned.optimizer.t <= n_moments,
            TOO_MANY_STEPS,
        )?;
        let looked = &self.looked;
        same(looked.done.is_empty() && looked.begun.is_none(), OTHER_PART)
    }

    /// Whether an extraction by itself, of so many timesteps, can go on from it.
    ///
    /// # Errors
    /// [`Error::StateOfOtherWork`].
    pub fn check_looking(
        &self,
        model: &DiffusionModel,
        scene: &PreparedScene<'_>,
        learned: &LearnedConcepts,
        extraction: &ExtractionConfig,
        n_timesteps: usize,
    ) -> Result<()> {
        self.of_one_part(model, scene, learned)?;
        same(
            bits(&self.learned.rows)? == bits(&learned.rows)? && self.learned.step == learned.step,
            "other tokens",
        )?;
        let of = Fits {
            model,
            scene,
            extraction,
            n_timesteps,
            vectors: learned.vectors_per_concept()?,
        };
        of.looked(&self.looked)
    }

    /// Whether it is one of a part of the alternation by itself, with these tokens or what became of them.
    fn of_one_part(
        &self,
        model: &DiffusionModel,
        scene: &PreparedScene<'_>,
        first: &LearnedConcepts,
    ) -> Result<()> {
        let learned = &self.learned;
        tokens(learned, model, scene, &first.vectors)?;
        same(
            learned.seed == first.seed
                && bits(&learned.initial_rows)? == bits(&first.initial_rows)?,
            "other tokens",
        )?;
        let has_more = !self.masks.is_empty() || !self.observations.is_empty();
        same(
            !has_more && self.energies.is_empty() && self.round == 0,
            OTHER_PART,
        )
    }
}

const TOO_MANY_STEPS: &str = "more steps than there are";
const OTHER_PART: &str = "another part of the method";

/// Whether tokens are those of this model and scene, with so many vectors each.
fn tokens(
    learned: &LearnedConcepts,
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    vectors: &[usize],
) -> Result<()> {
    same(
        learned.base_fingerprint == model.fingerprint,
        "a model of other weights",
    )?;
    same(learned.concepts == scene.scene.concepts(), "other concepts")?;
    let width = model.text_encoder.token_table().dim(1)?;
    let shape = [vectors.iter().sum::<usize>(), width];
    let optimizer = &learned.optimizer;
    let rows = [&learned.rows, &learned.initial_rows].into_iter();
    let has_moments = optimizer.m.len() == 1 && optimizer.v.len() == 1;
    let is_row = |rows: &Tensor| rows.dims() == shape && rows.dtype() == DType::F32;
    same(
        has_moments
            && learned.vectors == vectors
            && rows.chain(&optimizer.m).chain(&optimizer.v).all(is_row),
        "tokens of another size",
    )
}

fn bits(rows: &Tensor) -> Result<Vec<u32>> {
    let values = rows.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// Whether the evidence of the rounds before is one of these pictures.
///
/// # Errors
/// [`Error::EvidenceDoesNotFit`].
pub(crate) fn check_evidence(
    model: &DiffusionModel,
    scene: &PreparedScene<'_>,
    extraction: &ExtractionConfig,
    earlier: &[Evidence],
) -> Result<()> {
    let of = Fits {
        model,
        scene,
        extraction,
        // Of what is not compared here.
        n_timesteps: 0,
        vectors: 1,
    };
    let n_pictures = scene.scene.pictures().len();
    let is_added = matches!(extraction.labeling, Labeling::Posterior(_)) && !earlier.is_empty();
    let mut all = earlier.iter().enumerate();
    let fits = earlier.len() == n_pictures
        && all.all(|(picture, evidence)| of.evidence(picture, Some(evidence)).is_ok());
    if is_added && !fits {
        return Err(Error::EvidenceDoesNotFit);
    }
    Ok(())
}

fn same(is_so: bool, other: &'static str) -> Result<()> {
    if is_so {
        Ok(())
    } else {
        Err(Error::StateOfOtherWork { other })
    }
}

/// Planes `[n][h · w]`.
fn are_planes(planes: &[Vec<f32>], n: usize, size: Size) -> bool {
    planes.len() == n && planes.iter().all(|plane| plane.len() == size.area())
}

/// What the parts have to fit.
#[derive(Clone, Copy)]
struct Fits<'a> {
    model: &'a DiffusionModel,
    scene: &'a PreparedScene<'a>,
    extraction: &'a ExtractionConfig,
    /// Most that are looked at.
    n_timesteps: usize,
    /// V.
    vectors: usize,
}

impl Fits<'_> {
    fn looked(self, looked: &Looked) -> Result<()> {
        let n_pictures = self.scene.scene.pictures().len();
        let n_looked = looked.done.len() + usize::from(looked.begun.is_some());
        same(n_looked <= n_pictures, "other pictures")?;
        for (picture, seen) in looked.done.iter().enumerate() {
            self.observation(picture, seen)?;
        }
        match &looked.begun {
            Some(begun) => self.begun(looked.done.len(), begun),
            None => Ok(()),
        }
    }

    fn n_concepts(self, picture: usize) -> usize {
        self.scene.scene.pictures()[picture].concepts.len()
    }

    fn observation(self, picture: usize, seen: &Observation) -> Result<()> {
        let AttentionMaps { size, maps } = &seen.maps;
        let wanted = self.scene.scene.pictures()[picture].picture.size();
        same(
            *size == wanted && are_planes(maps, self.n_concepts(picture), wanted),
            "maps of another size",
        )?;
        self.evidence(picture, seen.evidence.as_ref())
    }

    fn evidence(self, picture: usize, evidence: Option<&Evidence>) -> Result<()> {
        const OTHER: &str = "evidence of another kind or size";
        let is_wanted = matches!(self.extraction.labeling, Labeling::Posterior(_));
        let Some(evidence) = evidence else {
            return same(!is_wanted, OTHER);
        };
        let n = self.n_concepts(picture);
        let size = self.scene.latent_size(self.model, picture);
        let pixels = self.scene.scene.pictures()[picture].picture.size();
        let attention = &evidence.attention;
        let draws = [
            evidence.n_draws,
            attention.weight,
            evidence.affinity.parts().1,
        ];
        same(
            is_wanted
                && evidence.size == size
                && are_planes(&evidence.log_likelihoods, n, size)
                && (attention.maps.is_empty() || are_planes(&attention.maps, n, pixels))
                && evidence.affinity.size() == affinity_grid(self.model, self.scene, picture)
                && draws.iter().all(|n| n.is_finite() && *n >= 0.0),
            OTHER,
        )
    }

    fn begun(self, picture: usize, begun: &Begun) -> Result<()> {
        let n = self.n_concepts(picture);
        let extraction = self.extraction;
        let layers = self.model.unet.cross_attention_layers();
        let latent = self.scene.latent_size(self.model, picture);
        let is_sum = |(&layer, sum): (&usize, &LayerSum)| {
            let Some(of) = layers.get(layer) else {
                return false;
            };
            let [height, width] = of.size_of([latent.height, latent.width]);
            sum.size == Size::new(width, height) && are_planes(&sum.maps, n, sum.size)
        };
        let sums = &begun.sums;
        let watched = extraction.layers.of(layers);
        same(
            sums.n_concepts == n
                && sums.vectors_per_concept == self.vectors
                && begun.n_draws <= self.n_timesteps
                && (begun.n_draws == 0 || sums.layers.keys().eq(&watched))
                && sums.layers.iter().all(is_sum)
                && sums.weight.is_finite()
                && (begun.n_draws == 0) == (sums.weight == 0.0),
            "attention of another size",
        )?;
        self.evidence(picture, begun.evidence.as_ref())
    }
}
