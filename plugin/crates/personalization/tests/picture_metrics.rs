//! Figures of pictures on the small model with random weights: what has to hold whatever the model has learned.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests; a failure is a failed test"
)]

use candle_core::Device;
use personalization::picture_metrics::{
    ConceptFeatures, identity, picture_features, prompt_errors,
};
use personalization::{Picture, Size};
use stable_diffusion::{CheckpointSource, DiffusionModel};

fn model() -> DiffusionModel {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../tests/fixtures/parity/sd2-small"
    );
    DiffusionModel::load(&CheckpointSource::Path(path.into()), &Device::Cpu).unwrap()
}

/// Stripes of this width.
fn picture(size: usize, width: usize) -> Picture {
    let pixel = |i: usize| [40 + 150 * (i / width % 2) as u8, (i % size) as u8, 90];
    let rgb: Vec<u8> = (0..size * size).flat_map(pixel).collect();
    let size = Size::square(size);
    Picture::from_rgb8(size, &rgb, size).unwrap()
}

#[test]
fn a_thing_is_most_like_itself() {
    let model = model();
    let size = model.image_size();
    let (own, other) = (picture(size, 3), picture(size, 11));
    let own = picture_features(&model, &own).unwrap();
    let other = picture_features(&model, &other).unwrap();
    let mask: Vec<u8> = (0..size * size)
        .map(|i| u8::from(i % size < size / 2))
        .collect();
    let thing = ConceptFeatures::new(&[(&own, &mask)]).unwrap();
    assert!((identity(&own, &thing).unwrap() - 1.0).abs() < 1e-5);
    assert!(identity(&other, &thing).unwrap() < 1.0 - 1e-4);
}

#[test]
fn words_are_judged_under_the_same_noise() {
    let model = model();
    let picture = picture(model.image_size(), 5);
    let prompts = ["a photo of a dog", "a photo of a cat", "a photo of a dog"].map(String::from);
    let errors = prompt_errors(&model, &picture, &prompts).unwrap();
    assert_eq!(errors[0].to_bits(), errors[2].to_bits());
    assert_ne!(errors[0].to_bits(), errors[1].to_bits());
}
