//! Figures that say whether a painted picture shows what it should, by nothing but the model's own eyes: *identity*, is
//! it the very thing that was learned, and *prompt*, is it what the words ask for. Ask the model that nothing was tuned
//! of: one that learned the things is no judge of them. All are deterministic: fixed timesteps, and noise from streams
//! of their own, the same for every picture.
//!
//! ```text
//! F_p(x)          = [ √(1 - w) û_p,  √w ẑ_p ]                              features of cell p of picture x
//! identity(x, c)  = mean over p in M_c of  max over q of  F_p(y) · F_q(x)  in [-1, 1]
//! error(x, words) = mean over t of ‖ε_θ(z_t, t, words) - target‖² / n      ≥ 0
//! ```
//!
//! | symbol | meaning |
//! | --- | --- |
//! | x | the painted picture |
//! | y, M_c | a picture of concept c and the cells of its true mask there; all such pictures count |
//! | û_p | what the second up level of the U-Net gives at p, of unit length: z with the noise of t = T/20, no words (Tang et al., arXiv 2306.03881) |
//! | ẑ_p | z at p, of unit length: its color |
//! | w | 0.2 |
//! | z, n | the latent of x (the mean of the posterior), and the number of its values |
//!
//! Identity asks for each bit of the thing where the painted picture has something like it: a thing may move, turn and
//! change its size. What counts is that it beats the other concepts of the scene. The error under the right words
//! against that under others is the model as a classifier (Li et al., arXiv 2303.16203).
//! `examples/check_pictures.rs` measures how often both are right where the truth is known.

use candle_core::Tensor;
use stable_diffusion::DiffusionModel;
use stable_diffusion::rng::Rng;

use crate::error::Result;
use crate::scene::Picture;
use crate::size::Size;

/// Seed of the evaluation streams.
const EVALUATION_SEED: u64 = 12_345;

/// w
const COLOR_WEIGHT: f64 = 0.2;

/// Up levels that a picture rises through; DIFT's choice.
const N_UP: usize = 2;

/// Stratified timesteps of the error.
const N_TIMESTEPS: usize = 16;

/// F of every cell of a picture.
#[derive(Debug, Clone)]
pub struct PictureFeatures {
    /// Of the picture.
    size: Size,
    /// Of the grid of cells.
    grid: Size,
    /// `[n, D]`, rows of unit length.
    cells: Tensor,
}

/// F of a concept's cells.
#[derive(Debug, Clone)]
pub struct ConceptFeatures {
    /// `[n, D]`, rows of unit length.
    cells: Tensor,
}

/// What a picture looks like to the model.
///
/// # Errors
/// Those of the model.
pub fn picture_features(model: &DiffusionModel, picture: &Picture) -> Result<PictureFeatures> {
    let z = latent(model, picture)?;
    let t = model.noise_schedule.n_timesteps() / 20;
    let noise = Rng::new(EVALUATION_SEED, "identity", 0).normal(z.dims(), &model.device)?;
    let noisy = model.noise_schedule.add_noise(&z, &noise, &[t])?;
    let n_up = N_UP.min(model.config.unet.block_out_channels.len());
    let nothing = context(model, "")?;
    let seen = model.unet.features(&noisy, &[t as f32], &nothing, n_up)?;
    let grid = Size::new(seen.dim(3)?, seen.dim(2)?);
    let color = z.avg_pool2d((z.dim(3)? / grid.width).max(1))?;
    let seen = (cells(&seen)? * (1.0 - COLOR_WEIGHT).sqrt())?;
    let color = (cells(&color)? * COLOR_WEIGHT.sqrt())?;
    Ok(PictureFeatures {
        size: picture.size(),
        grid,
        cells: Tensor::cat(&[seen, color], 1)?,
    })
}

/// `[1, C, h, w]` as rows of unit length, `[h·w, C]`.
fn cells(plane: &Tensor) -> Result<Tensor> {
    let rows = plane.squeeze(0)?.flatten_from(1)?.t()?.contiguous()?;
    let length = (rows.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-12)?;
    Ok(rows.broadcast_div(&length)?.detach())
}

impl ConceptFeatures {
    /// Of the cells that are mostly inside of these pictures' masks `[H · W]`; in a picture in which none
    /// is, of those with the largest share.
    ///
    /// # Errors
    /// The tensor library fails; an empty list.
    pub fn new(shown: &[(&PictureFeatures, &[u8])]) -> Result<Self> {
        let mut rows = Vec::with_capacity(shown.len());
        for (picture, mask) in shown {
            let inside = inside(mask, picture.size, picture.grid);
            let n = inside.len();
            let inside = Tensor::from_vec(inside, n, picture.cells.device())?;
            rows.push(picture.cells.index_select(&inside, 0)?);
        }
        Ok(Self {
            cells: Tensor::cat(&rows, 0)?,
        })
    }
}

/// The cells over a mask more than half of whose pixels are inside, or else those with the most.
fn inside(mask: &[u8], size: Size, grid: Size) -> Vec<u32> {
    let mut counts = vec![[0_usize; 2]; grid.area()];
    for (i, &value) in mask.iter().enumerate() {
        let count = &mut counts[size.cell_in(i, grid)];
        count[0] += usize::from(value != 0);
        count[1] += 1;
    }
    let most = counts.iter().map(|[n, _]| *n).max().unwrap_or(0);
    let has_any = counts.iter().any(|[n, of]| 2 * n > *of);
    let is_inside = |[n, of]: [usize; 2]| if has_any { 2 * n > of } else { n == most };
    (0_u32..)
        .zip(counts)
        .filter_map(|(i, count)| is_inside(count).then_some(i))
        .collect()
}

/// identity(x, c).
///
/// # Errors
/// The tensor library fails.
pub fn identity(picture: &PictureFeatures, concept: &ConceptFeatures) -> Result<f64> {
    let similarity = concept.cells.matmul(&picture.cells.t()?)?;
    Ok(f64::from(
        similarity.max(1)?.mean_all()?.to_scalar::<f32>()?,
    ))
}

/// error(x, words) for each of these prompts, without learned tokens.
///
/// # Errors
/// A prompt that is too long, or those of the model.
pub fn prompt_errors(
    model: &DiffusionModel,
    picture: &Picture,
    prompts: &[String],
) -> Result<Vec<f64>> {
    let z = latent(model, picture)?;
    let mut rng = Rng::new(EVALUATION_SEED, "prompt", 0);
    let total = model.noise_schedule.n_timesteps();
    let contexts = prompts.iter().map(|prompt| context(model, prompt));
    let contexts = contexts.collect::<Result<Vec<_>>>()?;
    let mut sums = vec![0.0; contexts.len()];
    for k in 1..=N_TIMESTEPS {
        let t = k * (total - 1) / (N_TIMESTEPS + 1);
        let noise = rng.normal(z.dims(), &model.device)?;
        let noisy = model.noise_schedule.add_noise(&z, &noise, &[t])?;
        let target = model.noise_schedule.target(&z, &noise, &[t])?;
        let predictions = model.unet.forward_each(&noisy, &[t as f32], &contexts)?;
        for (prediction, sum) in predictions.iter().zip(&mut sums) {
            let square = (prediction - &target)?.sqr()?;
            *sum += f64::from(square.mean_all()?.to_scalar::<f32>()?);
        }
    }
    Ok(sums.iter().map(|sum| sum / N_TIMESTEPS as f64).collect())
}

/// Scaled mean of the posterior, `[1, 4, h, w]`.
fn latent(model: &DiffusionModel, picture: &Picture) -> Result<Tensor> {
    let moments = model.vae.moments(&picture.tensor(false, &model.device)?)?;
    Ok(model.vae.scaled(&moments.mean)?.detach())
}

fn context(model: &DiffusionModel, prompt: &str) -> Result<Tensor> {
    let ids = model.tokenizer.encode(prompt)?.ids;
    Ok(model.text_encoder.encode(&ids, None)?.detach())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_inside_by_the_most_of_its_pixels() {
        // 4x4 pixels, 2x2 cells.
        let mask = |rows: [&[u8; 4]; 4]| -> Vec<u8> {
            rows.iter()
                .flat_map(|row| row.iter().map(|&v| u8::from(v == b'#')))
                .collect()
        };
        for (rows, expected) in [
            ([b"##..", b"#...", b"..##", b"..##"], vec![0, 3]),
            ([b"##.#", b"....", b"....", b"...."], vec![0]),
            ([b"....", b"..#.", b"....", b"#..."], vec![1, 2]),
        ] {
            let (size, grid) = (Size::square(4), Size::square(2));
            assert_eq!(inside(&mask(rows), size, grid), expected);
        }
    }

    #[test]
    fn a_thing_is_found_wherever_it_is() {
        let features = |rows: &[[f32; 2]]| {
            let cells: Vec<f32> = rows.concat();
            let shape = (rows.len(), 2);
            Tensor::from_vec(cells, shape, &candle_core::Device::Cpu).unwrap()
        };
        let (one, other) = ([1.0, 0.0], [0.0, 1.0]);
        let picture = |cells| PictureFeatures {
            size: Size::square(2),
            grid: Size::square(2),
            cells,
        };
        let shown = picture(features(&[one, one, other, other]));
        let thing = ConceptFeatures::new(&[(&shown, &[1, 1, 0, 0])]).unwrap();
        let moved = picture(features(&[other, other, other, one]));
        let gone = picture(features(&[other; 4]));
        assert_eq!(identity(&moved, &thing).unwrap(), 1.0);
        assert_eq!(identity(&gone, &thing).unwrap(), 0.0);
    }
}
