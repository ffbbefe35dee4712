//! The bundled VAE on pictures larger than its model's, whole and in tiles.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{Device, Tensor};
use peak_alloc::PeakAlloc;
use stable_diffusion::{CheckpointSource, DiffusionModel, memory::Memory, vae::Vae};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fn model() -> DiffusionModel {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../sprites/model");
    DiffusionModel::load(&CheckpointSource::Path(path.into()), &Device::Cpu).unwrap()
}

/// Colors that change slowly, in [-0.8, 0.8].
fn smooth(height: usize, width: usize) -> Tensor {
    let pixel = |i: usize| {
        let (channel, y, x) = (i / (height * width), i / width % height, i % width);
        let (y, x) = (y as f32 / height as f32, x as f32 / width as f32);
        0.8 * [
            (x + y - 1.0),
            (3.0 * x).sin() * y,
            (2.5 * y).cos() * (1.0 - x),
        ][channel]
    };
    let values: Vec<f32> = (0..3 * height * width).map(pixel).collect();
    Tensor::from_vec(values, (1, 3, height, width), &Device::Cpu).unwrap()
}

/// Mean and most of the absolute differences.
fn apart(a: &Tensor, b: &Tensor) -> [f32; 2] {
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    [difference.mean(0), difference.max(0)].map(|value| value.unwrap().to_scalar().unwrap())
}

/// The largest step between neighbors in a row or column, without the outer pixels.
fn steepest(picture: &Tensor) -> f32 {
    let (_, _, height, width) = picture.dims4().unwrap();
    let part = |dy: usize, dx: usize| {
        let rows = picture.narrow(2, 4 + dy, height - 9).unwrap();
        rows.narrow(3, 4 + dx, width - 9).unwrap()
    };
    let step = |dy, dx| apart(&part(0, 0), &part(dy, dx))[1];
    step(1, 0).max(step(0, 1))
}

/// The largest mean step from one row to the next, and from one column to the next: a line that an eye follows.
fn steepest_line(picture: &Tensor) -> f32 {
    let (_, _, height, width) = picture.dims4().unwrap();
    let most = |dim: usize, len: usize| -> f32 {
        let [a, b] = [4, 5].map(|start| picture.narrow(dim, start, len - 9).unwrap());
        let along = if dim == 2 { 3 } else { 2 };
        let steps = (b - a).unwrap().mean(along).unwrap().abs().unwrap();
        steps
            .flatten_all()
            .unwrap()
            .max(0)
            .unwrap()
            .to_scalar()
            .unwrap()
    };
    most(2, height).max(most(3, width))
}

/// Bytes that some work adds at its highest, and what it gives.
fn peak<T>(work: impl FnOnce() -> T) -> (usize, T) {
    ALLOCATOR.reset_peak_usage();
    let before = ALLOCATOR.current_usage();
    let result = work();
    (ALLOCATOR.peak_usage().saturating_sub(before), result)
}

/// In one test: the allocator counts for all threads.
#[test]
fn tiles_give_nearly_the_same_without_seams_in_less_memory() {
    let model = model();
    let lean = model.clone().with_memory(Memory::Lean).unwrap();
    let vaes: [&Vae; 2] = [&model.vae, &lean.vae];
    let side = model.image_size();

    // Pictures of the area that the model knows stay whole: the same bits.
    for small in [smooth(side, side), smooth(side / 2, 2 * side)] {
        let [a, b] = vaes.map(|vae| vae.moments(&small).unwrap().mean);
        assert_eq!(apart(&a, &b)[1], 0.0);
        let [a, b] = vaes.map(|vae| vae.decode(&vae.scaled(&a).unwrap()).unwrap());
        assert_eq!(apart(&a, &b)[1], 0.0);
    }

    let image = smooth(3 * side, 4 * side + 8);
    let [(whole_bytes, whole), (tiled_bytes, tiled)] =
        vaes.map(|vae| peak(|| vae.moments(&image).unwrap().mean));
    let spread = whole.var(2).unwrap().mean_all().unwrap().sqrt().unwrap();
    let spread: f32 = spread.to_scalar().unwrap();
    let of_latents = apart(&whole, &tiled);
    println!("encode: {of_latents:?} of {spread}; bytes {whole_bytes} and {tiled_bytes}");
    assert!(of_latents[0] < 0.12 * spread, "{of_latents:?} of {spread}");
    assert!(
        4 * tiled_bytes < whole_bytes,
        "{tiled_bytes} of {whole_bytes}"
    );

    let scaled = [&whole, &tiled].map(|z| model.vae.scaled(z).unwrap());
    let decoded = |vae: usize, z: usize| peak(|| vaes[vae].decode(&scaled[z]).unwrap());
    let [(whole_bytes, whole), (tiled_bytes, tiled)] = [decoded(0, 0), decoded(1, 0)];
    assert_eq!(tiled.dims(), image.dims());
    let of_picture = apart(&whole, &tiled);
    println!("decode: {of_picture:?} of 2; bytes {whole_bytes} and {tiled_bytes}");
    assert!(of_picture[0] < 0.02, "{of_picture:?}");
    assert!(
        4 * tiled_bytes < whole_bytes,
        "{tiled_bytes} of {whole_bytes}"
    );
    // There and back is no further from the picture than the VAE itself is, by a third.
    let there_and_back = [apart(&whole, &image)[0], apart(&decoded(1, 1).1, &image)[0]];
    println!("there and back: {there_and_back:?} of 2");
    assert!(
        there_and_back[1] < 1.4 * there_and_back[0],
        "{there_and_back:?}"
    );
    // Where tiles meet the difference from the whole changes slowly: a tile's very edge would show.
    let difference = (&whole - &tiled).unwrap();
    let (step, line) = (steepest(&difference), steepest_line(&difference));
    println!("steepest difference: {step}, of a line {line}");
    assert!(line < 0.015, "{line}");
}
