//! Against the definitions in [`crate::naive`].
//!
//! The lattice is an approximation of the Gaussian, so there are two oracles: the lattice's own linear operator, which
//! must be met to rounding, and the Gaussian itself, whose distance is measured and only bounded.

use densecrf::{
    Appearance, CrfConfig, DenseCrf, Lattice, Marginals, Smoothness, unary_from_planes,
};

use crate::naive::{self, Filter, Matrix};
use crate::scene::{Scene, agreement, max_difference, unit};

/// Features without ties, spread over a few standard deviations.
fn random_features<const D: usize>(n: usize, extent: f64) -> Vec<[f32; D]> {
    (0..n)
        .map(|i| std::array::from_fn(|c| (extent * unit((i * D + c) as u32)) as f32))
        .collect()
}

fn widen<const D: usize>(features: &[[f32; D]]) -> Vec<Vec<f64>> {
    features
        .iter()
        .map(|f| f.iter().map(|&x| f64::from(x)).collect())
        .collect()
}

/// Largest and mean difference of filtered random values, relative to the largest filtered value.
fn filter_error<const D: usize>(matrix: &Matrix, lattice: &Lattice, n: usize) -> (f64, f64) {
    let values: Vec<f64> = (0..n).map(|i| unit(i as u32 ^ 0xABCD_0000)).collect();
    let lanes: Vec<[f32; 4]> = values
        .iter()
        .map(|&v| [v as f32, 0.0, 1.0 - v as f32, 0.0])
        .collect();
    let exact = matrix.apply(&values);
    let ours = lattice.filter(&lanes);
    assert!(
        ours.iter().all(|lanes| lanes[1] == 0.0 && lanes[3] == 0.0),
        "an empty lane stays empty"
    );
    let largest = exact.iter().copied().fold(0.0, f64::max);
    let errors: Vec<f64> = exact
        .iter()
        .zip(&ours)
        .map(|(e, o)| (e - f64::from(o[0])).abs() / largest)
        .collect();
    (
        errors.iter().copied().fold(0.0, f64::max),
        errors.iter().sum::<f64>() / n as f64,
    )
}

fn check_operator<const D: usize>(n: usize, extent: f64) {
    let features = random_features::<D>(n, extent);
    let matrix = Matrix::new(Filter::Lattice, &widen(&features));
    let lattice = Lattice::build(&features).unwrap();
    assert_eq!(lattice.n_features(), n);
    let (raw, _) = filter_error::<D>(&matrix, &lattice, n);
    let (normalized, _) = filter_error::<D>(&matrix.normalized(), &lattice.normalized(1.0), n);
    println!(
        "d = {D}, extent {extent:>4}: lattice operator, largest error {raw:.1e} raw, {normalized:.1e} normalized"
    );
    assert!(
        raw < 1e-5 && normalized < 1e-5,
        "d = {D}, extent {extent}: {raw} {normalized}"
    );
}

#[test]
fn the_filter_is_the_lattice_operator() {
    for extent in [0.5, 5.0, 50.0] {
        check_operator::<1>(120, extent);
        check_operator::<2>(200, extent);
        check_operator::<3>(200, extent);
        check_operator::<5>(200, extent);
    }
}

/// The CRF's use of the filter: normalized, on a picture's features.
fn check_gaussian<const D: usize>(name: &str, features: &[Vec<f64>], worst: f64, mean: f64) {
    let narrow: Vec<[f32; D]> = features
        .iter()
        .map(|f| std::array::from_fn(|c| f[c] as f32))
        .collect();
    let lattice = Lattice::build(&narrow).unwrap().normalized(1.0);
    let matrix = Matrix::new(Filter::Gaussian, features).normalized();
    let (largest_error, mean_error) = filter_error::<D>(&matrix, &lattice, features.len());
    println!(
        "{name}: normalized lattice against Gaussian, largest error {largest_error:.4}, mean {mean_error:.4}"
    );
    assert!(
        largest_error < worst && mean_error < mean,
        "{name}: {largest_error} {mean_error}"
    );
}

#[test]
fn the_filter_approximates_a_gaussian() {
    let scene = Scene::new(40, 30, 3);
    check_gaussian::<2>(
        "positions, std 3",
        &naive::position_features(&scene, 3.0),
        0.1,
        0.03,
    );
    check_gaussian::<5>(
        "positions and colors, std 20 and 13",
        &naive::color_features(&scene, 20.0, 13.0),
        0.1,
        0.03,
    );
    check_gaussian::<5>(
        "positions and colors, std 50 and 5",
        &naive::color_features(&scene, 50.0, 5.0),
        0.1,
        0.03,
    );
}

/// Largest |ΔQ|, share of equal labels, and share of pixels that the definition labels otherwise than the planes.
fn compare(filter: Filter, scene: &Scene, config: &CrfConfig) -> (f32, f64, f64) {
    let n_labels = scene.n_labels;
    let unary = unary_from_planes(&scene.planes, n_labels).unwrap();
    let crf = DenseCrf::new(scene.width, scene.height, &scene.rgb, config).unwrap();
    let ours = crf.infer(&unary, n_labels, config.iterations).unwrap();
    let exact = Marginals {
        q: naive::mean_field(filter, scene, &unary, config),
        n_labels,
    };
    let labels = exact.labels();
    assert!(
        (0..n_labels).all(|label| labels.contains(&(label as u8))),
        "every label has survived"
    );
    let planes = Marginals {
        q: scene.planes.clone(),
        n_labels,
    }
    .labels();
    let changed = 1.0 - agreement(&planes, &labels);
    (
        max_difference(&ours.q, &exact.q),
        agreement(&ours.labels(), &labels),
        changed,
    )
}

/// Widths that put no feature on the border of two simplices, where f32 and f64 may choose different ones.
fn untied() -> CrfConfig {
    let smoothness = Smoothness {
        weight: 3.0,
        xy_std: 2.31,
    };
    let appearance = Appearance {
        weight: 6.0,
        xy_std: 17.3,
        rgb_std: 12.7,
    };
    CrfConfig::new(10, smoothness, appearance).unwrap()
}

#[test]
fn mean_field_on_the_lattice_operator_is_the_definition() {
    for (n_labels, width, height) in [(2, 24, 18), (3, 24, 18), (5, 48, 12)] {
        let scene = Scene::new(width, height, n_labels);
        let (error, labels, changed) = compare(Filter::Lattice, &scene, &untied());
        println!(
            "{n_labels} labels: mean field on the lattice operator, max |dQ| {error:.1e}, labels {labels:.4}, changed {changed:.3}"
        );
        assert!(
            error < 1e-5 && labels == 1.0,
            "{n_labels} labels: {error} {labels}"
        );
    }
}

#[test]
fn mean_field_on_the_gaussian_gives_nearly_the_same_labels() {
    for (name, config) in [("untied", untied()), ("CutLER", CrfConfig::cutler())] {
        for n_labels in [2, 4] {
            let scene = Scene::new(40, 30, n_labels);
            let (error, labels, changed) = compare(Filter::Gaussian, &scene, &config);
            println!(
                "{name}, {n_labels} labels: mean field on the Gaussian, max |dQ| {error:.2}, labels {labels:.4}, changed {changed:.3}"
            );
            assert!(
                labels > 0.99 && changed > 0.05,
                "{name}, {n_labels} labels: {labels}"
            );
        }
    }
}
