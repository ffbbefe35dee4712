//! The posterior of every pixel: which concept it belongs to, given where the model looks and what explains the noise.
//!
//! ```text
//! f(x)   = the foreground: where the background's map is low (or an object's map high), part by part up to its rim
//! r_c(x) = ln( Â_c(x) / Σ_c' Â_c'(x) ) + ℓ_c(x),   Â_c = A_c / Σ A_c          prior + likelihood
//! v_r(c) = Σ_{x in part r} f(x) r_c(x)                                       evidence of a part, in latent cells
//! q_c(x) = f(x) q_r(c),   q_r = the posterior of the part's owner            q_background = 1 - Σ_c q_c
//! U_c(x) = -ln( (1 - ε) q_c(x) + ε / L ),   ε = L / (e + L - 1)               the unary energy of the CRF
//! ```
//! | symbol | shape | meaning |
//! | --- | --- | --- |
//! | A_c | `[H, W]` | attention map, see [`crate::attention`] |
//! | ℓ_c | `[h, w]` nats | log-likelihood, see [`crate::evidence`] |
//! | r | | part of the foreground, see [`crate::regions`] |
//! | q_r | `[C]` | see `owners.rs` |
//! | q_c | `[H, W]` in [0, 1] | posterior |
//! | ε | | chance that an estimate is wrong about a pixel; so chosen that certainty gets CutLER's unary energy |
//!
//! A and ℓ are those of all draws so far; ℓ counts for as many as correlated draws are worth.
//!
//! There are two hypotheses H of what the parts are: by the foreground's shape, and by the words' attention. More parts
//! explain any picture better, so that each has its price, in nats per cell of the latent:
//!
//! ```text
//! ln p(H | picture) = ln Z_H - price · h · w · (number of parts)                 the more probable one is taken
//! ```
//!
//! Where there are fewer parts than objects, every pixel is a part of its own, with ℓ blurred.

use crate::config::{Cue, Foreground, Pooling, PosteriorConfig};
use crate::discover;
use crate::error::{Error, Result};
use crate::evidence::{Affinity, Evidence};
use crate::maps::{AttentionMaps, upsample_linear};
use crate::mask::ImageMasks;
use crate::owners::{Owners, log_sum, owners, softmax};
use crate::regions::{Region, basins_for, regions, regions_of_words, sigmoid};
use crate::scene::{Role, competitors};
use crate::size::Size;

/// Shares below this one count as this one: a map of zeros forbids nothing.
const SMALLEST_SHARE: f64 = 1e-9;

/// Posteriors of one picture's concepts.
#[derive(Debug, Clone, PartialEq)]
pub struct Posterior {
    /// Width and height in pixels.
    pub size: Size,
    /// q_c `[H · W]` in [0, 1] of every concept, in the picture's order; they sum to 1 at most.
    pub planes: Vec<Vec<f32>>,
    /// ln Z of the evidence that it was concluded from, in nats; 0 where there was none.
    pub log_evidence: f64,
}

/// q of every pixel.
///
/// # Errors
/// Roles, maps or evidence that do not fit each other.
pub fn posterior(
    maps: &AttentionMaps,
    evidence: Option<&Evidence>,
    roles: &[Role],
    config: &PosteriorConfig,
) -> Result<Posterior> {
    let n_concepts = maps.maps.len();
    let fits = |evidence: &Evidence| evidence.log_likelihoods.len() == n_concepts;
    if roles.len() != n_concepts || !evidence.is_none_or(fits) {
        return Err(Error::MapsDoNotFit {
            maps: n_concepts,
            concepts: roles.len(),
        });
    }
    let affinity = evidence
        .map(|evidence| &evidence.affinity)
        .filter(|affinity| !affinity.is_empty());
    let attention = evidence
        .map(|evidence| &evidence.attention.maps)
        .filter(|mean| !mean.is_empty())
        .unwrap_or(&maps.maps);
    let picture = Picture {
        size: maps.size,
        attention,
        affinity,
        evidence,
        objects: competitors(roles),
        config,
    };
    let foreground = picture.foreground(roles);
    let (mut planes, log_evidence) = picture
        .by_parts(&foreground)
        .unwrap_or_else(|| picture.by_pixel(&foreground));
    if let Some(background) = roles
        .iter()
        .position(|&role| role == Role::Background)
        .filter(|background| !picture.objects.contains(background))
    {
        let rest = |i: usize| 1.0 - planes.iter().map(|plane| plane[i]).sum::<f32>();
        planes[background] = (0..maps.size.area()).map(|i| rest(i).max(0.0)).collect();
    }
    Ok(Posterior {
        size: maps.size,
        planes,
        log_evidence,
    })
}

/// What is known of a picture.
struct Picture<'a> {
    size: Size,
    /// A_c, `[C][H · W]`.
    attention: &'a [Vec<f32>],
    affinity: Option<&'a Affinity>,
    evidence: Option<&'a Evidence>,
    objects: Vec<usize>,
    config: &'a PosteriorConfig,
}

impl Picture<'_> {
    fn n_pixels(&self) -> usize {
        self.size.area()
    }

    /// `[H · W]` in [0, 1], high where something stands in front of the background.
    fn foreground(&self, roles: &[Role]) -> Vec<f32> {
        let background = roles.iter().position(|&role| role == Role::Background);
        if let (Foreground::SelfAttention, Some(affinity)) = (self.config.foreground, self.affinity)
        {
            return discover::foreground(affinity, self.size);
        }
        match (self.config.foreground, background) {
            (Foreground::BackgroundMap, Some(c)) if !self.objects.contains(&c) => {
                let map = min_max(&self.attention[c]);
                map.into_iter().map(|v| 1.0 - v).collect()
            }
            _ => {
                let maps: Vec<Vec<f32>> = self
                    .objects
                    .iter()
                    .map(|&c| min_max(&self.attention[c]))
                    .collect();
                (0..self.n_pixels())
                    .map(|i| maps.iter().map(|map| map[i]).fold(0.0, f32::max))
                    .collect()
            }
        }
    }

    /// ln of every object's share of the attention, `[objects][H · W]`.
    fn log_prior(&self) -> Vec<Vec<f64>> {
        let uses_attention = self.config.cue != Cue::Noise;
        let scaled: Vec<Vec<f64>> = self
            .objects
            .iter()
            .map(|&c| {
                let map = &self.attention[c];
                let mass = map.iter().map(|&v| f64::from(v)).sum::<f64>().max(1e-12);
                map.iter().map(|&v| f64::from(v) / mass).collect()
            })
            .collect();
        let log_share = |k: usize, i: usize| {
            let sum: f64 = scaled.iter().map(|map| map[i]).sum();
            (scaled[k][i] / sum.max(1e-300) + SMALLEST_SHARE).ln()
        };
        (0..self.objects.len())
            .map(|k| {
                (0..self.n_pixels())
                    .map(|i| if uses_attention { log_share(k, i) } else { 0.0 })
                    .collect()
            })
            .collect()
    }

    /// ℓ of one object at the latent's size, if the noise counts.
    fn log_likelihood(&self, object: usize) -> Option<(Size, Vec<f32>)> {
        let evidence = self
            .evidence
            .filter(|_| self.config.cue != Cue::Attention)?;
        let worth = evidence.worth(self.config.correlation) as f32;
        let sums = evidence.log_likelihoods[object].iter();
        Some((evidence.size, sums.map(|l| worth * l).collect()))
    }

    /// By the more probable hypothesis of the parts; `None` without enough of them.
    fn by_parts(&self, foreground: &[f32]) -> Option<(Vec<Vec<f32>>, f64)> {
        let (size, n_objects, config) = (self.size, self.objects.len(), self.config);
        if config.pooling == Pooling::Pixels {
            return None;
        }
        let basins = basins_for(foreground, size, n_objects, &config.regions);
        // Where only the noise counts, attention parts nothing.
        let by_words = config.pooling == Pooling::BetterParts && config.cue != Cue::Noise;
        let shares = self.log_prior();
        let of_words = by_words
            .then(|| regions_of_words(basins.clone(), foreground, size, &shares, &config.regions));
        let of_shape = regions(
            basins,
            foreground,
            size,
            n_objects,
            self.affinity,
            &config.regions,
        );
        let pixels = self.pixel_evidence(shares);
        let price = config.part_price * self.n_pixels() as f64 / self.pixels_per_cell();
        let decided = [Some(of_shape), of_words].map(|parts| {
            let parts = parts.filter(|parts| parts.len() >= n_objects)?;
            let (planes, log_evidence) = self.by_part(&parts, &pixels);
            Some((
                log_evidence - price * parts.len() as f64,
                planes,
                log_evidence,
            ))
        });
        let better = match decided {
            [Some(shape), Some(words)] if words.0 > shape.0 => Some(words),
            [shape, words] => shape.or(words),
        };
        better.map(|(_, planes, log_evidence)| (planes, log_evidence))
    }

    /// r_c of every pixel, `[objects][H · W]`, in nats per latent cell: the prior counts once per cell, as the likelihood
    /// does.
    fn pixel_evidence(&self, log_prior: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
        let size = self.size;
        let mut evidence = log_prior;
        for (own, &c) in evidence.iter_mut().zip(&self.objects) {
            if let Some((latent, likelihood)) = self.log_likelihood(c) {
                for (pixel, value) in own.iter_mut().enumerate() {
                    *value += f64::from(likelihood[size.cell_in(pixel, latent)]);
                }
            }
        }
        evidence
    }

    /// Pixels of a latent cell, or one.
    fn pixels_per_cell(&self) -> f64 {
        let cells = self.evidence.map_or(self.size, |evidence| evidence.size);
        self.n_pixels() as f64 / cells.area() as f64
    }

    fn by_part(&self, parts: &[Region], pixels: &[Vec<f64>]) -> (Vec<Vec<f32>>, f64) {
        let per_cell = self.pixels_per_cell();
        let evidence_of = |part: &Region, own: &[f64]| {
            let inside = part.pixels.iter().zip(&part.inside);
            let sum: f64 = inside.map(|(&i, &inside)| f64::from(inside) * own[i]).sum();
            sum / per_cell
        };
        let evidence: Vec<Vec<f64>> = parts
            .iter()
            .map(|part| pixels.iter().map(|own| evidence_of(part, own)).collect())
            .collect();
        let mut planes = vec![vec![0.0; self.n_pixels()]; self.attention.len()];
        let Owners {
            posterior,
            log_evidence,
        } = owners(&evidence, self.objects.len());
        for (part, q) in parts.iter().zip(posterior) {
            for (&c, q) in self.objects.iter().zip(q) {
                for (&i, &inside) in part.pixels.iter().zip(&part.inside) {
                    planes[c][i] = inside * q as f32;
                }
            }
        }
        (planes, log_evidence)
    }

    fn by_pixel(&self, foreground: &[f32]) -> (Vec<Vec<f32>>, f64) {
        let (size, config) = (self.size, self.config);
        let per_cell = self.pixels_per_cell();
        let mut log_evidence = 0.0;
        let mut logs = self.log_prior();
        for (logs, &c) in logs.iter_mut().zip(&self.objects) {
            if let Some((latent, likelihood)) = self.log_likelihood(c) {
                let blurred = blur(&likelihood, latent, config.blur);
                let smooth = upsample_linear(&blurred, latent, size);
                logs.iter_mut()
                    .zip(smooth)
                    .for_each(|(log, l)| *log += f64::from(l));
            }
        }
        let mut planes = vec![vec![0.0; self.n_pixels()]; self.attention.len()];
        for (i, &inside) in foreground.iter().enumerate() {
            let inside = sigmoid((inside - config.regions.rim) / config.regions.softness);
            let logs: Vec<f64> = logs.iter().map(|logs| logs[i]).collect();
            log_evidence += f64::from(inside) * log_sum(&logs);
            for (&c, q) in self.objects.iter().zip(softmax(&logs)) {
                planes[c][i] = inside * q as f32;
            }
        }
        (planes, log_evidence / per_cell)
    }
}

impl Posterior {
    /// The most probable concept of every pixel, as masks; what is most probably none of them is in none.
    ///
    /// # Errors
    /// Planes of another size than they say.
    pub fn masks(&self) -> Result<ImageMasks> {
        let n_concepts = self.planes.len();
        let mut planes = vec![vec![0u8; self.size.area()]; n_concepts];
        for i in 0..self.size.area() {
            let sum: f32 = self.planes.iter().map(|plane| plane[i]).sum();
            let mut best = (1.0 - sum, n_concepts);
            for (c, plane) in self.planes.iter().enumerate() {
                if plane[i] > best.0 {
                    best = (plane[i], c);
                }
            }
            if let Some(plane) = planes.get_mut(best.1) {
                plane[i] = 1;
            }
        }
        ImageMasks::new(self.size, planes)
    }

    /// U `[L, H · W]` and L. The first label is what belongs to no concept, if `with_rest`; then the concepts.
    #[must_use]
    pub(crate) fn unary(&self, with_rest: bool) -> (Vec<f32>, usize) {
        let n_pixels = self.size.area();
        let n_labels = self.planes.len() + usize::from(with_rest);
        let epsilon = n_labels as f32 / (std::f32::consts::E + n_labels as f32 - 1.0);
        let energy =
            |q: f32| -((1.0 - epsilon) * q.clamp(0.0, 1.0) + epsilon / n_labels as f32).ln();
        let mut unary = Vec::with_capacity(n_labels * n_pixels);
        if with_rest {
            let rest = |i: usize| 1.0 - self.planes.iter().map(|plane| plane[i]).sum::<f32>();
            unary.extend((0..n_pixels).map(|i| energy(rest(i))));
        }
        unary.extend(self.planes.iter().flatten().map(|&q| energy(q)));
        (unary, n_labels)
    }
}

/// (A - min A) / (max A - min A).
fn min_max(map: &[f32]) -> Vec<f32> {
    let largest = map.iter().copied().fold(f32::MIN, f32::max);
    let smallest = map.iter().copied().fold(f32::MAX, f32::min);
    let range = (largest - smallest).max(1e-12);
    map.iter().map(|v| (v - smallest) / range).collect()
}

/// A Gaussian of standard deviation `sigma` cells over a plane; edges repeated.
fn blur(plane: &[f32], size: Size, sigma: f32) -> Vec<f32> {
    if sigma <= 0.0 {
        return plane.to_vec();
    }
    let reach = (3.0 * sigma).ceil() as isize;
    let weights: Vec<f32> = (-reach..=reach)
        .map(|d| (-0.5 * (d as f32 / sigma).powi(2)).exp())
        .collect();
    let total: f32 = weights.iter().sum();
    let along = |plane: &[f32], step: [isize; 2]| -> Vec<f32> {
        let last = [size.height as isize - 1, size.width as isize - 1];
        (0..size.area())
            .map(|i| {
                let (y, x) = size.place(i);
                let (y, x) = (y as isize, x as isize);
                let sum: f32 = (-reach..=reach)
                    .zip(&weights)
                    .map(|(d, weight)| {
                        let y = (y + d * step[0]).clamp(0, last[0]) as usize;
                        let x = (x + d * step[1]).clamp(0, last[1]) as usize;
                        weight * plane[y * size.width + x]
                    })
                    .sum();
                sum / total
            })
            .collect()
    };
    along(&along(plane, [0, 1]), [1, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PosteriorConfig {
        PosteriorConfig::likelihood()
    }

    /// Two things apart on 8x8 pixels, of latents of 4x4, and the background; attention lights up both for the first
    /// word, a little less for the second.
    fn scene() -> (AttentionMaps, [Vec<usize>; 2]) {
        let inside =
            |i: usize, x: usize| (2..6).contains(&(i / 8)) && (x..x + 2).contains(&(i % 8));
        let things = [1, 5].map(|x| (0..64).filter(|&i| inside(i, x)).collect::<Vec<_>>());
        let mut maps = vec![vec![0.01; 64], vec![0.01; 64], vec![1.0; 64]];
        for &i in things.iter().flatten() {
            (maps[0][i], maps[1][i], maps[2][i]) = (0.6, 0.5, 0.05);
        }
        (
            AttentionMaps {
                size: Size::square(8),
                maps,
            },
            things,
        )
    }

    fn evidence(scale: f32) -> Evidence {
        // The noise in the left half is explained by the second concept.
        let mut evidence = Evidence::empty(Size::square(4), 3, Size::square(2));
        for cell in 0..16 {
            let l = if cell % 4 < 2 { scale } else { -scale };
            evidence.log_likelihoods[1][cell] = l;
            evidence.log_likelihoods[0][cell] = -l;
        }
        evidence
    }

    const ROLES: [Role; 3] = [Role::Object, Role::Object, Role::Background];

    #[test]
    fn the_noise_says_which_is_which() {
        let (maps, [left, right]) = scene();
        let found = posterior(&maps, Some(&evidence(5.0)), &ROLES, &config()).unwrap();
        let masks = found.masks().unwrap();
        let pixels =
            |c: usize| -> Vec<usize> { (0..64).filter(|&i| masks.planes()[c][i] == 1).collect() };
        assert_eq!([pixels(1), pixels(0)], [left.clone(), right.clone()]);
        assert_eq!(pixels(2).len(), 64 - left.len() - right.len());
        for i in 0..64 {
            let sum: f32 = found.planes.iter().map(|plane| plane[i]).sum();
            assert!((sum - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn one_more_part_has_its_price() {
        // A frame of ground around a square whose halves each light up one of two words; apart from it, a third thing.
        let size = Size::square(8);
        let inside =
            |i: usize, x: usize| (1..5).contains(&(i / 8)) && (x..x + 2).contains(&(i % 8));
        let [left, right] = [1, 3].map(|x| (0..64).filter(|&i| inside(i, x)).collect::<Vec<_>>());
        let mut maps = vec![vec![0.01; 64], vec![0.01; 64], vec![1.0; 64]];
        for (word, pixels) in [&left, &right].into_iter().enumerate() {
            pixels.iter().for_each(|&i| {
                maps[word][i] = 0.6;
                maps[1 - word][i] = 0.3;
                maps[2][i] = 0.0;
            });
        }
        for i in [54, 55, 62, 63] {
            (maps[0][i], maps[1][i], maps[2][i]) = (0.5, 0.5, 0.0);
        }
        let maps = AttentionMaps { size, maps };
        let owners = |part_price: f64| {
            let config = PosteriorConfig {
                cue: Cue::Attention,
                part_price,
                ..config()
            };
            let masks = posterior(&maps, None, &ROLES, &config).unwrap().masks();
            let masks = masks.unwrap();
            [left[0], right[0]].map(|i| (0..2).find(|&c| masks.planes()[c][i] == 1))
        };
        assert_eq!(owners(0.0), [Some(0), Some(1)]);
        let [left, right] = owners(1e3);
        assert_eq!(left, right, "two parts are enough for two words");
    }

    #[test]
    fn everyone_gets_a_part_and_fewer_parts_than_objects_are_decided_by_pixels() {
        let (mut maps, [left, _]) = scene();
        let attention = PosteriorConfig {
            cue: Cue::Attention,
            ..config()
        };
        let areas = |maps: &AttentionMaps| {
            let masks = posterior(maps, None, &ROLES, &attention)
                .unwrap()
                .masks()
                .unwrap();
            [0, 1].map(|c| masks.planes()[c].iter().filter(|&&v| v == 1).count())
        };
        assert_eq!(areas(&maps), [8, 8]);
        for &i in &left {
            (maps.maps[0][i], maps.maps[1][i], maps.maps[2][i]) = (0.01, 0.01, 1.0);
        }
        assert_eq!(areas(&maps).iter().sum::<usize>(), 8);
    }

    #[test]
    fn certainty_gets_cutlers_unary_energy() {
        let certain = Posterior {
            size: Size::square(1),
            planes: vec![vec![1.0], vec![0.0], vec![0.0]],
            log_evidence: 0.0,
        };
        let expected = densecrf::unary_from_planes(&[1.0, 0.0, 0.0], 3).unwrap();
        let (unary, n_labels) = certain.unary(false);
        assert_eq!(n_labels, 3);
        for (a, b) in unary.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-5, "{unary:?} {expected:?}");
        }
        assert_eq!(certain.unary(true).1, 4);
    }

    #[test]
    fn a_blur_keeps_the_mean_of_a_flat_plane() {
        assert!(
            blur(&[2.0; 16], Size::new(8, 2), 1.0)
                .iter()
                .all(|v| (v - 2.0).abs() < 1e-5)
        );
        assert!(
            upsample_linear(&[2.0; 16], Size::square(4), Size::new(7, 5))
                .iter()
                .all(|v| (v - 2.0).abs() < 1e-5)
        );
        assert_eq!(
            upsample_linear(&[0.0, 1.0, 0.0, 1.0], Size::square(2), Size::square(4))[..4],
            [0.0, 0.25, 0.75, 1.0]
        );
    }
}
