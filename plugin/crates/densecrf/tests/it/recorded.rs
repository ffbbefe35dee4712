//! Against pydensecrf, with the fixtures of `tests/reference/record_crf.py`.

use densecrf::{Appearance, CrfConfig, DenseCrf, Marginals, Smoothness, unary_from_planes};
use safetensors::SafeTensors;

use crate::scene::{agreement, max_difference};

/// The files and what is in them: `rgb` [H, W, 3] u8, `planes_l{L}` [L, H, W] u8, `q_l{L}_{variant}` [L, H, W] f32.
const FILES: [(&str, &[usize]); 3] = [
    ("crf_64", &[2, 4]),
    ("crf_128", &[2, 4]),
    ("crf_scene", &[2, 3, 9]),
];

fn read(file: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/fixtures/crf");
    std::fs::read(format!("{folder}/{file}.safetensors")).unwrap()
}

/// The configuration and number of iterations of each variant.
fn variants(width: usize) -> [(&'static str, CrfConfig, usize); 4] {
    let cutler = CrfConfig::cutler();
    let CrfConfig {
        iterations,
        smoothness,
        appearance,
    } = cutler;
    let position_only = Appearance {
        weight: 0.0,
        ..appearance
    };
    // Positions as if the picture were a smaller copy of one 512 pixels wide; at least one pixel.
    let scale = width as f32 / 512.0;
    let near = Smoothness {
        xy_std: (smoothness.xy_std * scale).max(1.0),
        ..smoothness
    };
    let alike = Appearance {
        xy_std: appearance.xy_std * scale,
        ..appearance
    };
    [
        ("it1", cutler, 1),
        ("it10", cutler, iterations),
        (
            "gauss_only",
            CrfConfig::new(iterations, smoothness, position_only).unwrap(),
            iterations,
        ),
        (
            "scaled128",
            CrfConfig::new(iterations, near, alike).unwrap(),
            iterations,
        ),
    ]
}

/// Label planes as recorded: given, or made of the degraded masks of one or all objects and what they leave over.
fn planes(tensors: &SafeTensors<'_>, n_labels: usize, n_pixels: usize) -> Vec<f32> {
    let as_f32 = |bytes: &[u8]| bytes.iter().map(|&b| f32::from(b)).collect::<Vec<_>>();
    if let Ok(planes) = tensors.tensor(&format!("planes_l{n_labels}")) {
        return as_f32(planes.data());
    }
    let masks = as_f32(tensors.tensor("degraded").unwrap().data());
    let masks = if n_labels == 2 {
        &masks[n_pixels..2 * n_pixels]
    } else {
        &masks[..]
    };
    let union = |pixel: usize| {
        masks[pixel..]
            .iter()
            .step_by(n_pixels)
            .copied()
            .fold(0.0, f32::max)
    };
    (0..n_pixels)
        .map(|pixel| 1.0 - union(pixel))
        .chain(masks.iter().copied())
        .collect()
}

fn check(file: &str, n_labels: usize) {
    let bytes = read(file);
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let rgb = tensors.tensor("rgb").unwrap();
    let (height, width) = (rgb.shape()[0], rgb.shape()[1]);
    let unary = unary_from_planes(&planes(&tensors, n_labels, height * width), n_labels).unwrap();
    for (variant, config, iterations) in variants(width) {
        let recorded = tensors.tensor(&format!("q_l{n_labels}_{variant}")).unwrap();
        let q = recorded
            .data()
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&bytes| f32::from_le_bytes(bytes))
            .collect();
        let recorded = Marginals { q, n_labels };
        let crf = DenseCrf::new(width, height, rgb.data(), &config).unwrap();
        let ours = crf.infer(&unary, n_labels, iterations).unwrap();
        let error = max_difference(&ours.q, &recorded.q);
        let labels = agreement(&ours.labels(), &recorded.labels());
        println!(
            "{file:>9} {width:>3}x{height:<3} {n_labels} labels {variant:<10} max |dQ| {error:.1e}  labels {:.4} %",
            100.0 * labels
        );
        assert!(
            error <= 1e-3,
            "{file}, {n_labels} labels, {variant}: max |dQ| {error}"
        );
        assert!(
            labels >= 0.999,
            "{file}, {n_labels} labels, {variant}: labels {labels}"
        );
    }
}

#[test]
fn marginals_agree_with_pydensecrf() {
    for (file, label_counts) in FILES {
        for &n_labels in label_counts {
            check(file, n_labels);
        }
    }
}

#[test]
fn labels_are_those_recorded() {
    for file in ["crf_64", "crf_128"] {
        let bytes = read(file);
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for n_labels in [2, 4] {
            let q = tensors.tensor(&format!("q_l{n_labels}_it10")).unwrap();
            let q = q
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&bytes| f32::from_le_bytes(bytes))
                .collect();
            let recorded = tensors.tensor(&format!("label_l{n_labels}")).unwrap();
            // The first of equals wins, as in numpy's argmax.
            let equal = agreement(&Marginals { q, n_labels }.labels(), recorded.data());
            assert!(equal == 1.0, "{file}, {n_labels} labels: {equal}");
        }
    }
}
