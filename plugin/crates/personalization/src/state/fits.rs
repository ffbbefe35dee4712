//! Whether a state is one of the work that is to go on from it. Its file is whole, but anybody can write one, and what goes on relies
//! on its sizes.

use candle_core::{DType, Tensor};
use stable_diffusion::DiffusionModel;

use super::EmState;
use crate::attention::LayerSum;
use crate::config::{EmConfig, Labeling, TokenConfig};
use crate::error::{Error, Result};
use crate::evidence::{Evidence, Observation};
use crate::m_step::check_masks;
use crate::maps::AttentionMaps;
use crate::observation::{Begun, affinity_grid};
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
        same(
            learned.base_fingerprint == model.fingerprint,
            "a model of other weights",
        )?;
        same(learned.concepts == scene.scene.concepts(), "other concepts")?;
        let vectors = config.tokens.vectors_per_concept;
        let shape = [
            learned.concepts.len() * vectors,
            model.text_encoder.token_table().dim(1)?,
        ];
        let optimizer = &learned.optimizer;
        let rows = [&learned.rows, &learned.initial_rows].into_iter();
        let has_moments = optimizer.m.len() == 1 && optimizer.v.len() == 1;
        let is_row = |rows: &Tensor| rows.dims() == shape && rows.dtype() == DType::F32;
        same(
            has_moments
                && learned.vectors == vec![vectors; learned.concepts.len()]
                && rows.chain(&optimizer.m).chain(&optimizer.v).all(is_row),
            "tokens of another size",
        )?;
        let most = EmConfig::STEPS.most.max(TokenConfig::INVERSION_STEPS.most);
        let steps = [learned.step, optimizer.t, self.round];
        same(
            steps.iter().all(|&n| n <= most),
            "more steps than there are",
        )?;
        if !self.masks.is_empty() {
            check_masks(scene, &self.masks)?;
        }
        let of = Fits {
            model,
            scene,
            config,
        };
        let n_seen = self.observations.len();
        same(
            (n_seen == 0 || n_seen == n_pictures) && self.energies.len() == n_seen,
            "other pictures",
        )?;
        for (picture, seen) in self.observations.iter().enumerate() {
            of.observation(picture, seen)?;
        }
        let looked = &self.looked;
        let n_looked = looked.done.len() + usize::from(looked.begun.is_some());
        same(n_looked <= n_pictures, "other pictures")?;
        for (picture, seen) in looked.done.iter().enumerate() {
            of.observation(picture, seen)?;
        }
        match &looked.begun {
            Some(begun) => of.begun(looked.done.len(), begun),
            None => Ok(()),
        }
    }
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
    config: &'a EmConfig,
}

impl Fits<'_> {
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
        let is_wanted = matches!(self.config.extraction.labeling, Labeling::Posterior(_));
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
        let extraction = &self.config.extraction;
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
        let most = extraction.n_timesteps_initial.max(extraction.n_timesteps);
        same(
            sums.n_concepts == n
                && sums.vectors_per_concept == self.config.tokens.vectors_per_concept
                && begun.n_draws <= most
                && (begun.n_draws == 0 || sums.layers.keys().eq(&watched))
                && sums.layers.iter().all(is_sum)
                && sums.weight.is_finite()
                && (begun.n_draws == 0) == (sums.weight == 0.0),
            "attention of another size",
        )?;
        self.evidence(picture, begun.evidence.as_ref())
    }
}
