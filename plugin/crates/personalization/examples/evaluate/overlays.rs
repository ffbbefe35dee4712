//! Masks over their pictures, for people to see what a figure means.

use std::path::Path;

use anyhow::{Context, Result};
use personalization::metrics::matched_truth;
use personalization::overlay::masks_over;

use crate::masks::Learned;
use crate::pictures::save_rgb;
use crate::scenes::TrueScene;

/// Saves a row for every picture, as `name_0.png` and so on: the picture, its true masks, the first masks and the last
/// ones, a concept in the same color everywhere.
pub(crate) fn save_overlays(
    TrueScene { scene, truth }: &TrueScene,
    Learned { outcome, matching }: &Learned,
    folder: &Path,
    name: &str,
) -> Result<()> {
    std::fs::create_dir_all(folder).context(folder.display().to_string())?;
    let truth = matched_truth(scene, truth, matching)?;
    for (number, shown) in scene.pictures().iter().enumerate() {
        let picture = &shown.picture;
        let masks = [&truth, &outcome.rounds[0].masks, &outcome.masks];
        let overlays = masks.map(|masks| masks_over(picture, &masks[number]));
        let [truth, first, last] = &overlays;
        let columns = [picture.rgb8(), truth, first, last];
        let row_bytes = 3 * picture.size().width;
        let row: Vec<u8> = (0..picture.size().height)
            .flat_map(|y| columns.map(|column| &column[y * row_bytes..(y + 1) * row_bytes]))
            .flatten()
            .copied()
            .collect();
        let width = columns.len() * picture.size().width;
        let file = folder.join(format!("{name}_{number}.png"));
        save_rgb(&row, [width, picture.size().height], &file)?;
    }
    Ok(())
}
